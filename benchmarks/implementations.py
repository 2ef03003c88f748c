"""The table of the implementations: how each is loaded, and which dtypes and devices it has."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .graphs import export_graphs, load_onnxruntime, load_openvino
from .machine import is_cuda
from .peers import (
    OTHER_FUNCTION,
    SENTENCE_TRANSFORMERS,
    UNPADDED,
    Scorer,
    export_for_unpadding,
    load_flag_embedding,
    load_llama_bidir,
    load_reference,
    load_sentence_transformers,
    load_stock_llama,
    load_unpadded,
)
from .served import export_for_vllm, load_vllm

OURS = "llama-bidir"
FLOATS = ("float32", "bfloat16", "float16")
DTYPES = (*FLOATS, "int8", "float8")


class Implementation(NamedTuple):
    """
    An implementation that can be measured.

    Attributes:
        load: loads a checkpoint folder for a dtype, a device and a maximum number of tokens.
        dtypes: those that it computes in.
        devices: the types of device that it is measured on.
        export: writes the files that it needs into a checkpoint folder, unless they exist. `load` does so too.
    """

    load: Callable[..., Scorer]
    dtypes: Sequence[str] = FLOATS
    devices: Sequence[str] = ("cpu", "cuda")
    export: Callable[[str], str] | None = None


IMPLEMENTATIONS = {
    OURS: Implementation(load_llama_bidir, DTYPES),
    SENTENCE_TRANSFORMERS: Implementation(load_sentence_transformers),
    UNPADDED: Implementation(load_unpadded, ("bfloat16", "float16"), ("cuda",), export_for_unpadding),
    "onnxruntime": Implementation(load_onnxruntime, ("float32", "int8"), ("cpu",), export_graphs),
    "openvino": Implementation(load_openvino, ("float32", "bfloat16"), ("cpu",), export_graphs),
    "vllm": Implementation(load_vllm, ("bfloat16", "float16"), ("cuda",), export_for_vllm),
    "reference": Implementation(load_reference),
    OTHER_FUNCTION: Implementation(load_stock_llama),
    "FlagEmbedding": Implementation(load_flag_embedding),
}


def choose(names: Sequence[str], dtypes: Sequence[str], device: str) -> list[tuple[str, str]]:
    """Returns the pairs of an implementation and a dtype that exist on a device, in the order of the arguments."""
    kind = "cuda" if is_cuda(device) else "cpu"
    chosen = [(name, IMPLEMENTATIONS[name]) for name in names]
    return [
        (name, dtype) for dtype in dtypes for name, entry in chosen if dtype in entry.dtypes and kind in entry.devices
    ]

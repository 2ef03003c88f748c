"""From a checkpoint or an adapter to a folder for another tool."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..utils.outputs import whole_folder
from .hub import write_hub
from .loading import cast_parameters, load_merged
from .model_card import read_card, read_measures, write_model_card
from .onnx import check_installed, quantize, write_onnx
from .sentence_transformers import write_sentence_transformers
from .vllm import write_vllm

Writer = Callable[[Any, PreTrainedTokenizerBase, Path, str], str]

FORMATS: dict[str, Writer] = {
    "sentence-transformers": write_sentence_transformers,
    "vllm": write_vllm,
    "onnx": write_onnx,
    "hub": write_hub,
}
# Of the model card; transformers for the others.
LIBRARIES = {"sentence-transformers": "sentence-transformers", "vllm": "vllm"}


def export_reranker(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str,
    revision: str | None = None,
    dtype: str | None = None,
    int8: bool = False,
    model_id: str | None = None,
    evaluation: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """
    Writes a reranker as a folder that another tool loads with equal scores.

    Args:
        model: the folder or Hub id of a checkpoint, or of an adapter, which is merged into its base on the way.
        output: the folder to write, whole or not at all.
        format: `sentence-transformers`, `vllm`, `onnx` or `hub` (with the code that transformers needs to load it).
        revision: branch, tag or commit of a Hub repository.
        dtype: of the weights; the checkpoint's when not given, and float32 for `onnx` and for an adapter.
        int8: for `onnx`, add a variant with int8 weights (see [`~onnx.quantize`]).
        model_id: how the export will be found, for the code in its card; `output` when not given.
        evaluation: what `llama-bidir evaluate --json` wrote, for the measures of the card; those of the reranker's own
            card when not given.
        overwrite: replace `output` when it exists.

    Raises:
        FileExistsError: there is something at `output`, and `overwrite` is not set or it is no checkpoint.
        ValueError: the format is not one of the four, it cannot hold this reranker, with the reason, or the weights are
            quantized.
        ImportError: the format needs a package that is missing.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "onnx" and dtype not in (None, "float32"):
        raise ValueError(f"the graph of onnx is float32: leave dtype out, got {dtype!r}")
    if int8 and format != "onnx":
        raise ValueError(f"int8 is for onnx, and not for {format}")
    if evaluation is not None:
        read_measures(evaluation)  # raises before the work
    if format == "onnx":
        check_installed()
    name = os.fspath(model)
    with whole_folder(output, overwrite=overwrite, keep=name, marker="config.json") as folder:
        reranker, tokenizer = load_merged(name, "float32" if format == "onnx" else "auto", revision=revision)
        if dtype is not None:
            cast_parameters(reranker, getattr(torch, dtype))
        model_id = model_id or os.fspath(output)
        use = FORMATS[format](reranker, tokenizer, folder, model_id)
        write_model_card(
            folder,
            reranker.config,
            model_id,
            use=use,
            library=LIBRARIES.get(format, "transformers"),
            evaluation=evaluation,
            metadata=read_card(name, revision=revision),
        )
        if int8:
            quantize(folder)

"""Liger kernels, which the Trainer leaves out without a word for a model type that they do not know."""

from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..configuration_llama_bidir import LlamaBidirectionalConfig


def register_with_liger(device_type: str) -> None:
    """
    Tells Liger that a reranker takes Llama's kernels: rotary embedding, RMSNorm and SwiGLU. Those of the cross entropy
    belong to a language model head.

    Args:
        device_type: where the model is trained.

    Raises:
        ImportError: liger-kernel is not installed.
        ValueError: there is no GPU for its kernels.
    """
    if find_spec("liger_kernel") is None:
        raise ImportError("use_liger_kernel is set, but liger-kernel is not installed: pip install liger-kernel")
    if device_type == "cpu":
        raise ValueError("use_liger_kernel needs a GPU, because Liger's kernels are written in Triton: set it to False")
    liger: Any = import_module("liger_kernel.transformers.monkey_patch")
    liger.MODEL_TYPE_TO_APPLY_LIGER_FN[LlamaBidirectionalConfig.model_type] = partial(
        liger.apply_liger_kernel_to_llama, cross_entropy=False, fused_linear_cross_entropy=False
    )

"""Liger kernels, which the Trainer silently skips for a model type that Liger does not know."""

from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..configuration_llama_bidir import LlamaBidirectionalConfig


def register_with_liger(device_type: str) -> None:
    """
    Tells Liger to use Llama's kernels for rerankers: rotary embedding, RMSNorm and SwiGLU. The kernels for cross
    entropy are left out, because they need a language model head.

    Args:
        device_type: the type of the device that trains the model, such as `cuda`.

    Raises:
        ImportError: liger-kernel is not installed.
        ValueError: the device is a CPU.
    """
    if find_spec("liger_kernel") is None:
        raise ImportError("use_liger_kernel is set, but liger-kernel is not installed: pip install liger-kernel")
    if device_type == "cpu":
        raise ValueError("use_liger_kernel needs a GPU, because Liger's kernels are written in Triton: set it to False")
    liger: Any = import_module("liger_kernel.transformers.monkey_patch")
    liger.MODEL_TYPE_TO_APPLY_LIGER_FN[LlamaBidirectionalConfig.model_type] = partial(
        liger.apply_liger_kernel_to_llama, cross_entropy=False, fused_linear_cross_entropy=False
    )

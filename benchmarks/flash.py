"""Gives transformers' flash attention the kernel of `torch.nn.attention.varlen`, where flash-attn is not installed."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.utils.import_utils import is_flash_attn_2_available

from .machine import is_cuda

# transformers takes a name with "flash" in it for flash attention, and looks for the package only under its own names.
TORCH_FLASH = "flash_attention_of_torch"
PACKAGE_FLASH = "flash_attention_2"


def flash_implementation(device: str) -> str:
    """
    Returns the `attn_implementation` to load a model with: flash-attn's where it is installed, else torch's kernel.

    The first call without flash-attn registers torch's kernel. Everything else is transformers' own code: the mask, the
    flattened input and the arguments.
    """
    if is_cuda(device) and is_flash_attn_2_available():
        return PACKAGE_FLASH
    if TORCH_FLASH not in AttentionInterface().valid_keys():
        AttentionInterface.register(TORCH_FLASH, flash_attention_forward)
        AttentionMaskInterface.register(TORCH_FLASH, flash_attention_mask)
        _load_instead(TORCH_FLASH, torch_varlen)
    return TORCH_FLASH


def kernel_name(device: str) -> str:
    """Returns what computes attention by [`flash_implementation`] on a device, in words."""
    if flash_implementation(device) == PACKAGE_FLASH:
        return "flash-attn"
    return "the varlen kernel of torch" if is_cuda(device) else "attention by sequence"


def torch_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """
    `flash_attn_varlen_func` by torch: its varlen kernel on CUDA, and elsewhere one call per sequence.

    Args:
        q: shape `(total_tokens, num_heads, head_dim)`.
        k, v: shape `(total_tokens, num_key_value_heads, head_dim)`.
        cu_seqlens_q, cu_seqlens_k: shape `(num_sequences + 1,)`: the first token of each sequence, then their number.
        max_seqlen_q, max_seqlen_k: tokens of the longest sequence.
        dropout_p: must be 0.
        softmax_scale: factor of the products of queries and keys. The default is `head_dim ** -0.5`.
        causal: whether a token attends only to itself and to earlier tokens.

    Returns:
        shape `(total_tokens, num_heads, head_dim)`.

    Raises:
        ValueError: `dropout_p` is not 0.
    """
    if dropout_p:
        raise ValueError(f"torch's varlen kernel has no dropout: dropout_p must be 0, got {dropout_p}")
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(
            q,
            k,
            v,
            cu_seqlens_q.to(torch.int32),
            cu_seqlens_k.to(torch.int32),
            max_seqlen_q,
            max_seqlen_k,
            scale=softmax_scale,
            window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=q.shape[1] != k.shape[1],
        )
    parts = (states.transpose(0, 1).split(cu_seqlens_q.diff().tolist(), dim=1) for states in (q, k, v))
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            *(states[None] for states in sequence), is_causal=causal, scale=softmax_scale, enable_gqa=True
        )
        for sequence in zip(*parts, strict=True)
    ]
    return torch.cat([output[0] for output in outputs], dim=1).transpose(0, 1)


def _load_instead(name: str, varlen: Callable[..., torch.Tensor]) -> None:
    """Makes transformers load `varlen` for an implementation of this name, where it would look for a package."""
    utils: Any = modeling_flash_attention_utils
    load = utils._lazy_imports

    def load_functions(implementation: str | None, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if implementation == name:
            return None, varlen, None, utils._pad_input, utils._unpad_input
        return load(implementation, *args, **kwargs)

    utils._lazy_imports = load_functions

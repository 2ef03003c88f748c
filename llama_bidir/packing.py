"""Padding-free batches: sequences laid end to end in one stream of tokens, which only attention takes apart."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED_SDPA = "packed_sdpa"


def packed_sdpa_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Scaled dot product attention within each sequence of a packed stream; neighbours of equal length share a call.

    Without `cu_seq_lens_q` it is transformers' `sdpa`.

    Args:
        query (`torch.Tensor` of shape `(1, num_heads, total_tokens, head_dim)`).
        key, value (`torch.Tensor` of shape `(1, num_key_value_heads, total_tokens, head_dim)`).
        attention_mask: not used for packed input, where sequences are whole.
        cu_seq_lens_q (`torch.IntTensor` of shape `(num_sequences + 1,)`, *optional*): where each sequence starts.

    Returns:
        `torch.Tensor` of shape `(1, total_tokens, num_heads, head_dim)`, and None for the weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs, start = [], 0
    for length, run in groupby(cu_seq_lens_q.diff().tolist()):
        count = len(list(run))
        end = start + count * length
        # (1, heads, count * length, head_dim) -> (count, heads, length, head_dim)
        q, k, v = (
            states[0, :, start:end].unflatten(1, (count, length)).transpose(0, 1) for states in (query, key, value)
        )
        outputs.append(sdpa_attention_forward(module, q, k, v, None, **kwargs)[0].flatten(0, 1))
        start = end
    return torch.cat(outputs)[None], None


def packed_sdpa_mask(*, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """The mask of padded input; packed input and input without padding need none."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_SDPA, packed_sdpa_attention)
AttentionMaskInterface.register(PACKED_SDPA, packed_sdpa_mask)


def pack(input_ids: Sequence[Sequence[int]], device: torch.device | str | None = None) -> dict[str, Any]:
    """
    Lays sequences end to end.

    Returns:
        what a model's forward takes: `input_ids` of shape `(1, total_tokens)`, and the cu_seq_lens and max_length
        keywords of transformers.
    """
    starts = torch.tensor([0, *map(len, input_ids)]).cumsum(0).to(torch.int32)
    stream = torch.tensor([token for ids in input_ids for token in ids])
    longest = max(map(len, input_ids))
    return {
        "input_ids": stream[None].to(device),
        "cu_seq_lens_q": starts.to(device),
        "cu_seq_lens_k": starts.to(device),
        "max_length_q": longest,
        "max_length_k": longest,
    }


def batches_by_tokens(
    lengths: Sequence[int], *, max_tokens: int, max_sequences: int | None = None
) -> Iterator[list[int]]:
    """
    Indices of sequences in batches, the longest first, so that the first batch needs the most memory.

    Args:
        lengths: tokens of each sequence.
        max_tokens: of a batch; a longer sequence is a batch of its own.
        max_sequences: of a batch, where given.
    """
    batch: list[int] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (total + lengths[index] > max_tokens or len(batch) == max_sequences):
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += lengths[index]
    if batch:
        yield batch

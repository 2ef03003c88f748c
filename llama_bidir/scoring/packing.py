"""Packed (padding-free) batches: sequences laid end to end in one stream, which only attention splits again."""

from collections.abc import Iterator, Sequence
from functools import cache
from heapq import heappop, heappush
from itertools import chain, groupby
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .buffers import Buffers

PACKED_ATTENTION = "packed_attention"

# Implementations that read the cu_seq_lens keywords, so their input needs no padding.
PACKED_IMPLEMENTATIONS = (PACKED_ATTENTION, "flash_attention_2", "flash_attention_3")

# In bfloat16 on a CPU, sequences of up to this many tokens get their attention weights in one matrix product.
MATMUL_LENGTH = 512
# A CPU's softmax computes rows in vectors of up to this many bfloat16 values, and what is left of a row one by one.
SOFTMAX_LANES = 32
# Minimum tokens that repay starting a batch, by type of device.
SMALLEST_BATCH = {"cpu": 64, "cuda": 4096}
# The widest activation of a batch on a CPU, in bytes. Larger ones gain nothing and cost memory.
CPU_ACTIVATION = 9 * 2**20

_TORCH = Version(torch.__version__)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sequence_lengths: Sequence[int] | None = None,
    buffers: Buffers | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attention within each sequence of a packed stream: by `torch.nn.attention.varlen` on a GPU that supports it, else by
    one scaled dot product attention per sequence. Without `cu_seq_lens_q` it is transformers' `sdpa`.

    Args:
        query (`torch.Tensor` of shape `(1, num_heads, total_tokens, head_dim)`).
        key, value (`torch.Tensor` of shape `(1, num_key_value_heads, total_tokens, head_dim)`).
        attention_mask: not used for packed input, which has no padding.
        cu_seq_lens_q (`torch.IntTensor` of shape `(num_sequences + 1,)`, *optional*): where each sequence starts.
        max_length_q (`int`, *optional*): tokens of the longest sequence.
        sequence_lengths (`Sequence[int]`, *optional*): the same lengths on the host, which saves a wait for the GPU.
        buffers (`Buffers`, *optional*): memory to use again.

    Returns:
        `torch.Tensor` of shape `(1, total_tokens, num_heads, head_dim)`, and None for the weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if torch.is_autocast_enabled(query.device.type):  # multiplying by float32 rotary angles has made them float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if _has_varlen_kernel(query.device, query.dtype) and not module.is_causal and not kwargs.get("dropout"):
        return _attend_by_varlen(query, key, value, cu_seq_lens_q, max_length_q), None
    if sequence_lengths is None:
        sequence_lengths = cu_seq_lens_q.diff().tolist()
    return _attend_one_by_one(module, query, key, value, sequence_lengths, buffers or Buffers(), **kwargs), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # each list of lengths would be compiled anew
def _attend_one_by_one(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequence_lengths: Sequence[int],
    buffers: Buffers,
    **kwargs: Any,
) -> torch.Tensor:
    outputs = []
    runs = [
        (length, len(list(run))) for length, run in groupby(sequence_lengths)
    ]  # neighbours of equal length share a call
    # Split, not sliced: the gradient of a slice is as long as the whole stream.
    parts = [states[0].split([length * count for length, count in runs], dim=1) for states in (query, key, value)]
    for (length, count), *states in zip(runs, *parts, strict=True):
        # (heads, count * length, head_dim) -> (count, heads, length, head_dim)
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in states)
        if length <= MATMUL_LENGTH and _matmul_applies(module, query, **kwargs):
            outputs.append(_attend_by_matmul(q, k, v, buffers).flatten(0, 1))
        else:
            outputs.append(sdpa_attention_forward(module, q, k, v, None, **kwargs)[0].flatten(0, 1))
    return torch.cat(outputs)[None]


def _matmul_applies(module: torch.nn.Module, query: torch.Tensor, **kwargs: Any) -> bool:
    """Whether two matrix products are faster: a CPU's fused kernel computes short bfloat16 sequences like float32."""
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and not module.is_causal
        and not torch.is_grad_enabled()
        and not kwargs.get("dropout")
    )


def _attend_by_matmul(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    """
    Attention by two matrix products. Query heads that share a key are multiplied together.

    Args:
        query (`torch.Tensor` of shape `(count, num_heads, length, head_dim)`).
        key, value (`torch.Tensor` of shape `(count, num_key_value_heads, length, head_dim)`).
        buffers: memory for the queries and the attention weights.

    Returns:
        `torch.Tensor` of shape `(count, length, num_heads, head_dim)`.
    """
    count, num_heads, length, head_dim = query.shape
    num_keys = key.shape[1]
    # (count * num_key_value_heads, queries of all heads that share a key, head_dim)
    rows = (count * num_keys, num_heads // num_keys * length, head_dim)
    grouped = torch.mul(query, head_dim**-0.5, out=buffers.take("queries", query)).view(rows)
    width = -(-length // SOFTMAX_LANES) * SOFTMAX_LANES
    scores = buffers.take("scores", query, *rows[:2], width)
    scores[..., length:] = -torch.inf
    torch.bmm(grouped, key.flatten(0, 1).transpose(1, 2), out=scores[..., :length])
    weights = torch.softmax(scores, dim=-1, out=buffers.take("weights", scores))[..., :length]
    return (weights @ value.flatten(0, 1)).view(count, num_heads, length, head_dim).transpose(1, 2)


def _attend_by_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_lens: torch.Tensor, max_length: int | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Its kernels always took grouped queries; since torch 2.12 the caller must announce them.
    options: dict[str, Any] = {"enable_gqa": True} if Version("2.12") <= _TORCH else {}
    # (1, heads, total_tokens, head_dim) -> (total_tokens, heads, head_dim)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    cu_seq_lens = cu_seq_lens.to(torch.int32)
    longest = int(cu_seq_lens.diff().max()) if max_length is None else max_length
    output: Any = varlen_attn(q, k, v, cu_seq_lens, cu_seq_lens, longest, longest, **options)
    return output[None]


@cache
def _has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's own flash attention runs there: in half precision on NVIDIA Ampere or newer."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and dtype in (torch.float16, torch.bfloat16)
        and Version("2.10") <= _TORCH
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def packed_mask(*, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """Returns the mask of padded input, and None for packed input and for input without padding."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, packed_mask)


def pack(input_ids: Sequence[Sequence[int]], device: torch.device | str | None = None) -> dict[str, Any]:
    """
    Lays sequences end to end. Copies to a GPU come from pinned memory and do not block.

    Returns:
        what a model's forward takes: `input_ids` of shape `(1, total_tokens)`, the cu_seq_lens and max_length keywords
        of transformers, and the lengths on the host.
    """
    lengths = [len(ids) for ids in input_ids]
    stream = torch.from_numpy(np.fromiter(chain.from_iterable(input_ids), np.int64, sum(lengths)))
    return packed_batch(_to_device(stream, device)[None], lengths)


def packed_batch(input_ids: torch.Tensor, lengths: Sequence[int]) -> dict[str, Any]:
    """
    Returns what [`pack`] does.

    Args:
        input_ids (`torch.LongTensor` of shape `(1, total_tokens)`): the stream, on the model's device.
        lengths: tokens of each sequence.
    """
    starts = torch.tensor([0, *lengths], device="cpu").cumsum(0).to(torch.int32)
    starts = _to_device(starts, input_ids.device)
    return {
        "input_ids": input_ids,
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "sequence_lengths": list(lengths),
    }


def _to_device(tensor: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    if device is not None and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def pad(input_ids: Sequence[Sequence[int]], device: torch.device | str | None = None) -> dict[str, Any]:
    """
    Pads sequences on the right, for attention that cannot read a packed stream.

    Returns:
        what a model's forward takes: `input_ids` and `attention_mask` of shape `(num_sequences, longest)`. Padding has
        the id 0, which is masked and never changes a score.
    """
    rows = [torch.tensor(ids, dtype=torch.int64, device="cpu") for ids in input_ids]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def empty_logits(num_sequences: int, num_labels: int) -> torch.Tensor:
    """Returns an empty float32 tensor for logits on the CPU, independent of torch's default dtype and device."""
    return torch.empty(num_sequences, num_labels, dtype=torch.float32, device="cpu")


def batches_by_tokens(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    max_sequences: int | None = None,
    padded: bool = False,
    num_workers: int = 1,
    device_type: str = "cpu",
) -> Iterator[list[int]]:
    """
    Sorts sequences into batches, the longest first, so the first batch needs the most memory.

    Yields:
        the indices of the sequences of each batch.

    Args:
        lengths: tokens of each sequence.
        max_tokens: maximum tokens per batch; a longer sequence is a batch of its own.
        max_sequences: maximum sequences per batch; no maximum when None.
        padded: count each sequence as long as the longest one of its batch.
        device_type: where batches are computed.
        num_workers: the number of workers that take batches. For several workers, batches shrink towards the end, to
            half of a worker's share of the remaining tokens, so no worker waits long for the last batch.
    """
    batch: list[int] = []
    used, left = 0, sum(lengths)
    limit = max_tokens
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[batch[0]] if padded and batch else lengths[index]
        if batch and (used + length > limit or len(batch) == max_sequences):
            yield batch
            batch, used = [], 0
            length = lengths[index]
        if not batch and num_workers > 1:
            limit = min(max_tokens, max(SMALLEST_BATCH.get(device_type, 1024), left // (2 * num_workers)))
        batch.append(index)
        used += length
        left -= lengths[index]
    if batch:
        yield batch


def balanced_batches(
    lengths: Sequence[int],
    *,
    max_tokens: int,
    max_sequences: int | None = None,
    num_workers: int = 1,
    min_tokens: int = 1,
) -> list[list[int]]:
    """
    Sorts sequences into few batches of nearly equal tokens, the same number for each worker, so no worker waits long
    for another.

    Args:
        lengths: tokens of each sequence.
        max_tokens: maximum tokens per batch; a longer sequence is an additional batch of its own.
        max_sequences: maximum sequences per batch; no maximum when None.
        num_workers: the number of workers that take batches.
        min_tokens: minimum tokens per batch on average; for less, fewer workers get a batch.

    Returns:
        the indices of the sequences of each batch, from the longest to the shortest. The batch with the most tokens
        comes first.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    alone = [[index] for index in order if lengths[index] >= max_tokens]
    order = order[len(alone) :]
    total = sum(lengths[index] for index in order)
    count = max(-(-total // max_tokens), -(-len(order) // (max_sequences or len(lengths) or 1)))
    num_workers = max(1, min(num_workers, total // min_tokens))
    filled = _fill(order, lengths, -(-count // num_workers) * num_workers, max_tokens, max_sequences)
    if missing := -len(filled) % num_workers:
        filled = _fill(order, lengths, len(filled) + missing, max_tokens, max_sequences)
    return sorted(alone + filled, key=lambda batch: -sum(lengths[index] for index in batch))


def _fill(
    order: Sequence[int], lengths: Sequence[int], count: int, max_tokens: int, max_sequences: int | None
) -> list[list[int]]:
    """Puts each sequence into the emptiest of `count` batches, or into a new batch if that one has no room."""
    batches: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, number) for number in range(count)]
    for index in order:
        if not emptiest or emptiest[0][0] + lengths[index] > max_tokens:
            heappush(emptiest, (0, len(batches)))
            batches.append([])
        tokens, number = heappop(emptiest)
        batches[number].append(index)
        if len(batches[number]) != max_sequences:
            heappush(emptiest, (tokens + lengths[index], number))
    return [batch for batch in batches if batch]


def token_budget(device: torch.device, dtype: torch.dtype, config: Any) -> int:
    """
    Returns the number of tokens per batch that keeps a device busy.

    On a CPU a batch only has to repay reading the weights. A GPU needs many tokens, within a quarter of the memory that
    is free or that torch holds for reuse.

    Args:
        device: where the model is.
        dtype: of its weights.
        config: with `hidden_size` and `intermediate_size`.
    """
    if device.type == "cpu":
        return max(1024, min(2048, CPU_ACTIVATION // (config.intermediate_size * dtype.itemsize)))
    if device.type != "cuda":
        return 8192
    # Alive at once in a layer, in bytes per token: residual, norm, query, key, value, output; gate, up, product.
    bytes_per_token = (8 * config.hidden_size + 3 * config.intermediate_size) * max(dtype.itemsize, 2)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1024, min(65536, free // 4 // bytes_per_token))

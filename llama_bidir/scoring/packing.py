"""Padding-free batches: sequences laid end to end in one stream of tokens, which only attention takes apart."""

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

PACKED_ATTENTION = "packed_attention"

# Implementations that read the cu_seq_lens keywords, so that their input needs no padding.
PACKED_IMPLEMENTATIONS = (PACKED_ATTENTION, "flash_attention_2", "flash_attention_3")

# Tokens of a sequence up to which a CPU computes its bfloat16 attention weights at once.
MATMUL_LENGTH = 512
# Fewer tokens are not worth the start of a batch, by the type of the device.
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
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attention within each sequence of a packed stream: by `torch.nn.attention.varlen` on a GPU that has it, else by one
    scaled dot product attention a sequence. Without `cu_seq_lens_q` it is transformers' `sdpa`.

    Args:
        query (`torch.Tensor` of shape `(1, num_heads, total_tokens, head_dim)`).
        key, value (`torch.Tensor` of shape `(1, num_key_value_heads, total_tokens, head_dim)`).
        attention_mask: not used for packed input, where sequences are whole.
        cu_seq_lens_q (`torch.IntTensor` of shape `(num_sequences + 1,)`, *optional*): where each sequence starts.
        max_length_q (`int`, *optional*): tokens of the longest sequence.
        sequence_lengths (`Sequence[int]`, *optional*): the same lengths on the host, which saves a wait for the GPU.

    Returns:
        `torch.Tensor` of shape `(1, total_tokens, num_heads, head_dim)`, and None for the weights.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if torch.is_autocast_enabled(query.device.type):  # float32 rotary angles have made them float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if _has_varlen_kernel(query.device, query.dtype) and not module.is_causal and not kwargs.get("dropout"):
        return _attend_by_varlen(query, key, value, cu_seq_lens_q, max_length_q), None
    if sequence_lengths is None:
        sequence_lengths = cu_seq_lens_q.diff().tolist()
    return _attend_one_by_one(module, query, key, value, sequence_lengths, **kwargs), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph for each list of lengths
def _attend_one_by_one(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequence_lengths: Sequence[int],
    **kwargs: Any,
) -> torch.Tensor:
    outputs = []
    runs = [(length, len(list(run))) for length, run in groupby(sequence_lengths)]  # equal neighbours share a call
    # Split, not sliced: the gradient of each slice would be as long as the stream.
    parts = [states[0].split([length * count for length, count in runs], dim=1) for states in (query, key, value)]
    for (length, count), *states in zip(runs, *parts, strict=True):
        # (heads, count * length, head_dim) -> (count, heads, length, head_dim)
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in states)
        if length <= MATMUL_LENGTH and _matmul_applies(module, query, **kwargs):
            outputs.append(_attend_by_matmul(q, k, v).flatten(0, 1))
        else:
            outputs.append(sdpa_attention_forward(module, q, k, v, None, **kwargs)[0].flatten(0, 1))
    return torch.cat(outputs)[None]


def _matmul_applies(module: torch.nn.Module, query: torch.Tensor, **kwargs: Any) -> bool:
    """On a CPU, the fused kernel multiplies short bfloat16 sequences at the speed of float32."""
    return (
        query.device.type == "cpu"
        and query.dtype == torch.bfloat16
        and not module.is_causal
        and not torch.is_grad_enabled()
        and not kwargs.get("dropout")
    )


def _attend_by_matmul(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """
    Attention by two matrix products, those query heads together that share a key.

    Args:
        query (`torch.Tensor` of shape `(count, num_heads, length, head_dim)`).
        key, value (`torch.Tensor` of shape `(count, num_key_value_heads, length, head_dim)`).

    Returns:
        `torch.Tensor` of shape `(count, length, num_heads, head_dim)`.
    """
    count, num_heads, length, head_dim = query.shape
    num_keys = key.shape[1]
    grouped = (query * head_dim**-0.5).reshape(count, num_keys, num_heads // num_keys * length, head_dim)
    weights = (grouped @ key.transpose(-1, -2)).softmax(dim=-1)
    return (weights @ value).view(count, num_heads, length, head_dim).transpose(1, 2)


def _attend_by_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_lens: torch.Tensor, max_length: int | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Grouped queries are what its kernels always took; from 2.12 on they must be announced.
    options: dict[str, Any] = {"enable_gqa": True} if Version("2.12") <= _TORCH else {}
    # (1, heads, total_tokens, head_dim) -> (total_tokens, heads, head_dim)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    cu_seq_lens = cu_seq_lens.to(torch.int32)
    longest = int(cu_seq_lens.diff().max()) if max_length is None else max_length
    output: Any = varlen_attn(q, k, v, cu_seq_lens, cu_seq_lens, longest, longest, **options)
    return output[None]


@cache
def _has_varlen_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the flash attention that torch brings runs there: half precision on NVIDIA's Ampere or newer."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and dtype in (torch.float16, torch.bfloat16)
        and Version("2.10") <= _TORCH
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def packed_mask(*, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """The mask of padded input; packed input and input without padding need none."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, packed_mask)


def pack(input_ids: Sequence[Sequence[int]], device: torch.device | str | None = None) -> dict[str, Any]:
    """
    Lays sequences end to end. Copies to a GPU are pinned and do not wait.

    Returns:
        what a model's forward takes: `input_ids` of shape `(1, total_tokens)`, the cu_seq_lens and max_length keywords
        of transformers, and the lengths on the host.
    """
    lengths = [len(ids) for ids in input_ids]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    stream = torch.from_numpy(np.fromiter(chain.from_iterable(input_ids), np.int64, sum(lengths)))
    if device is not None and torch.device(device).type == "cuda":
        starts, stream = (tensor.pin_memory().to(device, non_blocking=True) for tensor in (starts, stream))
    else:
        starts, stream = starts.to(device), stream.to(device)
    return {
        "input_ids": stream[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "sequence_lengths": lengths,
    }


def pad(input_ids: Sequence[Sequence[int]], device: torch.device | str | None = None) -> dict[str, Any]:
    """
    Lays sequences one below the other, padded on the right, for attention that cannot read a packed stream.

    Returns:
        what a model's forward takes: `input_ids` and `attention_mask` of shape `(num_sequences, longest)`. The id of
        the padding is 0: it is masked, so that any would do.
    """
    rows = [torch.tensor(ids) for ids in input_ids]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


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
    Indices of sequences in batches, the longest first, so that the first batch needs the most memory.

    Args:
        lengths: tokens of each sequence.
        max_tokens: of a batch; a longer sequence is a batch of its own.
        max_sequences: of a batch, where given.
        padded: count each sequence as long as the longest of its batch.
        device_type: where batches are computed.
        num_workers: how many take batches at the same time. Where there are several, batches shrink towards the end, to
            half of a worker's share of what is left, so that none has to wait long for the last one.
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
    Indices of sequences in about as few batches as hold them, as many for each worker, all of about as many tokens: no
    worker waits long for another.

    Args:
        lengths: tokens of each sequence.
        max_tokens: of a batch; a longer sequence is a batch of its own, and not counted for the workers.
        max_sequences: of a batch, where given.
        num_workers: how many take batches at the same time.
        min_tokens: of a batch on average, below which fewer workers have one.

    Returns:
        the batches, those with the most tokens first; sequences of a batch from the longest to the shortest.
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
    """Puts each sequence into the emptiest of `count` batches, or into a new one where that has no room."""
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
    Tokens of a batch that keep a device busy.

    On a CPU a batch repays reading the weights, and needs no more. A GPU wants many tokens, within a quarter of the
    memory that is free or held by torch for reuse.

    Args:
        device: where the model is.
        dtype: of its weights.
        config: with `hidden_size` and `intermediate_size`.
    """
    if device.type == "cpu":
        return max(1024, min(2048, CPU_ACTIVATION // (config.intermediate_size * dtype.itemsize)))
    if device.type != "cuda":
        return 8192
    # What is alive at once in a layer, in bytes a token: residual, norm, query, key, value, output; gate, up, product.
    bytes_per_token = (8 * config.hidden_size + 3 * config.intermediate_size) * max(dtype.itemsize, 2)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1024, min(65536, free // 4 // bytes_per_token))

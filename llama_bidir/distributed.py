"""Scoring under torchrun or `accelerate launch`: each process scores its share, and all get all scores."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import chain
from operator import add
from typing import Any

import torch
import torch.distributed as dist

from .loading import local_rank
from .scoring import Pair, Scorer, split_into_chunks


def is_shared() -> bool:
    """Whether several processes were launched together; joins them when nothing else has."""
    if not dist.is_available():
        return False
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return False
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return dist.get_world_size() > 1


def share_of(pairs: Sequence[Pair], rank: int, world_size: int) -> list[int]:
    """
    Indices of the pairs that one process scores. Lengths in characters, which need no tokenizer, are dealt out there
    and back from the longest on, so that each process gets about the same number of tokens.
    """
    order = sorted(range(len(pairs)), key=lambda index: -sum(map(len, pairs[index])))
    there_and_back = [*range(world_size), *reversed(range(world_size))]
    return [index for turn, index in enumerate(order) if there_and_back[turn % (2 * world_size)] == rank]


def score_shared(pairs: Iterable[Pair], scorer: Scorer) -> torch.Tensor:
    """
    Args:
        pairs: the same in every process.
        scorer: scores the share of this process; counts in its tally the pairs of all.

    Returns:
        float32 logits of shape `(num_pairs, num_labels)` on the CPU, of all pairs, in every process.

    Raises:
        ValueError: the processes hold different pairs.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    logits = [torch.empty(0, scorer.num_labels)]
    for chunk in chain(split_into_chunks(pairs, scorer.engine.chunk_pairs * world_size), [None]):
        if len(set(_gather(_digest(chunk)))) > 1:
            raise ValueError(
                "under torchrun or accelerate every process must score the same pairs, of which it computes a share, "
                f"but process {rank} holds others: pass the same pairs everywhere, or CrossEncoder(..., "
                "distributed=False) to let each process score for itself"
            )
        if chunk is None:
            break
        mine = scorer.score([chunk[index] for index in share_of(chunk, rank, world_size)])
        whole = torch.empty(len(chunk), scorer.num_labels)
        for other, part in enumerate(_gather(mine)):
            whole[share_of(chunk, other, world_size)] = part
        logits.append(whole)
    scorer.tally = reduce(add, _gather(scorer.tally))
    return torch.cat(logits)


def _digest(chunk: Iterable[Pair] | None) -> str | None:
    if chunk is None:
        return None
    digest = hashlib.sha256()
    for query, passage in chunk:
        digest.update(f"{len(query)} {len(passage)} {query}{passage}".encode())
    return digest.hexdigest()


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values

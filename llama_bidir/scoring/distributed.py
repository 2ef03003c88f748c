"""Scoring under torchrun or `accelerate launch`: each process scores a share, and every process gets all scores."""

import atexit
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial, reduce
from operator import add
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..prompts import Pair
from ..utils.launch import launch_number, leave_process_group
from ..utils.sharing import deal
from .packing import empty_logits
from .pipeline import Scorer, Tally, distinct, split_into_chunks

Result = TypeVar("Result")


# Per process, so the next chunk is tokenized while one is computed.
CHUNKS_AT_ONCE = 4
# How long a process waits for the others, unless the process group was created elsewhere with another timeout.
TIMEOUT = timedelta(minutes=30)


def is_shared(device: torch.device) -> bool:
    """Whether several processes were launched together. Joins them; this one has its model on `device`."""
    if not dist.is_available():
        return False
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched() or launch_number("WORLD_SIZE", 1) == 1:
            return False
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with _waiting(launch_number("RANK", 0), TIMEOUT):
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        atexit.register(leave_process_group)
    return dist.get_world_size() > 1


def score_shared(pairs: Iterable[Pair], scorer: Scorer) -> torch.Tensor:
    """
    Args:
        pairs: the pairs, which must be the same in every process.
        scorer: scores the share of this process. In the first process it shows the bar and counts all pairs.

    Returns:
        the scores of all pairs, in every process, as [`Scorer.score`] returns them.

    Raises:
        ValueError: the processes hold different pairs.
        RuntimeError: another process failed, with its error, or did not make the same call within the timeout of the
            process group.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    scorer.progress.disable = scorer.progress.disable or rank > 0
    chunks = split_into_chunks(pairs, scorer.engine.chunk_pairs * CHUNKS_AT_ONCE * world_size)
    logits = [empty_logits(0, scorer.num_labels)]
    num_done = 0
    while True:
        chunk = _together(lambda: next(chunks, None))
        if len(set(_gather(_digest(chunk, scorer.encoder.instruction)))) > 1:
            raise ValueError(
                "with distributed=True every process must score the same pairs with the same instruction and computes "
                f"a share of them, but process {rank} holds different ones: pass the same everywhere, or "
                "CrossEncoder(..., distributed=False) to let each process score for itself"
            )
        if chunk is None:
            break
        unique, positions = distinct(chunk)
        # By characters, which need no tokenizer.
        shares = deal([len(pair[0]) + len(pair[1]) for pair in unique], world_size)
        mine = _together(partial(scorer.logits, [unique[index] for index in shares[rank]]))
        scores = empty_logits(len(unique), scorer.num_labels)
        for share, part in zip(shares, _gather(mine), strict=True):
            scores[share] = part
        logits.append(scores[positions])
        num_done += len(chunk)
        scorer.progress.update(num_done - scorer.progress.n)
    tallies = _gather(scorer.tally)
    scorer.tally = reduce(add, tallies) if rank == 0 else Tally()
    return scorer.activate(torch.cat(logits))


def _together(function: Callable[[], Result]) -> Result:
    """Calls a function in every process. If it fails in one, all raise, so no process waits for another."""
    try:
        result, error = function(), None
    except Exception as raised:
        error = raised
    errors = _gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, message in enumerate(errors):
        if message is not None:
            raise RuntimeError(f"process {rank} failed: {message}")
    return result


def _digest(chunk: Iterable[Pair] | None, instruction: str | None) -> str | None:
    if chunk is None:
        return None
    digest = hashlib.sha256(repr(instruction).encode())
    for query, passage, *_ in chunk:
        digest.update(f"{len(query)} {len(passage)} {query}{passage}".encode())
    return digest.hexdigest()


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    timeout = _timeout()
    with _waiting(dist.get_rank(), timeout):
        dist.all_gather_object(values, value, group=_own_group(dist.group.WORLD, timeout))
    return values


def _timeout() -> timedelta:
    """Returns how long the processes wait for each other: the timeout of the existing process group."""
    group: Any = dist.group.WORLD
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    timeout: timedelta = getattr(options, "_timeout", TIMEOUT)
    return timeout


@cache
def _own_group(world: Any, timeout: timedelta) -> Any:
    """
    Returns a process group that is used only for scores, so that they never mix with other communication. It uses
    gloo on the CPU, where a timeout raises an error. A timeout of NCCL would end the process.
    """
    # With local synchronization, a process that arrives alone does not change the names of later groups.
    return dist.new_group(backend="gloo", timeout=timeout, use_local_synchronization=True)


@contextmanager
def _waiting(rank: int, timeout: timedelta) -> Iterator[None]:
    """Explains the error if the other processes do not make the same call."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"process {rank} waited for the other processes, but one of them ended or did not make the same call "
            f"within {timeout}: with distributed=True every process must make the same calls. Make this call in all of "
            f"them, or leave distributed=True out to let each score for itself ({str(error).splitlines()[0]})"
        ) from error

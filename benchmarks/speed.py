"""Loads implementations, lets them take turns on a workload, and compares their speed and their scores."""

import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from .implementations import DTYPES, FLOATS, IMPLEMENTATIONS, OURS
from .machine import is_cuda, matmul_speed, peak_above, timed
from .models import model_flops
from .peers import OTHER_FUNCTION, SENTENCE_TRANSFORMERS, Scorer, forward_of, padded_scores, render, share_weights
from .workloads import Pair, Workload, make_collection, spread

Row = dict[str, Any]
# An implementation and a dtype.
Name = tuple[str, str]

# Enough pairs to find an error, and few enough for a float32 pass of a large model on a CPU.
CHECKED_PAIRS = 128
# Pairs on which the batch sizes of an implementation compete.
SAMPLE_PAIRS = {"cpu": 64, "cuda": 1024}


def load_scorers(
    names: Sequence[Name], folder: str, *, device: str, max_length: int, skip: Callable[[Name, str], None]
) -> dict[Name, Scorer]:
    """
    Loads implementations, shares their weights, and scores a few pairs with each.

    Args:
        names: the implementations, each with a dtype.
        folder: the checkpoint.
        device: where they compute.
        max_length: maximum tokens of a rendered pair.
        skip: called with a name and a reason for each implementation that cannot be loaded.
    """
    warm_up = make_collection(num_queries=4, num_passages=4, depth=1).pairs(4)
    scorers: dict[Name, Scorer] = {}
    for name, dtype in names:
        try:
            scorer = IMPLEMENTATIONS[name].load(folder, dtype=dtype, device=device, max_length=max_length)
            for other in scorers.values():
                if scorer.model is not None and other.model is not None:
                    share_weights(other.model, scorer.model)
            scorer.score(warm_up, None if not scorer.batch_sizes else scorer.batch_sizes[0])
        except Exception as error:
            # Any error of a peer is a reason to continue without it.
            skip((name, dtype), f"{type(error).__name__}: {error}")
        else:
            scorers[name, dtype] = scorer
    return scorers


def print_skipped(name: Name, reason: str) -> None:
    """Prints why an implementation is left out."""
    print(f"{' '.join(name)} is skipped: {reason}", flush=True)


def checked_pairs(num_pairs: int) -> list[int]:
    """Returns the indices of the pairs to compare."""
    return spread(list(range(num_pairs)), CHECKED_PAIRS)


def expected_scores(folder: str, workloads: Sequence[Workload], device: str) -> dict[str, np.ndarray]:
    """Scores the checked pairs of each workload with this package's model, in float32 and padded batches of 4."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32").to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        workload.name: padded_scores(
            forward_of(model),
            tokenizer,
            [workload.pairs[index] for index in checked_pairs(len(workload.pairs))],
            max_length=workload.max_length,
            batch_size=4,
        )
        for workload in workloads
    }


def time_workload(
    scorers: dict[Name, Scorer],
    workload: Workload,
    *,
    folder: str,
    expected: np.ndarray,
    rounds: int,
    device: str,
    skip: Callable[[Name, str], None],
) -> list[Row]:
    """
    Times each implementation in turn, and the matrix product of each floating-point dtype after each round. One that
    fails is skipped.

    Returns:
        One row per implementation and dtype. `seconds` is the best round, with the batch size that was fastest on a
        sample. `error` is the [`relative_error`] of the checked pairs. `peak_share` is `model_flops` per second divided
        by the best `matmul_speed` of the dtype over the rounds. On CUDA, `above_bytes` is the peak of the allocated
        memory above what was allocated before the call. [`compare`] has added the ratios.
    """
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [render(*pair) for pair in workload.pairs]
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=workload.max_length)["input_ids"]]
    seconds: dict[Name, list[float]] = {name: [] for name in scorers}
    peaks = {dtype: 0.0 for _, dtype in scorers if dtype in FLOATS}
    sizes: dict[Name, int | None] = {}
    scores, above = {}, {}
    for _ in range(rounds):
        for name in list(seconds):
            scorer = scorers[name]
            try:
                if name not in sizes:
                    sizes[name] = fastest_size(scorer, workload.pairs, device)
                call = partial(scorer.score, workload.pairs, sizes[name])
                above[name], (elapsed, scores[name]) = peak_above(partial(timed, call, device), device)
            except Exception as error:
                skip(name, f"{type(error).__name__}: {error}")
                del seconds[name]
            else:
                seconds[name].append(elapsed)
        peaks = {dtype: max(peak, matmul_speed(config, dtype, device)) for dtype, peak in peaks.items()}
    checked, flops = checked_pairs(len(workload.pairs)), model_flops(config, lengths)
    rows = []
    for name, times in seconds.items():
        implementation, dtype = name
        best = min(times)
        row = {
            "dtype": dtype,
            "workload": workload.name,
            "implementation": implementation,
            "setting": scorers[name].setting.format(sizes[name]),
            "batch_size": sizes[name],
            "pairs": len(workload.pairs),
            "tokens": sum(lengths),
            "max_length": workload.max_length,
            "seconds": best,
            "seconds_of_rounds": times,
            "pairs_per_second": len(workload.pairs) / best,
            "median_pairs_per_second": len(workload.pairs) / statistics.median(times),
            "tokens_per_second": sum(lengths) / best,
            "error": None if implementation == OTHER_FUNCTION else relative_error(scores[name][checked], expected),
            "above_bytes": above[name] if is_cuda(device) else None,
            "flops": flops,
            "matmul_flops_per_second": peaks.get(dtype),
            "peak_share": flops / best / peaks[dtype] if dtype in peaks else None,
        }
        rows.append(row)
    return compare(rows)


def fastest_size(scorer: Scorer, pairs: Sequence[Pair], device: str) -> int | None:
    """Returns the batch size that scores a sample fastest, or None if the implementation chooses the batches."""
    # Larger sizes than the number of pairs all give the same batch.
    sizes = [size for size in scorer.batch_sizes if size <= len(pairs)] or list(scorer.batch_sizes[:1])
    if len(sizes) < 2:
        return sizes[0] if sizes else None
    sample = spread(list(pairs), SAMPLE_PAIRS["cuda" if is_cuda(device) else "cpu"])
    seconds = {}
    for size in sizes:
        # A batch that is too large for the memory is not a candidate.
        with suppress(torch.OutOfMemoryError):
            seconds[size] = timed(partial(scorer.score, sample, size), device)[0]
    return min(seconds, key=seconds.__getitem__, default=sizes[0])


def relative_error(scores: np.ndarray, expected: np.ndarray) -> float:
    """Returns the root mean square of the differences, divided by the standard deviation of the expected scores."""
    return float(np.sqrt(np.square(scores - expected).mean()) / expected.std())


def compare(rows: list[Row]) -> list[Row]:
    """
    Adds the ratios between the rows of one workload.

    - `ratio` and `median_ratio`: pairs/s relative to sentence-transformers with its defaults, in the same dtype or, if
      it does not have that dtype, in the first dtype that it has.
    - `peer`, `peer_ratio` and `median_peer_ratio`: the fastest other implementation of the same or a higher precision
      (see `DTYPES`, from the highest on), and pairs/s relative to it. A peer is compared with other peers.

    `ratio` and `peer_ratio` compare the best rounds. The others are the median over the rounds, if the rows have the
    same date: they were then measured in the same rounds.
    """
    defaults = [row for row in rows if row["implementation"] == SENTENCE_TRANSFORMERS]
    compared = []
    for row in rows:
        baseline = next((other for other in defaults if other["dtype"] == row["dtype"]), next(iter(defaults), None))
        precision = DTYPES.index(row["dtype"])
        peers = [
            other
            for other in rows
            if other["implementation"] not in (OURS, OTHER_FUNCTION, row["implementation"])
            and DTYPES.index(other["dtype"]) <= precision
        ]
        peer = min(peers, key=lambda other: other["seconds"], default=None)
        name = f"{peer['implementation']} {peer['dtype']}" if peer else None
        compared.append(
            {**row, **_ratios("ratio", row, baseline), "peer": name, **_ratios("peer_ratio", row, peer)},
        )
    return compared


def _ratios(name: str, row: Row, other: Row | None) -> dict[str, float | None]:
    if other is None:
        return {name: None, f"median_{name}": None}
    rounds = zip(row["seconds_of_rounds"], other["seconds_of_rounds"], strict=False)
    # Rows that have just been measured have no date yet.
    are_together = row.get("date") == other.get("date")
    median = statistics.median(theirs / ours for ours, theirs in rounds) if are_together else None
    return {name: other["seconds"] / row["seconds"], f"median_{name}": median}

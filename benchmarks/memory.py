"""Measures peak memory. Each task runs in a separate `python -m benchmarks.memory`, which reads it from stdin."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from llama_bidir import CrossEncoder

from .implementations import IMPLEMENTATIONS
from .machine import peak_above, peak_memory, timed
from .workloads import Pair


def run_alone(task: dict[str, Any]) -> dict[str, Any]:
    """
    Runs a memory task in a new process.

    Args:
        task: `folder`, `dtype`, `device`, and either `implementation`, `max_length` and `pairs`, or `num_pairs` for a
            generator of pairs.

    Returns:
        `loaded_bytes` and `peak_bytes` (peak memory before and after scoring), `seconds` of scoring, `above_bytes`, and
        for an implementation its `setting` and `batch_size`. `above_bytes` is the peak of scoring above the memory in
        use before. Four short pairs are scored before that, so that a memory-mapped file of weights has been read.

    Raises:
        RuntimeError: the process failed. The message is the last line that it wrote.
    """
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TQDM_DISABLE": "1"},
        input=json.dumps(task),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Measures a task in this process. Returns what [`run_alone`] returns."""
    device, options = task["device"], {"dtype": task["dtype"], "device": task["device"]}
    row: dict[str, Any] = {}
    if "num_pairs" in task:
        encoder = CrossEncoder(task["folder"], **options)
        row["loaded_bytes"] = peak_memory(device)
        encoder.predict(list(generate_pairs(4)))
        call = partial(encoder.predict, generate_pairs(task["num_pairs"]))
    else:
        load = IMPLEMENTATIONS[task["implementation"]].load
        scorer = load(task["folder"], max_length=task["max_length"], **options)
        row["loaded_bytes"] = peak_memory(device)
        size = next(iter(scorer.batch_sizes), None)
        scorer.score(list(generate_pairs(4)), size)
        row |= {"setting": scorer.setting.format(size), "batch_size": size}
        call = partial(scorer.score, [(query, passage) for query, passage in task["pairs"]], size)
    above, (seconds, _) = peak_above(partial(timed, call, device), device)
    return {
        **row,
        "peak_bytes": max(row["loaded_bytes"], peak_memory(device)),
        "above_bytes": above,
        "seconds": seconds,
    }


def generate_pairs(count: int) -> Iterator[Pair]:
    """Yields short pairs, one at a time."""
    for index in range(count):
        yield f"who wrote book {index}", f"book {index} was written by author {index % 977}"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    print(json.dumps(measure(json.load(sys.stdin))))

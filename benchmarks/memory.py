"""Measures peak memory. Each task runs in a separate `python -m benchmarks.memory`, which reads it from stdin."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

from llama_bidir import CrossEncoder

from .machine import peak_memory, timed
from .peers import LOADERS
from .workloads import Pair


def run_alone(task: dict[str, Any]) -> dict[str, Any]:
    """
    Runs a memory task in a new process.

    Args:
        task: `folder`, `dtype`, `device`, and either `implementation`, `max_length` and `pairs`, or `num_pairs` for a
            generator of pairs.

    Returns:
        `loaded_bytes` and `peak_bytes` (peak memory before and after scoring) and `seconds` of scoring.

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
    options = {"dtype": task["dtype"], "device": task["device"]}
    if "num_pairs" in task:
        score = CrossEncoder(task["folder"], **options).predict
        pairs: Any = generate_pairs(task["num_pairs"])
    else:
        scorer = LOADERS[task["implementation"]](task["folder"], max_length=task["max_length"], **options)
        score, pairs = scorer.score, [(query, passage) for query, passage in task["pairs"]]
    loaded = peak_memory(task["device"])
    seconds, _ = timed(lambda: score(pairs), task["device"])
    return {"loaded_bytes": loaded, "peak_bytes": peak_memory(task["device"]), "seconds": seconds}


def generate_pairs(count: int) -> Iterator[Pair]:
    """Yields short pairs, one at a time."""
    for index in range(count):
        yield f"who wrote book {index}", f"book {index} was written by author {index % 977}"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    print(json.dumps(measure(json.load(sys.stdin))))

"""Peak memory, each measured in a process of its own: `python -m benchmarks.memory` does one task given on stdin."""

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
    Does a task of this module in a new process.

    Args:
        task: `folder`, `dtype` and `device`, and either `implementation`, `max_length` and `pairs`, or `num_pairs` of
            a stream.

    Returns:
        `loaded_bytes` and `peak_bytes` (the peaks before and after scoring) and `seconds` of scoring.

    Raises:
        RuntimeError: the process failed; the message is the last line that it wrote.
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
    """What `run_alone` returns, measured in this process."""
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
    """Short pairs that exist one at a time."""
    for index in range(count):
        yield f"who wrote book {index}", f"book {index} was written by author {index % 977}"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    print(json.dumps(measure(json.load(sys.stdin))))

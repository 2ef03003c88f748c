"""Measures scoring and training alone and beside busy processes, as OpenMP's threads wait by default and in a command.

    python -m benchmarks.loaded --checkpoint HuggingFaceTB/SmolLM2-135M-Instruct --json loaded-cpu.json

Run it from the root of the repository, on an idle machine, after `pip install -e ".[train]"`. OpenMP reads the policy
when torch is imported, so each round has one process per policy. The process measures a piece of work alone and then
beside processes that do nothing but compute. The policies take turns at the start of a round. The best round of each
counts. Everything runs on a CPU, with made-up text and float32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from llama_bidir import CrossEncoder
from llama_bidir.utils.launch import PASSIVE, WAIT_VARIABLES

from .machine import describe_machine, timed
from .models import SHAPES, write_checkpoint
from .report import Columns, print_rows
from .trainers import PACKED, Group, Task, train
from .workloads import Collection, make_collection

# "command" is what the command line sets.
POLICIES: dict[str, dict[str, str]] = {"default": {}, "command": PASSIVE}
UNITS = {"scoring": "pairs", "single pairs": "pairs", "training": "steps"}
GROUPS, GROUP_SIZE = 4, 8

COLUMNS: Columns = {
    "work": lambda row: row["work"],
    "policy": lambda row: row["policy"],
    "unit": lambda row: f"{row['unit']}/s",
    "alone": lambda row: f"{row['alone_per_second']:.2f}",
    "busy": lambda row: f"{row['busy_per_second']:.2f}",
    "alone / busy": lambda row: f"{row['slowdown']:.2f}",
    "alone vs default": lambda row: f"{row['alone_vs_default']:.3f}",
    "median alone vs default": lambda row: f"{row['median_alone_vs_default']:.3f}",
    "busy vs default": lambda row: f"{row['busy_vs_default']:.2f}",
    "median busy vs default": lambda row: f"{row['median_busy_vs_default']:.2f}",
}


class Job(NamedTuple):
    """What a process measures: `repeats` times, alone and beside `busy` processes."""

    folder: str
    pairs: int
    steps: int
    busy: int
    repeats: int


class Speed(NamedTuple):
    """Units per second of a piece of work in the best repeat, alone and beside busy processes."""

    alone: float
    busy: float


Round = Mapping[str, Speed]


def main() -> None:
    """Measures, prints and saves what the command line asks for."""
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    machine = describe_machine("cpu")
    print(json.dumps(machine))
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(args.model, args.checkpoint, folder)
        job = Job(folder, args.pairs, args.steps, args.busy, args.repeats)
        rounds = measure(job, args.rounds, args.threads)
    results = summarize(rounds)
    print_rows(results, COLUMNS, header=True)
    if args.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        report = {
            "machine": machine,
            "settings": settings,
            "results": results,
            "rounds": {
                policy: [{work: speed._asdict() for work, speed in round_.items()} for round_ in of_policy]
                for policy, of_policy in rounds.items()
            },
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loaded", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="folder or Hub id of a plain Llama: tokenizer and sizes")
    parser.add_argument("--model", choices=SHAPES, default="10m", help="shape of the model (default: 10m)")
    parser.add_argument("--pairs", type=int, default=100, help="pairs of one query to score (default: 100)")
    parser.add_argument("--steps", type=int, default=6, help="timed training steps, after one more (default: 6)")
    parser.add_argument("--busy", type=int, default=2, help="number of busy processes (default: 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch's threads (default: one per core)")
    parser.add_argument("--repeats", type=int, default=2, help="measurements per process; the best counts (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="processes per policy; the best counts (default: 3)")
    parser.add_argument("--json", type=Path, help="file for all measurements")
    return parser.parse_args()


def measure(job: Job, rounds: int, threads: int) -> dict[str, list[Round]]:
    """Runs the job with each policy in turn, in a new process each time."""
    names = list(POLICIES)
    speeds: dict[str, list[Round]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            variables = POLICIES[name] | {"OMP_NUM_THREADS": str(threads)}
            with environment(variables), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                speed = process.submit(run, job).result()
            speeds[name].append(speed)
            shown = ", ".join(f"{work} {alone:.2f} and {busy:.2f}" for work, (alone, busy) in speed.items())
            print(f"round {number + 1}, {name}, alone and busy: {shown}", flush=True)
    return speeds


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables, and unsets all others that say how threads wait, for the processes that start meanwhile."""
    before = dict(os.environ)
    for name in WAIT_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run(job: Job) -> Round:
    """Measures every piece of work, in this process."""
    transformers.logging.set_verbosity_error()
    collection = make_collection(num_queries=(job.steps + 2) * GROUPS)
    pairs = collection.pairs(1)[: job.pairs]
    encoder = CrossEncoder(job.folder, device="cpu", dtype="float32")
    encoder.predict(pairs[:20])
    single = pairs[: max(1, job.pairs // 5)]
    works: dict[str, Callable[[], float]] = {
        "scoring": lambda: len(pairs) / timed(lambda: encoder.predict(pairs), "cpu")[0],
        "single pairs": lambda: len(single) / timed(lambda: [encoder.predict([pair]) for pair in single], "cpu")[0],
        "training": lambda: job.steps / train(PACKED, make_task(job, collection)).seconds,
    }
    speeds: dict[str, list[Speed]] = {name: [] for name in works}
    for _ in range(job.repeats):
        for name, work in works.items():
            alone = work()
            with busy_processes(job.busy):
                speeds[name].append(Speed(alone, work()))
    return {name: Speed(*map(max, zip(*measured, strict=True))) for name, measured in speeds.items()}


def make_task(job: Job, collection: Collection) -> Task:
    """Returns a training task. It has one batch more than is trained, because the next one is built meanwhile."""
    groups = [
        Group(text, collection.passages(query_id)[:GROUP_SIZE], []) for query_id, text in collection.queries.items()
    ]
    batches = [groups[start : start + GROUPS] for start in range(0, len(groups), GROUPS)]
    return Task(job.folder, batches, job.steps, max_length=512, dtype="float32")


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Runs processes that each keep one core busy."""
    processes = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        time.sleep(0.3)  # until they run
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def summarize(rounds: Mapping[str, list[Round]]) -> list[dict[str, Any]]:
    """
    Returns one row per piece of work and policy: the speed in the best round, and ratios.

    `slowdown` is the speed alone divided by the speed beside busy processes. Ratios to the default policy compare the
    best rounds. Their medians are those of the ratios within each round, which a drift of the machine hardly changes.
    """
    results = []
    for work, unit in UNITS.items():
        speeds = {policy: [round_[work] for round_ in of_policy] for policy, of_policy in rounds.items()}
        best = {policy: Speed(*map(max, zip(*of_policy, strict=True))) for policy, of_policy in speeds.items()}
        for policy, of_policy in speeds.items():
            row = {
                "work": work,
                "policy": policy,
                "unit": unit,
                "alone_per_second": best[policy].alone,
                "busy_per_second": best[policy].busy,
                "slowdown": best[policy].alone / best[policy].busy,
            }
            for field in Speed._fields:
                ratios = [
                    getattr(ours, field) / getattr(theirs, field)
                    for ours, theirs in zip(of_policy, speeds["default"], strict=True)
                ]
                row[f"{field}_vs_default"] = getattr(best[policy], field) / getattr(best["default"], field)
                row[f"median_{field}_vs_default"] = statistics.median(ratios)
            results.append(row)
    return results


if __name__ == "__main__":
    main()

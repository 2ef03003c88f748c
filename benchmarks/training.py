"""Measures groups trained per second: packed and padded batches of this package, and sentence-transformers, in one run.

    python -m benchmarks.training --checkpoint HuggingFaceTB/SmolLM2-135M-Instruct --rows squad-train.jsonl.gz \\
        --json training.json

Run it from the root of the repository, after `pip install -e ".[train]" -r benchmarks/requirements.txt`. All
implementations train the first `--layers` layers of the checkpoint on the same groups in the same order, on a CPU, with
RankNet and the same optimizer. Each run has a separate process. The implementations take turns, and the best round of
each counts. sentence-transformers runs in two ways: it forwards as many pairs at a time as a batch has queries, or a
whole batch at a time. A plain loop trains NeMo AutoModel's class, if that is installed. The fastest of these three is
the peer that the others are compared with. Equal losses at each step show that all do the same work.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llama_bidir import CrossEncoder, LlamaBidirectionalForSequenceClassification

from .groups import choose_batches
from .machine import describe_machine
from .models import SEED, drop_chat_template, spread_scores
from .peers import SENTENCE_TRANSFORMERS
from .report import Columns, Row, number, print_rows
from .trainers import (
    IMPLEMENTATIONS,
    PADDED,
    PEERS,
    PLAIN_LOOP,
    UNPADDED,
    WHOLE_BATCH,
    Run,
    Task,
    describe,
    train,
)

COLUMNS: Columns = {
    "implementation": lambda row: row["implementation"],
    "groups/s": number("groups_per_second", "{:.3f}"),
    "median": number("median_groups_per_second", "{:.3f}"),
    "tokens/s": number("tokens_per_second", "{:,.0f}"),
    "padding": number("padding", "{:.1%}"),
    "loaded MiB": number("loaded_bytes", "{:,.0f}", 2**-20),
    "peak MiB": number("peak_bytes", "{:,.0f}", 2**-20),
    "vs padded": number("ratio_to_padded", "{:.2f}"),
    "median vs padded": number("median_ratio_to_padded", "{:.2f}"),
    "vs peer": number("ratio_to_peer", "{:.2f}"),
    "median vs peer": number("median_ratio_to_peer", "{:.2f}"),
    "setting": lambda row: row["setting"],
}
# Without flash attention, sentence-transformers pads. On a CPU it has none.
ON_CPU = [name for name in IMPLEMENTATIONS if name != UNPADDED]


def main() -> None:
    """Measures, prints and saves what the command line asks for."""
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    machine = describe_machine("cpu")
    print(json.dumps(machine))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_base(args.checkpoint, folder, layers=args.layers, max_length=args.max_length)
        batches, rows = choose_batches(
            args.rows,
            tokenizer,
            steps=args.steps,
            groups=args.groups,
            group_size=args.group_size,
            max_length=args.max_length,
        )
        print(json.dumps(rows))
        task = Task(folder, batches, args.steps, args.max_length, args.dtype)
        runs = measure(task, args.rounds)
    results = summarize(runs, task)
    print_rows(results, COLUMNS, header=True)
    difference = print_losses(runs)
    if args.json:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        report = {
            "machine": machine,
            "settings": settings,
            "rows": rows,
            "results": results,
            "largest_loss_difference": difference,
            "rounds": {name: [run._asdict() for run in rounds] for name, rounds in runs.items()},
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="folder or Hub id of a plain Llama")
    parser.add_argument("--rows", type=Path, required=True, help="rows to train on (.jsonl or .jsonl.gz)")
    parser.add_argument(
        "--layers", type=int, default=4, help="how many of the first layers to keep; 0 keeps all (default: 4)"
    )
    parser.add_argument("--steps", type=int, default=6, help="timed steps, after one that is not timed (default: 6)")
    parser.add_argument("--groups", type=int, default=4, help="queries per step (default: 4)")
    parser.add_argument("--group-size", type=int, default=8, help="passages per query (default: 8)")
    parser.add_argument("--max-length", type=int, default=512, help="maximum tokens of a rendered pair (default: 512)")
    parser.add_argument("--rounds", type=int, default=3, help="the best one counts (default: 3)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="dtype of the computation; weights are float32 (default: float32)",
    )
    parser.add_argument("--json", type=Path, help="file for all measurements")
    return parser.parse_args()


def write_base(checkpoint: str, folder: str, *, layers: int, max_length: int) -> PreTrainedTokenizerBase:
    """Saves the first layers (0: all) and a seeded head in float32. Returns the saved tokenizer."""
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    kept = {"num_hidden_layers": layers} if layers else {}
    model = LlamaBidirectionalForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32, **kept)
    encoder = CrossEncoder(model.eval(), tokenizer, device="cpu", max_length=max_length)
    model.config.pad_token_id = tokenizer.pad_token_id
    spread_scores(model, tokenizer)
    encoder.save_pretrained(folder)
    drop_chat_template(folder)
    return tokenizer


def measure(task: Task, rounds: int) -> dict[str, list[Run]]:
    """Trains with each implementation in turn. Each round starts with a different implementation."""
    names = list(ON_CPU)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for round_number in range(rounds):
        start = round_number % len(ON_CPU)
        for name in ON_CPU[start:] + ON_CPU[:start]:
            if name not in names:
                continue
            try:
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                    run = process.submit(train, name, task).result()
            except ImportError as error:
                print(f"{name} is skipped: {error}")
                names.remove(name)
                continue
            runs[name].append(run)
            print(f"round {round_number + 1}: {name} took {run.seconds:.2f} s for {task.steps} steps", flush=True)
    return {name: runs[name] for name in names}


def summarize(runs: dict[str, list[Run]], task: Task) -> list[dict[str, Any]]:
    """
    Returns the rows of the table, one per implementation.

    A row has the speed of the best and of the median round, the share of padding among the tokens of the timed steps,
    and the peak memory. It also has the ratios of the speed to this package's padded batches and to the fastest peer,
    where those were measured: between the best rounds, and as the median of the ratios within each round.

    Args:
        runs: the runs of each implementation, one per round.
        task: the task that was trained.
    """
    timed = task.batches[1 : task.steps + 1]
    lengths = [[length for group in batch for length in group.lengths] for batch in timed]
    num_groups, num_tokens = sum(map(len, timed)), sum(map(sum, lengths))
    num_queries, num_pairs = len(timed[0]), len(lengths[0])
    pairs_per_forward = dict.fromkeys((PADDED, WHOLE_BATCH, PLAIN_LOOP), num_pairs)
    pairs_per_forward[SENTENCE_TRANSFORMERS] = num_queries
    speeds = {name: [num_groups / run.seconds for run in rounds] for name, rounds in runs.items()}
    peer = max(set(PEERS) & set(speeds), key=lambda name: max(speeds[name]), default=None)
    results = []
    for name, rounds in runs.items():
        size = pairs_per_forward.get(name)
        padded = sum(padded_tokens(batch, size) for batch in lengths) if size else num_tokens
        row = {
            "implementation": name,
            "setting": describe(name, task),
            "groups_per_second": max(speeds[name]),
            "median_groups_per_second": statistics.median(speeds[name]),
            "tokens_per_second": max(speeds[name]) * num_tokens / num_groups,
            "padding": 1 - num_tokens / padded,
            "loaded_bytes": max(run.loaded_bytes for run in rounds),
            "peak_bytes": max(run.peak_bytes for run in rounds),
            "peer": peer,
        }
        for key, other in (("padded", PADDED), ("peer", peer)):
            if other in speeds:
                ratios = [ours / theirs for ours, theirs in zip(speeds[name], speeds[other], strict=True)]
                row[f"ratio_to_{key}"] = max(speeds[name]) / max(speeds[other])
                row[f"median_ratio_to_{key}"] = statistics.median(ratios)
        results.append(row)
    return results


def add_ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """
    Returns the rows of one model with the ratios of the best speed to padded batches and to the fastest peer.

    They were measured one after the other, so there are no ratios within a round.
    """
    speeds = {row["implementation"]: row["groups_per_second"] for row in rows}
    peer = max(set(PEERS) & set(speeds), key=speeds.__getitem__, default=None)
    return [
        {
            **{name: value for name, value in row.items() if not name.startswith("median_")},
            "peer": peer,
            **{
                f"ratio_to_{key}": row["groups_per_second"] / speeds[other] if other in speeds else None
                for key, other in (("padded", PADDED), ("peer", peer))
            },
        }
        for row in rows
    ]


def padded_tokens(lengths: Sequence[int], size: int) -> int:
    """Returns the tokens, including padding, of pairs of these lengths in batches of `size` pairs, in order."""
    batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return sum(len(batch) * max(batch) for batch in batches)


def print_losses(runs: dict[str, list[Run]]) -> float:
    """Prints the losses of the first round. Returns the largest difference between two runs at any step."""
    print("\n" + "  ".join(f"{title:>21}" for title in ("loss at step", *runs)))
    for step, losses in enumerate(zip(*(rounds[0].losses for rounds in runs.values()), strict=True), start=1):
        print("  ".join(f"{cell:>21}" for cell in (str(step), *(f"{loss:.7f}" for loss in losses))))
    every_run = [run.losses for rounds in runs.values() for run in rounds]
    difference = max(max(losses) - min(losses) for losses in zip(*every_run, strict=True))
    print(f"largest difference between implementations, over all steps and rounds: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()

r"""
Measures pairs per second of this package and its peers, with the same weights and the same pairs in one run.

    python -m benchmarks.scoring --checkpoint HuggingFaceTB/SmolLM2-135M --data path/to/beir-folder \
        --json scoring.json --markdown scoring.md --plot scoring.png

Run it from the root of the repository, after `pip install -r benchmarks/requirements.txt -e ".[eval]"`. The
implementations take turns (A B C A B C ...), and the best round of each counts. `--memory` and `--stream` measure peak
memory instead. `--append` adds to the file of an earlier run. `--from-json` measures nothing and only draws the tables
and the plot of such a file.
"""

import argparse
import json
import logging
import statistics
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from .machine import describe_machine, is_cuda, matmul_speed, timed
from .memory import run_alone
from .models import SHAPES, model_flops, write_checkpoint
from .peers import LOADERS, OTHER_FUNCTION, SENTENCE_TRANSFORMERS, Scorer, padded_scores, render, share_weights
from .report import SECTIONS, plot_speed, print_rows, write_markdown
from .workloads import WORKLOADS, Workload, make_collection, make_workloads, read_collection, spread

Row = dict[str, Any]

# Enough pairs to find an error, and few enough for a float32 pass of a large model on a CPU.
CHECKED_PAIRS = 128


def main() -> None:
    """Measures what the command line asks for."""
    args = parse_arguments()
    results = json.loads(args.from_json.read_text(encoding="utf-8")) if args.from_json else measure(args)
    if args.markdown:
        write_markdown(args.markdown, results)
    if args.plot:
        plot_speed(args.plot, results["speed"])


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scoring", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument("--checkpoint", help="folder or Hub id of a plain Llama: tokenizer, vocabulary and 135m weights")
    what.add_argument("--data", type=Path, help="BEIR folder with run.bm25.trec (default: made-up text)")
    what.add_argument("--models", nargs="+", choices=SHAPES, default=["10m", "135m"])
    what.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    what.add_argument(
        "--workloads",
        nargs="+",
        choices=WORKLOADS,
        default=["one-query", "nq", "short", "long"],
        help="see workloads.py",
    )
    what.add_argument("--implementations", nargs="+", choices=LOADERS, default=list(LOADERS))
    what.add_argument("--device", default="cpu", help="such as cuda, which adds latency (default: cpu)")
    what.add_argument("--memory", action="store_true", help="peak memory of each, in separate processes")
    what.add_argument("--stream", action="store_true", help="peak memory of predict on a generator")
    size = parser.add_argument_group("how much to measure")
    size.add_argument("--rounds", type=int, default=3, help="the best one counts (default: 3)")
    size.add_argument("--queries", type=int, default=5, help="queries of nq and short, 100 pairs each (default: 5)")
    size.add_argument("--max-pairs", type=int, help="maximum pairs of a workload, except growth")
    size.add_argument("--growth-pairs", type=int, nargs="+", default=[1000, 3000, 10_000, 30_000], metavar="PAIRS")
    size.add_argument("--stream-pairs", type=int, nargs="+", default=[10_000, 1_000_000], metavar="PAIRS")
    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, help="file for all measurements, written as they come")
    output.add_argument("--append", action="store_true", help="add to the --json file instead of replacing it")
    output.add_argument("--markdown", type=Path, help="file for the tables in Markdown")
    output.add_argument("--plot", type=Path, help="PNG file for the ratios to sentence-transformers")
    output.add_argument("--from-json", type=Path, help="write --markdown and --plot from this file only")
    args = parser.parse_args()
    if not (args.from_json or args.checkpoint):
        parser.error("--checkpoint or --from-json is required")
    if args.append and not args.json:
        parser.error("--append requires --json, the file to add to")
    if is_cuda(args.device) and "latency" not in args.workloads:
        args.workloads.append("latency")
    return args


def measure(args: argparse.Namespace) -> dict[str, list[Row]]:
    """Prints, saves and returns the rows of each section of the report and a description of the machine."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("llama_bidir").setLevel(logging.ERROR)
    results: dict[str, list[Row]] = {"machines": [], "speed": [], "memory": [], "stream": []}
    if args.append and args.json.exists():
        results = json.loads(args.json.read_text(encoding="utf-8"))
    machine = describe_machine(args.device)
    results["machines"].append(machine)
    print(json.dumps(machine))
    measures = {"speed": measure_speed, "memory": measure_memory, "stream": measure_stream}
    for section in [name for name in ("memory", "stream") if getattr(args, name)] or ["speed"]:
        for index, rows in enumerate(measures[section](args)):
            print_rows(rows, SECTIONS[section][1], header=index == 0)
            results[section] += [{"hardware": machine["hardware"], **row} for row in rows]
            if args.json:
                args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def measure_speed(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Yields a list of rows for each model, dtype and workload."""
    for model, folder, workloads in prepare(args):
        expected = expected_scores(folder, workloads, args.device)
        for dtype in args.dtypes:
            for max_length, group in groupby(workloads, key=lambda workload: workload.max_length):
                options = {"dtype": dtype, "device": args.device}
                scorers = load_scorers(args.implementations, folder, max_length=max_length, **options)
                for workload in group:
                    rows = time_workload(
                        scorers,
                        workload,
                        folder=folder,
                        expected=expected[workload.name],
                        rounds=args.rounds,
                        **options,
                    )
                    yield [{"model": model, "dtype": dtype, **row} for row in rows]
                # Frees the models before the next ones are loaded.
                del scorers


def measure_memory(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Yields a list of rows for each model, dtype and workload."""
    for model, folder, workloads in prepare(args):
        for dtype in args.dtypes:
            for workload in workloads:
                task = {"folder": folder, "dtype": dtype, "device": args.device, **workload._asdict()}
                rows = {}
                for name in args.implementations:
                    try:
                        rows[name] = run_alone({"implementation": name, **task})
                    except RuntimeError as error:
                        print(f"{name} is skipped: {error}")
                baseline = rows.get(SENTENCE_TRANSFORMERS)
                subject = {"model": model, "dtype": dtype, "workload": workload.name, "pairs": len(workload.pairs)}
                yield [
                    {
                        **subject,
                        "implementation": name,
                        **row,
                        "ratio": row["peak_bytes"] / baseline["peak_bytes"] if baseline else None,
                    }
                    for name, row in rows.items()
                ]


def measure_stream(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Yields a list of one row for each dtype and number of pairs."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint("tiny", args.checkpoint, folder)
        for dtype in args.dtypes:
            for num_pairs in args.stream_pairs:
                task = {"folder": folder, "dtype": dtype, "device": args.device, "num_pairs": num_pairs}
                yield [{"dtype": dtype, "pairs": num_pairs, **run_alone(task)}]


def prepare(args: argparse.Namespace) -> Iterator[tuple[str, str, list[Workload]]]:
    """Yields name, checkpoint folder and workloads of each model. The folder is deleted before the next model."""
    collection = read_collection(args.data) if args.data else make_collection()
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(name, args.checkpoint, folder, device=args.device)
            workloads = make_workloads(
                args.workloads,
                collection,
                AutoTokenizer.from_pretrained(folder),
                num_queries=args.queries,
                growth=args.growth_pairs,
                max_pairs=args.max_pairs,
            )
            yield name, folder, list(workloads)


def checked_pairs(num_pairs: int) -> list[int]:
    """Returns the indices of the pairs to compare."""
    return spread(list(range(num_pairs)), CHECKED_PAIRS)


def expected_scores(folder: str, workloads: list[Workload], device: str) -> dict[str, np.ndarray]:
    """Scores the checked pairs of each workload with this package's model, in float32 and padded batches of 4."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32").to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        workload.name: padded_scores(
            model,
            tokenizer,
            [workload.pairs[index] for index in checked_pairs(len(workload.pairs))],
            max_length=workload.max_length,
            batch_size=4,
            by_length=True,
        )
        for workload in workloads
    }


def load_scorers(names: list[str], folder: str, *, dtype: str, device: str, max_length: int) -> dict[str, Scorer]:
    """Loads implementations, shares their weights, warms them up, and prints why one is skipped."""
    warm_up = make_collection(num_queries=4, num_passages=4, depth=1).pairs(4)
    scorers: dict[str, Scorer] = {}
    for name in names:
        try:
            scorer = LOADERS[name](folder, dtype=dtype, device=device, max_length=max_length)
            if scorers:
                share_weights(next(iter(scorers.values())).model, scorer.model)
            scorer.score(warm_up)
        except Exception as error:
            # Any error of a peer is a reason to continue without it.
            print(f"{name} is skipped: {type(error).__name__}: {error}")
        else:
            scorers[name] = scorer
    return scorers


def time_workload(
    scorers: dict[str, Scorer],
    workload: Workload,
    *,
    folder: str,
    expected: np.ndarray,
    rounds: int,
    dtype: str,
    device: str,
) -> list[Row]:
    """
    Times each implementation in turn, and the matrix product after each round.

    Returns:
        One row per implementation. `seconds` is the best round. `ratio` and `median_ratio` are pairs/s relative to
        sentence-transformers: between the best rounds, and as the median over the rounds. `score_error` is the largest
        absolute difference from `expected` divided by the largest absolute value in `expected`. `peak_share` is
        `model_flops` per second divided by the best `matmul_speed` over the rounds.
    """
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [render(*pair) for pair in workload.pairs]
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=workload.max_length)["input_ids"]]
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    scores, peak = {}, 0.0
    for _ in range(rounds):
        for name, scorer in scorers.items():
            elapsed, scores[name] = timed(partial(scorer.score, workload.pairs), device)
            seconds[name].append(elapsed)
        peak = max(peak, matmul_speed(config, dtype, device))
    baseline = seconds.get(SENTENCE_TRANSFORMERS)
    rows = []
    for name, times in seconds.items():
        best = min(times)
        difference = np.abs(scores[name][checked_pairs(len(workload.pairs))] - expected).max()
        row = {
            "workload": workload.name,
            "implementation": name,
            "pairs": len(workload.pairs),
            "tokens": sum(lengths),
            "max_length": workload.max_length,
            "seconds": best,
            "seconds_of_rounds": times,
            "pairs_per_second": len(workload.pairs) / best,
            "median_pairs_per_second": len(workload.pairs) / statistics.median(times),
            "tokens_per_second": sum(lengths) / best,
            "ratio": min(baseline) / best if baseline else None,
            "median_ratio": statistics.median(np.divide(baseline, times).tolist()) if baseline else None,
            "score_error": None if name == OTHER_FUNCTION else float(difference / np.abs(expected).max()),
            "flops": model_flops(config, lengths),
            "matmul_flops_per_second": peak,
            "peak_share": model_flops(config, lengths) / best / peak,
        }
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()

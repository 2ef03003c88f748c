r"""
Measures pairs per second of this package and its peers, with the same weights and the same pairs in one run.

    python -m benchmarks.scoring --checkpoint HuggingFaceTB/SmolLM2-135M --data path/to/beir-folder \
        --json scoring.json --markdown scoring.md --plot scoring.png

Run it from the root of the repository, after `pip install -r benchmarks/requirements.txt -e ".[eval,onnx]"`. The
implementations take turns in all their dtypes (A B C A B C ...), and the best round of each counts. Each one runs in
its strongest form, which the column `setting` names. `--memory` and `--stream` measure peak memory instead. `--append`
adds to the file of an earlier run. `--from-json` measures nothing and only draws the tables and the plot of such a
file.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import transformers
from transformers import AutoTokenizer

from .implementations import DTYPES, IMPLEMENTATIONS, choose
from .machine import describe_machine, is_cuda
from .memory import run_alone
from .models import SHAPES, TRAINED, copy_checkpoint, write_checkpoint
from .peers import SENTENCE_TRANSFORMERS
from .report import SECTIONS, plot_speed, print_rows, write_markdown
from .speed import Row, expected_scores, load_scorers, print_skipped, time_workload
from .workloads import WORKLOADS, Workload, make_collection, make_workloads, read_collection


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
    what.add_argument("--reranker", type=Path, help="folder of a trained reranker, measured in place of --models")
    what.add_argument("--data", type=Path, help="BEIR folder with run.bm25.trec (default: made-up text)")
    what.add_argument("--models", nargs="+", choices=SHAPES, default=["10m", "135m"])
    what.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"])
    what.add_argument(
        "--workloads",
        nargs="+",
        choices=WORKLOADS,
        default=["one-query", "nq", "short", "long"],
        help="see workloads.py",
    )
    what.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
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
    output.add_argument("--plot", type=Path, help="PNG file for pairs per second")
    output.add_argument("--from-json", type=Path, help="write --markdown and --plot from this file only")
    args = parser.parse_args()
    if not (args.from_json or args.checkpoint or (args.reranker and not args.stream)):
        parser.error("--checkpoint, --reranker or --from-json is required (--stream needs --checkpoint)")
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
    """Yields a list of rows for each model and workload."""
    names = choose(args.implementations, args.dtypes, args.device)
    for model, folder, workloads in prepare(args):
        expected = expected_scores(folder, workloads, args.device)
        for max_length, group in groupby(workloads, key=lambda workload: workload.max_length):
            scorers = load_scorers(names, folder, device=args.device, max_length=max_length, skip=print_skipped)
            for workload in group:
                rows = time_workload(
                    scorers,
                    workload,
                    folder=folder,
                    expected=expected[workload.name],
                    rounds=args.rounds,
                    device=args.device,
                    skip=print_skipped,
                )
                yield [{"model": model, **row} for row in rows]
            # Frees the models before the next ones are loaded.
            del scorers


def measure_memory(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Yields a list of rows for each model, dtype and workload."""
    for model, folder, workloads in prepare(args):
        for dtype in args.dtypes:
            for workload in workloads:
                task = {"folder": folder, "dtype": dtype, "device": args.device, **workload._asdict()}
                rows = {}
                for name, _ in choose(args.implementations, [dtype], args.device):
                    try:
                        # Not in the measured process, where an export would count as the peak of loading.
                        if (export := IMPLEMENTATIONS[name].export) is not None:
                            export(folder)
                        rows[name] = run_alone({"implementation": name, **task})
                    except (ImportError, RuntimeError) as error:
                        print_skipped((name, dtype), str(error))
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
    for name in [TRAINED] if args.reranker else args.models:
        with tempfile.TemporaryDirectory() as folder:
            if args.reranker:
                copy_checkpoint(args.reranker, folder)
            else:
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


if __name__ == "__main__":
    main()

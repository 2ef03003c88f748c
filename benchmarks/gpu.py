r"""
Measures on one GPU, in stages of about four minutes that resume.

    python -m benchmarks.gpu scoring --checkpoint HuggingFaceTB/SmolLM2-135M-Instruct --data path/to/a/beir/folder
    python -m benchmarks.gpu quality --reranker path/to/a/trained/reranker --data path/to/a/beir/folder
    python -m benchmarks.gpu training --checkpoint HuggingFaceTB/SmolLM2-135M-Instruct --rows squad-train.jsonl.gz
    python -m benchmarks.gpu tests

Run it from the root of the repository, after `pip install -r benchmarks/requirements.txt -e ".[train,eval]"`. Each
measured cell is written to the stage's file immediately, with the versions and the card. The same command measures what
is still missing. `--device cpu --shapes tiny` tries a stage without a GPU.

- `scoring`: pairs per second of this package and of its peers, each in its strongest form (see `speed.py`).
- `quality`: nDCG@10 and the error of the scores in each precision of this package.
- `training`: groups trained per second, and the peak memory (see `training.py`).
- `tests`: the outcome of each test of this package that needs a GPU.
"""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

import transformers

from .cells import Cells
from .implementations import DTYPES, IMPLEMENTATIONS, choose
from .machine import Deadline, describe_machine
from .models import SHAPES
from .peers import OTHER_FUNCTION
from .stages import DTYPE, WORKLOADS, measure_quality, measure_scoring, measure_tests, measure_training

# Those of a GPU, except the one that computes another function.
SCORERS = [name for name, _ in choose(list(IMPLEMENTATIONS), [DTYPE], "cuda") if name != OTHER_FUNCTION]

# Of a stage: the function, the name of the rows in its file, and the fields of a cell.
STAGES: dict[str, tuple[Callable[[argparse.Namespace, Cells, Deadline], None], str, tuple[str, ...]]] = {
    "scoring": (measure_scoring, "speed", ("model", "workload", "implementation", "dtype")),
    "quality": (measure_quality, "precision", ("model", "precision")),
    "training": (measure_training, "training", ("model", "implementation")),
    "tests": (measure_tests, "tests", ("name",)),
}


def main() -> None:
    """Measures the stage of the command line."""
    args = parse_arguments()
    transformers.logging.set_verbosity_error()
    logging.getLogger("llama_bidir").setLevel(logging.ERROR)
    stage, section, key = STAGES[args.stage]
    machine = describe_machine(args.device)
    print(json.dumps(machine), flush=True)
    path = args.json or Path(__file__).with_name(f"gpu-{args.stage}.json")
    cells = Cells(path, section, machine, key, again=args.again, retry=args.retry)
    stage(args, cells, Deadline(args.limit))


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--device", default="cuda", help="(default: cuda)")
    every.add_argument("--json", type=Path, help="file of the cells (default: benchmarks/gpu-STAGE.json)")
    every.add_argument("--again", action="store_true", help="measure the cells that are in the file, too")
    every.add_argument("--retry", action="store_true", help="measure the cells that were skipped, too")
    every.add_argument(
        "--limit", type=float, default=200, help="start no cell after this many seconds; 0 sets no limit (default: 200)"
    )
    shapes = argparse.ArgumentParser(add_help=False)
    shapes.add_argument("--checkpoint", required=True, help="folder or Hub id of a plain Llama")
    shapes.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1b", "135m"])

    scoring = stages.add_parser("scoring", parents=[every, shapes])
    scoring.add_argument("--data", type=Path, help="BEIR folder with run.bm25.trec (default: made-up text)")
    scoring.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    scoring.add_argument("--implementations", nargs="+", choices=SCORERS, default=SCORERS)
    scoring.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        default=[DTYPE, "int8", "float8"],
        help="eight bits for this package only (default: bfloat16 int8 float8)",
    )
    scoring.add_argument("--queries", type=int, default=30, help="queries of nq, 100 pairs each (default: 30)")
    scoring.add_argument("--max-pairs", type=int, help="maximum pairs of a workload (default: all)")
    scoring.add_argument("--rounds", type=int, default=3, help="the best one counts (default: 3)")

    quality = stages.add_parser("quality", parents=[every])
    quality.add_argument("--reranker", required=True, help="folder or Hub id of a trained reranker")
    quality.add_argument("--data", type=Path, required=True, help="BEIR folder with qrels.tsv and run.bm25.trec")
    quality.add_argument("--queries", type=int, default=500, help="spread evenly over the run (default: 500)")
    quality.add_argument("--depth", type=int, default=20, help="candidates per query (default: 20)")

    training = stages.add_parser("training", parents=[every, shapes])
    training.add_argument("--rows", type=Path, required=True, help="rows to train on (.jsonl or .jsonl.gz)")
    training.add_argument("--steps", type=int, default=20, help="timed steps, after one that is not (default: 20)")
    training.add_argument("--groups", type=int, default=8, help="queries per step (default: 8)")
    training.add_argument("--group-size", type=int, default=8, help="passages per query (default: 8)")

    stages.add_parser("tests", parents=[every])
    return parser.parse_args()


if __name__ == "__main__":
    main()

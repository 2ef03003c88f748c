r"""
A study of what makes a reranker rank well. It trains one reranker per setting and evaluates it on several sets.

    python -m benchmarks.quality --checkpoint HuggingFaceTB/SmolLM2-135M-Instruct --data path/to/data --output work \
        --minutes 60
    python -m benchmarks.quality --report docs

Run it from the root of the repository, after `pip install -e ".[train,eval]"`. The data folder has
`train/NAME-train.jsonl.gz` (rows) and `eval/NAME` (BEIR folders with `qrels.tsv` and `run.bm25.trec`). Each cell (see
`study.py`) is trained by `llama_bidir.training.train` and evaluated by `llama_bidir.evaluation.evaluate_reranker`. It
is then a row of `benchmarks/quality-cpu.json` or `quality-cuda.json`, and is not run again. The same command resumes a
stopped study, within a cell too.

On a GPU, a cell trains all layers of the base. On a CPU, it trains the first six, for fewer steps.
"""

import argparse
import gc
import logging
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_bidir import CrossEncoder
from llama_bidir.evaluation import evaluate_reranker
from llama_bidir.scoring.device import cpu_dtype
from llama_bidir.training import read_history, train
from llama_bidir.training.recipes import load_recipe

from .cells import Cells
from .findings import write_report
from .machine import Deadline, describe_machine
from .study import BASE, EVAL_SETS, SCORED_ROWS, Cell, cells, encode_values, read_eval_set, write_rows

MEASURES = ("nDCG@10", "RR@10")
# Has too many tokens for a CPU.
GPU_FOLDER = "longdoc"


def main() -> None:
    """Runs the missing cells, or writes the report."""
    args = parse_arguments()
    if args.report:
        write_report(args.report)
        return
    transformers.logging.set_verbosity_error()
    logging.getLogger("llama_bidir").setLevel(logging.ERROR)
    device = torch.device(args.device).type
    path = args.json or Path(__file__).with_name(f"quality-{device}.json")
    machine = describe_machine(args.device)
    # The scores of a run hardly depend on the CPU that trains it.
    rows = Cells(path, "quality", machine, Cell.__dataclass_fields__, by_hardware=False)
    deadline = Deadline(60 * args.minutes)
    for cell in cells(BASE[device], SCORED_ROWS[device]):
        if rows.is_missing(**asdict(cell)):
            if deadline.is_over():
                break
            rows.add([run(cell, args)])


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="folder or Hub id of a plain Llama")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, help="folder of the runs, which may be removed when the study is done")
    parser.add_argument("--minutes", type=float, default=0, help="start no cell after this time; 0 sets no limit")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--depth", type=int, default=10, help="candidates per query to rerank (default: 10)")
    parser.add_argument("--eval-max-length", type=int, default=192, help="tokens per pair (default: 192)")
    parser.add_argument("--json", type=Path, help="file of the rows")
    parser.add_argument("--keep", action="store_true", help="keep the rerankers in the output folder")
    parser.add_argument("--report", type=Path, help="write tables and plots to this folder, and run no cell")
    args = parser.parse_args()
    if not args.report and not (args.checkpoint and args.data and args.output):
        parser.error("--checkpoint, --data and --output are needed to run cells")
    return args


def run(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """Trains and evaluates a cell and returns its row."""
    print(f"{time.strftime('%H:%M')} {asdict(cell)}", flush=True)
    teacher = train_cell(BASE[args.device], args) if cell.needs_teacher else None
    folder, half = args.output / cell.name, computes_in_half(args)
    has_begun = (folder / "model").exists()
    start = time.monotonic()
    train_cell(cell, args, teacher)
    trained = time.monotonic()
    reranker = CrossEncoder(
        folder / "model",
        device=args.device,
        dtype="bfloat16" if half else "float32",
        max_length=max(cell.max_length, args.eval_max_length),
    )
    sets = {
        name: evaluate_set(reranker, args, name)
        for name, (source, _, _) in EVAL_SETS.items()
        if args.device == "cuda" or source != GPU_FOLDER
    }
    history = read_history(folder / "model" / "history.jsonl")
    if not args.keep and cell != BASE[args.device]:  # the teacher of later cells
        shutil.rmtree(folder)
    row = {
        **asdict(cell),
        "base": Path(args.checkpoint).name,
        "bf16": half,
        "depth": args.depth,
        "eval_max_length": max(cell.max_length, args.eval_max_length),
        "training_seconds": None if has_begun else trained - start,  # of a stopped run, a part is unknown
        "evaluation_seconds": time.monotonic() - trained,
        "history": [
            {key: entry[key] for key in ("step", "eval_loss", "eval_ndcg@10")}
            for entry in history
            if "eval_loss" in entry
        ],
        "sets": sets,
    }
    print({name: (round(each["bm25"]["nDCG@10"], 4), round(each["nDCG@10"], 4)) for name, each in sets.items()})
    return row


def train_cell(cell: Cell, args: argparse.Namespace, teacher: Path | None = None) -> Path:
    """Trains the reranker of a cell, unless it is there. Returns its folder."""
    folder = args.output / cell.name
    model = folder / "model"
    if any((model / name).exists() for name in ("model.safetensors", "adapter_model.safetensors")):
        return model
    rows, held_out = write_rows(cell, args.data / "train", args.output / "rows", teacher)
    recipe = cell.recipe(write_base(args.checkpoint, cell.layers, args.output), rows, held_out, model)
    on_cpu = args.device == "cpu"
    recipe["training"] |= {"bf16": computes_in_half(args), "use_cpu": on_cpu, "disable_tqdm": True}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    train(*load_recipe(folder / "recipe.yaml"))
    gc.collect()
    return model


def computes_in_half(args: argparse.Namespace) -> bool:
    """Returns whether bfloat16 is the faster dtype of the device."""
    return args.device == "cuda" or cpu_dtype(torch.bfloat16) == torch.bfloat16


def write_base(checkpoint: str, layers: int, output: Path) -> Path:
    """Writes the first layers of a plain Llama, unless they are there."""
    base = output / f"base-{layers}"
    if not (base / "tokenizer_config.json").exists():
        AutoModelForCausalLM.from_pretrained(checkpoint, num_hidden_layers=layers).save_pretrained(base)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(base)
    return base


def evaluate_set(reranker: CrossEncoder, args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Returns the measures of BM25 and of a reranker on a set, the p-values, and nDCG@10 of each query."""
    dataset = read_eval_set(args.data / "eval", name, args.depth)
    result = evaluate_reranker(reranker, dataset, depth=args.depth, measures=MEASURES, long_document=EVAL_SETS[name][2])
    ndcg = MEASURES[0]
    return {
        "queries": len(result.after.per_query[ndcg]),
        "bm25": result.before.aggregated,
        **result.after.aggregated,
        "p": {comparison.measure: comparison.randomization for comparison in result.comparisons},
        "pairs_per_second": result.num_pairs / result.seconds,
        "bm25_per_query": encode_values(result.before.per_query[ndcg]),
        "per_query": encode_values(result.after.per_query[ndcg]),
    }


if __name__ == "__main__":
    main()

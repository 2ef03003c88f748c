"""A complete run on real data: fine-tunes a reranker, reranks, and compares BM25 with the scores before and after.

    python -m benchmarks.fine_tuning --checkpoint HuggingFaceTB/SmolLM2-135M --data path/to/data --output out

Run it from the root of the repository, after `pip install -e ".[train,eval]"`. The base is the first layers of a plain
Llama, which a CPU can train. For a GPU, use `--recipe benchmarks/fine_tuning_gpu.yaml`. The data folder has
`train/*-train.jsonl.gz` (rows) and `eval/NAME` (BEIR folders with `qrels.tsv` and `run.bm25.trec`). Training uses bf16
if the machine multiplies bfloat16 faster than float32. Running the same command again resumes a stopped run.
"""

import argparse
import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_bidir import CrossEncoder
from llama_bidir.evaluation import evaluate_run
from llama_bidir.scoring.device import cpu_dtype
from llama_bidir.training import read_history, train
from llama_bidir.training.recipes import load_recipe

from .machine import describe_machine
from .precision import read_qrels
from .workloads import read_collection

TRAIN_SETS = ("squad", "nq", "scifact")
EVAL_SETS = ("squad-dev", "nq", "scifact")
MEASURES = ("nDCG@10", "RR@10")
EVAL_ROWS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub id of a plain Llama")
    parser.add_argument("--layers", type=int, default=12, help="how many of the first layers to keep (default: 12)")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--recipe",
        type=Path,
        default=Path(__file__).with_name("fine_tuning.yaml"),
        help="training recipe (default: fine_tuning.yaml)",
    )
    parser.add_argument("--depth", type=int, default=20, help="candidates per query to rerank (default: 20)")
    parser.add_argument("--max-steps", type=int, help="optimizer steps (default: those of the recipe)")
    parser.add_argument("--queries", type=int, help="how many queries of each set to use (default: all)")
    args = parser.parse_args()

    model = args.output / "model"
    args.output.mkdir(parents=True, exist_ok=True)
    write_rows(args.data, args.output)
    base = os.fspath(args.output / "base")
    AutoModelForCausalLM.from_pretrained(args.checkpoint, num_hidden_layers=args.layers).save_pretrained(base)
    AutoTokenizer.from_pretrained(args.checkpoint).save_pretrained(base)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = accelerator.type if accelerator else "cpu"
    half = device != "cpu" or cpu_dtype(torch.bfloat16) == torch.bfloat16
    training = {"output_dir": os.fspath(model), "bf16": half}
    if args.max_steps:
        training["max_steps"] = args.max_steps
    recipe = load_recipe(
        args.recipe,
        {
            "model": {"model_name_or_path": base},
            "data": {
                "train": [os.fspath(args.output / "train.jsonl")],
                "eval": [os.fspath(args.output / "eval.jsonl")],
            },
            "training": training,
        },
    )
    result: dict[str, Any] = {
        "machine": describe_machine(device),
        "layers": args.layers,
        "depth": args.depth,
        "bf16": half,
    }
    if not (model / "config.json").exists():
        train(*recipe)
    result["history"] = read_history(model / "history.jsonl")
    dtype = "bfloat16" if half else "float32"
    before = CrossEncoder(base, dtype=dtype, max_length=recipe.data.rerank_max_length)
    after = CrossEncoder(model, dtype=dtype)
    result["sets"] = {name: measure(args.data / "eval" / name, before, after, args) for name in EVAL_SETS}
    (args.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


def write_rows(data: Path, output: Path) -> None:
    """
    Writes the rows of all train sets, shuffled, to `train.jsonl`, and holds out `EVAL_ROWS` of them in `eval.jsonl`.

    Each training row gets as many random negatives as it has hard ones, because a first-stage run contains both.
    """
    rows: list[dict[str, Any]] = []
    for name in TRAIN_SETS:
        with gzip.open(data / "train" / f"{name}-train.jsonl.gz", "rt", encoding="utf-8") as lines:
            rows += map(json.loads, lines)
    rng = random.Random(0)
    rng.shuffle(rows)
    write_lines(output / "eval.jsonl", rows[:EVAL_ROWS])
    passages = [passage for row in rows[EVAL_ROWS:] for passage in row["pos_doc"]]
    for row in rows[EVAL_ROWS:]:
        known = {*row["pos_doc"], *row["neg_doc"]}
        drawn = rng.sample(passages, 2 * len(known))
        row["neg_doc"] += [passage for passage in drawn if passage not in known][: len(row["neg_doc"])]
    write_lines(output / "train.jsonl", rows[EVAL_ROWS:])


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def measure(folder: Path, before: CrossEncoder, after: CrossEncoder, args: argparse.Namespace) -> dict[str, Any]:
    """Measures the first-stage run and both rerankers. Candidates below the depth stay below, in first-stage order."""
    collection, qrels = read_collection(folder), read_qrels(folder)
    query_ids = list(qrels)[: args.queries]
    candidates = {query_id: collection.run.get(query_id, []) for query_id in query_ids}
    runs = {"BM25": {query_id: _by_rank(doc_ids) for query_id, doc_ids in candidates.items()}}
    for name, reranker in (("before", before), ("after", after)):
        rankings = reranker.rank_batch(
            [collection.queries[query_id] for query_id in query_ids],
            [[collection.corpus[doc_id] for doc_id in candidates[query_id][: args.depth]] for query_id in query_ids],
            show_progress_bar=True,
        )
        runs[name] = {
            query_id: _by_rank(
                [candidates[query_id][item["corpus_id"]] for item in ranking] + candidates[query_id][args.depth :]
            )
            for query_id, ranking in zip(query_ids, rankings, strict=True)
        }
    judged = {query_id: qrels[query_id] for query_id in query_ids}
    return {
        "queries": len(query_ids),
        **{
            name: {key: float(value) for key, value in evaluate_run(judged, run, MEASURES).items()}
            for name, run in runs.items()
        },
    }


def _by_rank(doc_ids: list[str]) -> dict[str, float]:
    return {doc_id: -float(rank) for rank, doc_id in enumerate(doc_ids)}


def table(result: dict[str, Any]) -> str:
    """Returns the measures as a Markdown table."""
    lines = [
        "| set | queries | measure | BM25 | before | after |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in result["sets"].items():
        for measure_name in MEASURES:
            shown = " | ".join(f"{values[system][measure_name]:.3f}" for system in ("BM25", "before", "after"))
            lines.append(f"| {name} | {values['queries']} | {measure_name} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

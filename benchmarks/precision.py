"""Measures what each precision costs in nDCG@10, on a reranker that the script fine-tunes first.

    python -m benchmarks.precision --checkpoint HuggingFaceTB/SmolLM2-135M --train rows.jsonl.gz --data path/to/beir

Run it from the root of the repository, after `pip install -e ".[train,eval,onnx,quantize]"`. The script fine-tunes the
first `--layers` layers of the checkpoint on the rows and reranks the first-stage run of the folder with each precision.
`--layers 0 --steps 0` uses a reranker that is already trained, without changing it.
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer, TorchAoConfig

from llama_bidir import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    LlamaBidirectionalForSequenceClassification,
)
from llama_bidir.checkpoints.onnx import INT8_FILE, MODEL_FILE
from llama_bidir.data import load_rows
from llama_bidir.evaluation import Qrels, evaluate_run

from .graphs import export_graphs
from .speed import relative_error
from .workloads import Collection, Pair, read_collection, spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder or Hub id of a plain Llama or a reranker")
    parser.add_argument("--train", help="rows to fine-tune on (.jsonl or .jsonl.gz)")
    parser.add_argument("--data", type=Path, required=True, help="BEIR folder with qrels.tsv and run.bm25.trec")
    parser.add_argument(
        "--layers", type=int, default=8, help="how many of the first layers to keep; 0 keeps all (default: 8)"
    )
    parser.add_argument("--steps", type=int, default=60, help="training steps of 8 groups of 4 passages (default: 60)")
    parser.add_argument(
        "--queries", type=int, default=50, help="number of queries, spread evenly over the run (default: 50)"
    )
    parser.add_argument("--depth", type=int, default=50, help="candidates per query (default: 50)")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    collection = read_collection(args.data)
    with tempfile.TemporaryDirectory() as folder:
        train(args, folder)
        measure(judge(collection, read_qrels(args.data), queries=args.queries, depth=args.depth), folder, args.device)


def train(args: argparse.Namespace, folder: str) -> None:
    """Fine-tunes the first layers of the checkpoint listwise and saves them to `folder`, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = LlamaBidirectionalForSequenceClassification.from_pretrained(args.checkpoint, dtype="float32")
    if args.layers:
        model.model.layers = model.model.layers[: args.layers]
        model.config.num_hidden_layers = args.layers
    if args.steps:
        arguments = CrossEncoderTrainingArguments(
            folder,
            max_steps=args.steps,
            learning_rate=1e-4,
            warmup_steps=args.steps // 10,
            per_device_train_batch_size=8,
            save_strategy="no",
            report_to="none",
            seed=0,
            use_cpu=args.device == "cpu",
        )
        rows = load_rows(args.train)
        CrossEncoderTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer, group_size=4).train()
    CrossEncoder(model, tokenizer).save_pretrained(folder)


def read_qrels(data: Path) -> Qrels:
    """Returns the judgements in the `qrels.tsv` of a BEIR folder."""
    qrels: dict[str, dict[str, int]] = {}
    with open(data / "qrels.tsv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    return qrels


class Judged(NamedTuple):
    """Candidates of queries with judgements: `pairs` has the candidates of `doc_ids`, query by query."""

    pairs: list[Pair]
    doc_ids: dict[str, list[str]]
    qrels: Qrels

    def ndcg(self, scores: Iterable[float]) -> float:
        """Returns nDCG@10 of the candidates, ranked by one score per pair."""
        values = iter(scores)
        run = {query_id: {doc_id: float(next(values)) for doc_id in ids} for query_id, ids in self.doc_ids.items()}
        return evaluate_run(self.qrels, run, ["nDCG@10"])["nDCG@10"]

    def first_stage(self) -> float:
        """Returns nDCG@10 of the candidates in the order of the first stage."""
        return self.ndcg([-rank for ids in self.doc_ids.values() for rank in range(len(ids))])


def judge(collection: Collection, qrels: Qrels, *, queries: int, depth: int) -> Judged:
    """Returns the first `depth` candidates of `queries` queries, which are spread evenly over the run."""
    query_ids = spread(list(collection.run), queries)
    doc_ids = {query_id: collection.run[query_id][:depth] for query_id in query_ids}
    pairs = [(collection.queries[q], collection.corpus[d]) for q in query_ids for d in doc_ids[q]]
    return Judged(pairs, doc_ids, {query_id: qrels.get(query_id, {}) for query_id in query_ids})


def score(folder: str, options: dict[str, Any], pairs: list[Pair]) -> tuple[np.ndarray, float]:
    """Returns the scores by a precision (see [`precisions`]), and pairs per second after a warm-up."""
    reranker = CrossEncoder(folder, **options)
    reranker.predict(pairs[:8])
    start = time.perf_counter()
    scores = reranker.predict(pairs)
    return scores, len(pairs) / (time.perf_counter() - start)


def measure(judged: Judged, folder: str, device: str) -> None:
    """Prints nDCG@10, pairs/s and the error of the scores for each precision."""
    queries, pairs = len(judged.doc_ids), len(judged.pairs)
    print(f"torch {torch.__version__}, {queries} queries, {pairs} pairs")
    print(f"{'precision':<38}{'nDCG@10':>9}{'pairs/s':>9}{'rms difference / std':>22}")
    print(f"{'first stage':<38}{judged.first_stage():>9.4f}")
    expected = None
    for name, (path, options) in precisions(folder, device).items():
        try:
            scores, speed = score(path, options, judged.pairs)
        except (ImportError, ValueError) as reason:
            print(f"{name:<38}skipped: {reason}")
            continue
        expected = scores if expected is None else expected
        error = relative_error(scores, expected)
        print(f"{name:<38}{judged.ndcg(scores):>9.4f}{speed:>9.1f}{error:>22.4f}", flush=True)


def own_precisions(device: str) -> dict[str, dict[str, Any]]:
    """Returns the CrossEncoder arguments of this package's own precisions, float32 first."""
    return {dtype: {"device": device, "dtype": dtype} for dtype in ("float32", "bfloat16", "int8", "float8")}


def precisions(folder: str, device: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns folder and CrossEncoder arguments by name, float32 first. fp8 needs a GPU, and onnxruntime a CPU."""
    from torchao import quantization

    configs = {
        "int8 weights (torchao)": quantization.Int8WeightOnlyConfig(),
        "int8 weights and activations (torchao)": quantization.Int8DynamicActivationInt8WeightConfig(),
    }
    if torch.device(device).type == "cuda":
        configs["fp8 weights and activations (torchao)"] = quantization.Float8DynamicActivationFloat8WeightConfig()
    options = own_precisions(device)
    for name, config in configs.items():
        quantized = TorchAoConfig(config, modules_to_not_convert=["score"])
        options[name] = {"device": device, "dtype": "bfloat16", "model_kwargs": {"quantization_config": quantized}}
    result = {name: (folder, values) for name, values in options.items()}
    if torch.device(device).type == "cpu":
        exported = export_graphs(folder)
        for name, file_name in (("float32 (onnxruntime)", MODEL_FILE), ("int8 (onnxruntime)", INT8_FILE)):
            result[name] = exported, {"backend": "onnx", "model_kwargs": {"file_name": file_name}}
    return result


if __name__ == "__main__":
    main()

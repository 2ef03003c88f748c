"""Measures what each precision costs in nDCG@10, on a reranker that the script fine-tunes first.

    python -m benchmarks.precision --checkpoint HuggingFaceTB/SmolLM2-135M --train rows.jsonl.gz --data path/to/beir

Run it from the root of the repository, after `pip install -e ".[train,eval,onnx,quantize]"`. The script fine-tunes the
first `--layers` layers of the checkpoint on the rows and reranks the first-stage run of the folder with each precision.
`--layers 0 --steps 0` uses a reranker that is already trained, without changing it.
"""

import argparse
import csv
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, TorchAoConfig

from llama_bidir import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    LlamaBidirectionalForSequenceClassification,
)
from llama_bidir.checkpoints.export import export_reranker
from llama_bidir.data import load_rows
from llama_bidir.evaluation import Qrels, evaluate_run

from .workloads import Collection, read_collection, spread


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
        measure(collection, read_qrels(args.data), folder, args)


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


def measure(collection: Collection, qrels: Qrels, folder: str, args: argparse.Namespace) -> None:
    """Prints nDCG@10, pairs/s and the difference from float32 scores, for each precision."""
    query_ids = spread(list(collection.run), args.queries)
    doc_ids = {query_id: collection.run[query_id][: args.depth] for query_id in query_ids}
    pairs = [(collection.queries[q], collection.corpus[d]) for q in query_ids for d in doc_ids[q]]
    judged = {query_id: qrels.get(query_id, {}) for query_id in query_ids}

    def ndcg(scores: Any) -> float:
        values = iter(np.asarray(scores).tolist())
        run = {query_id: {doc_id: next(values) for doc_id in doc_ids[query_id]} for query_id in query_ids}
        return evaluate_run(judged, run, ["nDCG@10"])["nDCG@10"]

    print(f"torch {torch.__version__}, {len(query_ids)} queries x {args.depth} candidates, {len(pairs)} pairs")
    print(f"{'precision':<38}{'nDCG@10':>9}{'pairs/s':>9}{'rms difference / std':>22}")
    first_stage = [-rank for query_id in query_ids for rank in range(len(doc_ids[query_id]))]
    print(f"{'first stage':<38}{ndcg(first_stage):>9.4f}")
    expected = None
    for name, (path, options) in precisions(folder, args.device).items():
        reranker = CrossEncoder(path, **options)
        reranker.predict(pairs[:8])
        start = time.perf_counter()
        scores = reranker.predict(pairs)
        seconds = time.perf_counter() - start
        expected = scores if expected is None else expected
        difference = np.sqrt(np.square(scores - expected).mean()) / expected.std()
        print(f"{name:<38}{ndcg(scores):>9.4f}{len(pairs) / seconds:>9.1f}{difference:>22.4f}", flush=True)


def precisions(folder: str, device: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns folder and CrossEncoder arguments by name, float32 first. fp8 needs a GPU, and onnxruntime a CPU."""
    from torchao import quantization

    configs = {
        "int8 weights (torchao)": quantization.Int8WeightOnlyConfig(),
        "int8 weights and activations (torchao)": quantization.Int8DynamicActivationInt8WeightConfig(),
    }
    if torch.device(device).type == "cuda":
        configs["fp8 weights and activations (torchao)"] = quantization.Float8DynamicActivationFloat8WeightConfig()
    options: dict[str, dict[str, Any]] = {"float32": {"dtype": "float32"}, "bfloat16": {"dtype": "bfloat16"}}
    for name, config in configs.items():
        quantized = TorchAoConfig(config, modules_to_not_convert=["score"])
        options[name] = {"dtype": "bfloat16", "model_kwargs": {"quantization_config": quantized}}
    result = {name: (folder, {"device": device, **values}) for name, values in options.items()}
    if torch.device(device).type == "cpu":
        exported = os.path.join(folder, "onnx")
        export_reranker(folder, exported, format="onnx", int8=True)
        for name, file_name in (("float32 (onnxruntime)", "model.onnx"), ("int8 (onnxruntime)", "model_int8.onnx")):
            result[name] = exported, {"backend": "onnx", "model_kwargs": {"file_name": file_name}}
    return result


if __name__ == "__main__":
    main()

"""One recipe per feature, run from the command line to scores of the trained reranker."""

import json

import numpy as np
import pytest
import yaml
from helpers import write

from llama_bidir import CrossEncoder
from llama_bidir.cli import main
from llama_bidir.training import read_history

pytest.importorskip("peft")
QUERIES = ["bees", "fish", "kings", "flowers"]
DOCUMENTS = ["home of bees", "the sea of fish", "a king of France", "flowers in clover", "white hives", "nobody"]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def beir(folder):
    """A collection with grades and a run."""
    write(folder / "corpus.jsonl", lines(*({"_id": f"d{n}", "text": text} for n, text in enumerate(DOCUMENTS))))
    write(folder / "queries.jsonl", lines(*({"_id": f"q{n}", "text": text} for n, text in enumerate(QUERIES))))
    qrels = "".join(f"q{n}\td{n}\t2\nq{n}\td{n + 1}\t1\n" for n in range(4))
    write(folder / "qrels.tsv", f"query-id\tcorpus-id\tscore\n{qrels}")
    run = "".join(f"q{n} Q0 d{d} {d + 1} {-d} bm25\n" for n in range(4) for d in range(6))
    write(folder / "run.bm25.trec", run)
    return folder


TEMPLATE = "{instruction} Q: {query} D: {passage}"
ROW = {"query": "bees", "pos_doc": ["home of bees"], "neg_doc": ["nobody", "white hives"]}
SCORED = {**ROW, "pos_score": [3.0], "neg_score": [-1.0, 0.5]}
FLAG = {"query": "fish", "pos": ["the sea"], "neg": ["a king", "nobody"], "pos_scores": [2], "neg_scores": [-1, 0]}
RECIPES = {
    "graded relevance": {"data": {"positives": "all", "group_size": 4}, "training": {"loss": "lambda"}},
    "teacher scores": {"rows": [SCORED, FLAG], "training": {"loss": "mse"}},
    "a mixture": {"rows": [SCORED, FLAG], "training": {"loss": {"listwise_cross_entropy": 1.0, "mse": 0.5}}},
    "a temperature of the loss": {"rows": [ROW], "training": {"loss_temperature": 0.5}},
    "pieces": {"rows": [ROW, ROW, ROW], "training": {"max_pairs_per_forward": 2}},
    "a collection in evaluation": {
        "data": {"eval_rerank": [{"name": "tiny", "path": "beir", "depth": 4}]},
        "training": {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "eval_tiny_ndcg@10"},
    },
    "instructions": {
        "rows": [{**ROW, "instruction": "Find it."}, ROW],
        "data": {"prompt_template": TEMPLATE, "instruction": "Why?"},
    },
    "rows of FlagEmbedding": {
        "rows": [{**FLAG, "prompt": "Does B answer A?"}],
        "data": {"prompt_template": TEMPLATE},
        "training": {"loss": "kl_div"},
    },
    "rows of sentence-transformers": {
        "rows": [
            {"anchor": "bees", "positive": "home", "negative_1": "nobody", "negative_2": "a king"},
            {"query": "bees", "docs": DOCUMENTS, "labels": [2, 0, 0, 0, 1, 0]},
        ],
    },
    "layers that LoRA excludes": {"rows": [ROW], "lora": {"r": 2, "exclude_modules": ["q_proj"]}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe(name, base_checkpoint, tmp_path, monkeypatch, capsys, no_plot):
    monkeypatch.chdir(tmp_path)
    given = RECIPES[name]
    beir(tmp_path / "beir")
    if "rows" in given:
        write(tmp_path / "rows.jsonl", lines(*given["rows"]))
    recipe = {
        "model": {"model_name_or_path": str(base_checkpoint)},
        "data": {"train": ["rows.jsonl" if "rows" in given else "beir"], "group_size": 3, **given.get("data", {})},
        "training": {"output_dir": "out", "max_steps": 2, "use_cpu": True, "report_to": "none", "logging_steps": 1}
        | {"disable_tqdm": True, "learning_rate": 1e-3, "warmup_steps": 0, **given.get("training", {})},
        **{block: given[block] for block in ("lora",) if block in given},
    }
    write(tmp_path / "recipe.yaml", yaml.safe_dump(recipe))
    assert main(["train", "recipe.yaml", "--dry-run"]) == 0
    capsys.readouterr()
    assert main(["train", "recipe.yaml"]) == 0
    history = read_history("out/history.jsonl")
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    assert all(np.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in history if "loss" in entry)
    reranker = CrossEncoder("out")
    scores = reranker.predict([("bees", text) for text in DOCUMENTS])
    assert np.isfinite(scores).all()
    assert len(set(scores.tolist())) == len(DOCUMENTS)
    if name == "instructions":
        assert reranker.config.instruction == "Why?"
    if name == "a collection in evaluation":
        assert [entry["eval_tiny_ndcg@10"] for entry in history if "eval_tiny_ndcg@10" in entry]
    if name == "layers that LoRA excludes":
        weights = {key for key, _ in reranker.model.named_parameters() if "lora_" in key}
        assert weights
        assert not any("q_proj" in key for key in weights)

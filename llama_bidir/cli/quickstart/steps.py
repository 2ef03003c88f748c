"""The steps of the quickstart."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ...checkpoints.files import CHECKPOINT_FILES
from ...checkpoints.model_card import write_model_card
from ...checkpoints.source import check_source
from ...cross_encoder import CrossEncoder
from ...data import load_rows
from ...evaluation import (
    Dataset,
    RerankerEvaluation,
    evaluate_reranker,
    evaluate_run,
    score_bm25,
    write_corpus,
    write_qrels,
    write_queries,
    write_run,
)
from ...training import train
from ...training.recipes import load_recipe
from ...utils.extras import require
from ...utils.outputs import whole_folder
from .checkpoint import make_checkpoint
from .collection import make_collection
from .plot import plot_ndcg

MEASURES = ("nDCG@10", "RR@10", "P@1")
MAX_TEST_ROWS = 400
NUM_SHUFFLES = 10


class QuickstartResult(NamedTuple):
    """
    The results of a quickstart.

    Attributes:
        scores: values by measure by system: `random order`, `BM25`, `before fine-tuning`, `after fine-tuning`.
        test_set: the held-out questions and their candidates, with the BM25 run.
        reranked: the run of the fine-tuned reranker: score by doc_id by query_id.
    """

    scores: dict[str, dict[str, float]]
    test_set: Dataset
    reranked: dict[str, dict[str, float]]


def run_quickstart(
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    model: str | None = None,
    train_file: str | os.PathLike[str] | None = None,
    training: dict[str, Any] | None = None,
    echo: Callable[[str], None] = lambda line: None,
) -> QuickstartResult:
    """
    Fine-tunes a reranker with the recipe `quickstart`, reloads it and compares it with BM25 and random order.

    Args:
        output: folder for the results: `train.jsonl`, `model/`, the test set as BEIR files, the runs as TREC files and
            `ndcg.png`. It appears when all steps are done.
        overwrite: replace the results of an earlier quickstart in `output`. Other files in it stay.
        model: checkpoint to fine-tune. By default, a small Llama is made.
        train_file: `.jsonl` or `.jsonl.gz` rows. A tenth of the rows, but at most 400, is held out for testing. By
            default, a collection is made.
        training: values of [`CrossEncoderTrainingArguments`] that replace those of the recipe.
        echo: called with one line about each step.

    Raises:
        ValueError: `train_file` has fewer than 10 rows, or a row without negatives.
        FileExistsError: `output` exists, and `overwrite` is False.
        ImportError: an extra is not installed.
    """
    if model is not None:
        check_source(model)
    for module in ("bm25s", "ir_measures", "matplotlib", "scipy"):
        require(module, "eval")
    with whole_folder(output, overwrite=overwrite, replaces=_is_replaced) as folder:
        made = model is None and train_file is None
        train_rows, test_rows = make_collection() if train_file is None else _split(train_file)
        _write_rows(folder / "train.jsonl", train_rows)
        test_set = make_test_set(test_rows)
        write_corpus(folder / "corpus.jsonl", test_set.corpus)
        write_queries(folder / "queries.jsonl", test_set.queries)
        write_qrels(folder / "qrels.tsv", test_set.qrels)
        echo(
            f"{len(train_rows)} training questions; {len(test_set.queries)} held-out questions with "
            f"{sum(map(len, test_set.run.values())) / len(test_set.queries):.0f} candidate passages each"
        )
        if model is None:
            model = os.fspath(folder / "base")
            make_checkpoint(model, _texts(train_rows))
            echo("made a small Llama and its tokenizer")

        recipe = load_recipe(
            "quickstart",
            {
                "model": {"model_name_or_path": model},
                "data": {"train": [os.fspath(folder / "train.jsonl")], **({} if made else {"rerank_max_length": None})},
                "training": {"output_dir": os.fspath(folder / "model"), **(training or {})},
            },
        )
        echo("scoring the held-out questions before fine-tuning")
        base = _evaluate(CrossEncoder(model, max_length=recipe.data.rerank_max_length), test_set)
        echo(f"fine-tuning for {recipe.training.max_steps} steps")
        train(*recipe)

        echo("reloading the saved reranker through AutoModelForSequenceClassification")
        reloaded = CrossEncoder(
            AutoModelForSequenceClassification.from_pretrained(folder / "model"),
            AutoTokenizer.from_pretrained(folder / "model"),
        )
        write_model_card(folder / "model", reloaded.config, os.path.join(output, "model"))
        tuned = _evaluate(reloaded, test_set)

        for tag, run in (("bm25", test_set.run), ("before", base.run), ("after", tuned.run)):
            write_run(folder / f"run.{tag}.trec", run, tag)
        scores = {
            "random order": _average_over_shuffles(test_set),
            "BM25": base.before.aggregated,
            "before fine-tuning": base.after.aggregated,
            "after fine-tuning": tuned.after.aggregated,
        }
        plot_ndcg(folder / "ndcg.png", {name: measures["nDCG@10"] for name, measures in scores.items()})
    return QuickstartResult(scores, test_set, tuned.run)


def make_test_set(rows: list[dict[str, Any]]) -> Dataset:
    """
    Makes a retrieval collection of test rows.

    The passages of a row are the candidates of its query, scored with BM25. Equal passages are one document.
    """
    doc_ids: dict[str, str] = {}
    queries, qrels = {}, {}
    candidates: dict[str, list[str]] = {}
    for number, row in enumerate(rows):
        query_id = f"q{number}"
        passages = list(dict.fromkeys([*row["pos_doc"], *row["neg_doc"]]))
        ids = [doc_ids.setdefault(passage, f"d{len(doc_ids)}") for passage in passages]
        queries[query_id] = row["query"]
        qrels[query_id] = {doc_ids[passage]: 1 for passage in row["pos_doc"]}
        # The order is random because the positives are first in a row, and ties would favour them.
        candidates[query_id] = random.Random(number).sample(ids, len(ids))
    corpus = {doc_id: text for text, doc_id in doc_ids.items()}
    return Dataset(corpus, queries, qrels, score_bm25(corpus, queries, candidates))


def _is_replaced(file: PurePath) -> bool:
    """Returns whether a new quickstart removes a file: files of the two models of an earlier quickstart."""
    is_model = len(file.parts) > 1 and file.parts[0] in ("base", "model")
    return is_model and (file.parts[1].startswith("checkpoint-") or CHECKPOINT_FILES.fullmatch(file.name) is not None)


def _evaluate(cross_encoder: CrossEncoder, test_set: Dataset) -> RerankerEvaluation:
    return evaluate_reranker(cross_encoder, test_set, depth=None, measures=MEASURES, show_progress_bar=True)


def _average_over_shuffles(test_set: Dataset) -> dict[str, float]:
    totals = dict.fromkeys(MEASURES, 0.0)
    for seed in range(NUM_SHUFFLES):
        generator = random.Random(seed)
        run = {
            query_id: {doc_id: generator.random() for doc_id in doc_ids} for query_id, doc_ids in test_set.run.items()
        }
        for name, value in evaluate_run(test_set.qrels, run, MEASURES).items():
            totals[name] += value / NUM_SHUFFLES
    return totals


def _split(train_file: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = list(load_rows(train_file).shuffle(seed=42))
    num_test = min(MAX_TEST_ROWS, len(rows) // 10)
    if num_test == 0:
        raise ValueError(
            f"{os.fspath(train_file)}: there must be at least 10 rows, because a tenth is held out; got {len(rows)}"
        )
    for row in rows:
        if not row["neg_doc"]:
            raise ValueError(f"{os.fspath(train_file)}: the row of query {row['query']!r} must have a neg_doc")
    return rows[num_test:], rows[:num_test]


def _texts(rows: list[dict[str, Any]]) -> list[str]:
    return [text for row in rows for text in (row["query"], *row["pos_doc"], *row["neg_doc"])]


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

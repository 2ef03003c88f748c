"""Rows as FlagEmbedding and sentence-transformers write them, read as rows of our own schema."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..utils.validation import describe

# Fields of our schema, by those of FlagEmbedding.
FLAG_EMBEDDING = {
    "pos": "pos_doc",
    "neg": "neg_doc",
    "pos_scores": "pos_score",
    "neg_scores": "neg_score",
    "prompt": "instruction",
}
NEGATIVE = re.compile(r"negatives?(_\d+)?")
MAX_LABEL = 1e30
# What sentence-transformers takes for the label of a row.
LABELS = ("label", "labels", "score", "scores")


def read_foreign(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """
    Returns a row in the fields of our schema. A row with `pos_doc` is returned as it is.

    FlagEmbedding's rows have `query`, `pos`, `neg` and, optionally, `pos_scores`, `neg_scores` and `prompt`. Those of
    sentence-transformers have `query` (or `anchor`, `question`) and either `positive` with `negative`, `negative_1`,
    ..., or `docs` with `labels`: one number per document, above 0 if the document is relevant. If a row has a negative
    and no `positive`, `answer` is the positive.

    Args:
        row: any mapping.
        where: the name of the row in errors.

    Returns:
        the row, and a mapping from our field names to the source's names, for the fields that were renamed.

    Raises:
        ValueError: `docs` and `labels` do not fit each other, or there is a label or a score beside `positive`.
    """
    if row.get("pos_doc") is not None:
        return dict(row), {}
    if row.get("pos") is not None:
        return _rename(row, {name: ours for name, ours in FLAG_EMBEDDING.items() if row.get(ours) is None})
    renamed, names = _rename(row, {"anchor": "query"} if row.get("query", row.get("question")) is None else {})
    if row.get("docs") is not None and row.get("labels") is not None:
        fields = _split_by_label(row["docs"], row["labels"], where)
        return {**_without(renamed, "docs", "labels"), **fields}, {**names, "pos_doc": "docs", "neg_doc": "docs"}
    negatives = sorted((name for name in row if NEGATIVE.fullmatch(name) and row[name] is not None), key=_number)
    positive = "answer" if row.get("positive") is None and negatives else "positive"
    if row.get(positive) is None:
        return dict(row), {}
    for name in LABELS:
        if row.get(name) is not None and negatives:
            raise ValueError(
                f"{where}: {name} beside {positive} and {negatives[0]} is not read: give scores of a teacher as "
                "pos_score and neg_score, or leave it out"
            )
        if row.get(name) is not None:
            raise ValueError(
                f"{where}: a row with {positive} and {name} is a single pair, and training needs the passages of a "
                "query together: give rows with query, docs and labels, a list of passages and one number for each"
            )
    fields = {"pos_doc": row[positive], "neg_doc": row[negatives[0]] if len(negatives) == 1 else None}
    if len(negatives) > 1:
        fields["neg_doc"] = [row[name] for name in negatives]
    return {**_without(renamed, positive, *negatives), **fields}, {**names, "pos_doc": positive, "neg_doc": "negative"}


def _rename(row: Mapping[str, Any], names: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    given = {name: ours for name, ours in names.items() if row.get(name) is not None}
    kept = {name: value for name, value in row.items() if name not in given.values()}  # these are None
    renamed = {given.get(name, name): value for name, value in kept.items()}
    if "prompt" in given and isinstance(row["prompt"], str) and not row["prompt"]:  # it may be empty
        renamed["instruction"] = None
    return renamed, {ours: name for name, ours in given.items()}


def _without(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _number(name: str) -> int:
    return int(name.rpartition("_")[2]) if "_" in name else 0


def _split_by_label(docs: Any, labels: Any, where: str) -> dict[str, Any]:
    """Returns the fields of the passages: relevant ones with their grades, and the others."""
    docs, labels = (value.tolist() if hasattr(value, "tolist") else value for value in (docs, labels))
    if not isinstance(docs, list | tuple) or not isinstance(labels, list | tuple) or len(docs) != len(labels):
        raise ValueError(
            f"{where}: docs and labels must be lists of the same length, got {describe(docs)} and {describe(labels)}"
        )
    for index, label in enumerate(labels):
        if not isinstance(label, int | float | np.number) or not 0 <= label <= MAX_LABEL:
            raise ValueError(
                f"{where}: labels[{index}] must be a number of at least 0, the relevance of docs[{index}], got "
                f"{describe(label)}: teacher scores go into pos_score and neg_score"
            )
    for index, doc in enumerate(docs):  # here, because the lists below have other positions
        if not isinstance(doc, str | Mapping):
            raise ValueError(f"{where}: docs[{index}] must be a string or an object with a text, got {describe(doc)}")
    relevance = [float(label) for label in labels if label > 0]
    if not relevance:
        raise ValueError(f"{where}: labels must mark at least one of docs as relevant, with a number above 0")
    fields: dict[str, Any] = {
        "pos_doc": [doc for doc, label in zip(docs, labels, strict=True) if label > 0],
        "neg_doc": [doc for doc, label in zip(docs, labels, strict=True) if label == 0],
    }
    if set(relevance) != {1.0}:
        fields["pos_relevance"] = relevance
    return fields

"""One training row: its fields, its columns and its validation."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from ..utils.validation import check_text, describe
from .foreign_rows import read_foreign


class TrainingRow(NamedTuple):
    """
    A query with its relevant and its irrelevant passages, in the order of the source.

    Args:
        query: the text of the query.
        positives, negatives: the texts of the passages, at least one of them positive. While a source names documents
            of a corpus, these are row numbers of that corpus.
        positive_scores, negative_scores: teacher scores, one per passage; either both are given or neither.
        relevance: how relevant each positive is, above 0. None makes each 1.
        instruction: the text for the `{instruction}` of the template. None takes that of the checkpoint.
    """

    query: str
    positives: list[Any]
    negatives: list[Any]
    positive_scores: list[float] | None = None
    negative_scores: list[float] | None = None
    relevance: list[float] | None = None
    instruction: str | None = None


# The columns of rows, one per field of TrainingRow and in that order, and what each cell holds.
COLUMNS = {
    "query": "text",
    "pos_doc": "passages",
    "neg_doc": "passages",
    "pos_score": "numbers",
    "neg_score": "numbers",
    "pos_relevance": "numbers",
    "instruction": "text",
}
# Only datasets with a row that has these fields have these columns.
OPTIONAL_COLUMNS = ("pos_relevance", "instruction")
PASSAGE_COLUMNS = ("pos_doc", "neg_doc")


def read_passage(item: Any, where: str) -> str:
    """Returns the text of a passage, a string or an object with `text`; raises ValueError otherwise."""
    text = item.get("text") if isinstance(item, Mapping) else item
    if isinstance(item, Mapping) and not text and _has_image(item):
        raise ValueError(f"{where} has an image and no text: images are not supported, give the passage a text")
    if not isinstance(text, str):
        raise ValueError(f"{where} must be a string or an object with a text, got {describe(item)}")
    return check_text(where, text)


def parse_row(row: Any, where: str, read_passage: Callable[[Any, str], Any] = read_passage) -> TrainingRow:
    """
    Reads and checks a row of the training schema.

    Args:
        row: `query` (or `question`), `pos_doc` and, optionally, `neg_doc`, each a string, an object with `text`, or a
            list (tuple, numpy array) of those. Teacher scores are optional: `pos_score` and `neg_score`, each a list
            with one finite number per passage, or a number when the passage is not in a list. So is `pos_relevance`,
            whose numbers are above 0, and 1 where they are None, and `instruction`, a string. Fields that are None
            count as missing, and unknown fields are ignored. Rows of FlagEmbedding and sentence-transformers are read
            too (see [`~data.foreign_rows`]).
        where: the name of the row in errors, such as `train.jsonl:12`.
        read_passage: makes a passage of an entry of `pos_doc` or `neg_doc`, given the entry and its name in errors.

    Raises:
        ValueError: a field is missing or breaks its rule, with `where` and the field.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a row must be an object with query, pos_doc and neg_doc, got {describe(row)}")
    row, names = read_foreign(row, where)
    query = read_query(row, where)
    if row.get("pos_doc") is None:
        raise ValueError(f"{where}: pos_doc is missing; it must be a passage or a list of passages")
    positives, negatives = (
        _read_passages(row.get(field), names.get(field, field), where, read_passage) for field in PASSAGE_COLUMNS
    )
    if not positives:
        name = names.get("pos_doc", "pos_doc")
        raise ValueError(f"{where}: {name} must hold at least one passage, got {describe(row['pos_doc'])}")
    read_scores = partial(_read_numbers, row, where=where, names=names, read_number=_read_score)
    positive_scores = read_scores("pos_score", "pos_doc", len(positives))
    negative_scores = read_scores("neg_score", "neg_doc", len(negatives))
    if negatives and (positive_scores is None) != (negative_scores is None):
        given, missing = ("neg_score", "pos_score") if positive_scores is None else ("pos_score", "neg_score")
        given = names.get(given, given)
        raise ValueError(
            f"{where}: {missing} is missing although {given} is given; teacher scores must cover pos_doc and neg_doc"
        )
    relevance = _read_numbers(
        row, "pos_relevance", "pos_doc", len(positives), where=where, names=names, read_number=_read_relevance
    )
    scores = (None, None) if positive_scores is None else (positive_scores, negative_scores or [])
    instruction = row.get("instruction")
    if instruction is not None and not isinstance(instruction, str):
        name = names.get("instruction", "instruction")
        raise ValueError(f"{where}: {name} must be a string, got {describe(instruction)}")
    if instruction is not None:
        check_text(f"{where}: {names.get('instruction', 'instruction')}", instruction)
    return TrainingRow(query, positives, negatives, scores[0], scores[1], relevance, instruction)


def read_query(row: Mapping[str, Any], where: str) -> str:
    """Returns the query of a row; raises ValueError, naming the row, unless it is a string."""
    query = row.get("question") if row.get("query") is None else row["query"]
    if not isinstance(query, str):
        raise ValueError(f"{where}: query (or question) must be a string, got {describe(query)}")
    return check_text(f"{where}: query", query)


def drop_negatives(row: TrainingRow, mask: Sequence[bool]) -> tuple[TrainingRow, int]:
    """Returns a row without the negatives that `mask` marks and their scores, and the number of these negatives."""
    if not any(mask):
        return row, 0
    kept = [index for index, is_dropped in enumerate(mask) if not is_dropped]
    scores = None if row.negative_scores is None else [row.negative_scores[index] for index in kept]
    negatives = [row.negatives[index] for index in kept]
    return row._replace(negatives=negatives, negative_scores=scores), len(row.negatives) - len(kept)


def as_list(value: Any) -> list[Any]:
    """Returns the passages of a field, which may be None, a single one, a list, a tuple or an array."""
    value = _plain(value)
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def no_rows(path: object) -> ValueError:
    """The error of a JSON Lines file without rows."""
    return ValueError(f"{path}:1: the file has no rows; it needs one JSON object per line, with query and pos_doc")


def _has_image(item: Mapping[str, Any]) -> bool:
    # Not by truth value: an image may be an array, which has none.
    image = item.get("image")
    return image is not None and not (isinstance(image, str) and image == "")


def _plain(value: Any) -> Any:
    """Returns Python's lists and numbers in place of the arrays and tensors that a formatted dataset gives."""
    return value.tolist() if hasattr(value, "tolist") else value


def _read_passages(value: Any, field: str, where: str, read_passage: Callable[[Any, str], Any]) -> list[Any]:
    value = _plain(value)
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        return [read_passage(value, f"{where}: {field}")]
    return [read_passage(item, f"{where}: {field}[{index}]") for index, item in enumerate(value)]


def _read_numbers(
    row: Mapping[str, Any],
    field: str,
    passages: str,
    count: int,
    *,
    where: str,
    names: Mapping[str, str],
    read_number: Callable[[Any, str], float],
) -> list[float] | None:
    value, is_list = _plain(row.get(field)), isinstance(_plain(row.get(passages)), (list, tuple))
    field, passages = names.get(field, field), names.get(passages, passages)
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        if is_list:
            raise ValueError(f"{where}: {field} must be a list, as {passages} is one, got {describe(value)}")
        value, entries = [value], [field]
    else:
        entries = [f"{field}[{index}]" for index in range(len(value))]
    if len(value) != count:
        raise ValueError(
            f"{where}: {field} must hold one number for each of the {count} passages of {passages}, got {len(value)}"
        )
    return [read_number(item, f"{where}: {name}") for name, item in zip(entries, value, strict=True)]


def _read_score(value: Any, where: str) -> float:
    value = _plain(value)
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an int beyond the range of floats
        pass
    raise ValueError(f"{where} must be a finite number, got {describe(value)}")


def _read_relevance(value: Any, where: str) -> float:
    relevance = 1.0 if value is None else _read_score(value, where)
    if relevance <= 0:
        raise ValueError(
            f"{where} must be a number above 0, got {value!r}: a passage that is not relevant is a neg_doc"
        )
    return relevance

"""One training row and its validation."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from ..utils.validation import check_text, describe

Document = TypeVar("Document")


class TrainingRow(NamedTuple):
    """
    A query with its relevant and its irrelevant passages, in the order of the source.

    Args:
        query: the text of the query.
        positives, negatives: texts of the passages; there is at least one positive.
        positive_scores, negative_scores: teacher scores, one a passage; either both are given or neither.
    """

    query: str
    positives: list[str]
    negatives: list[str]
    positive_scores: list[float] | None = None
    negative_scores: list[float] | None = None


class Row(NamedTuple, Generic[Document]):
    """A [`TrainingRow`] whose passages are whatever the source keeps of them, such as row numbers of a corpus."""

    query: str
    positives: list[Document]
    negatives: list[Document]
    positive_scores: list[float] | None
    negative_scores: list[float] | None


def parse_row(row: Any, where: str) -> TrainingRow:
    """
    Reads a row of the training schema.

    Args:
        row: `query` (or `question`), `pos_doc` and, optionally, `neg_doc`, each a string, an object with `text`, or a
            list (tuple, numpy array) of those. Teacher scores are optional: `pos_score` and `neg_score`, each a list
            with one finite number a passage, or a number where the passage is not in a list. Fields that are None
            count as missing, other fields are ignored.
        where: what errors call the row, such as `train.jsonl:12`.

    Raises:
        ValueError: a field is missing or breaks its rule, with `where` and the field.
    """
    return TrainingRow(*read_row(row, where, read_text))


def read_row(row: Any, where: str, read_document: Callable[[Any, str], Document]) -> Row[Document]:
    """
    Reads a row of the training schema whose passages are given in the source's own way.

    Args:
        row, where: see [`parse_row`].
        read_document: makes a document of an entry of `pos_doc` or `neg_doc`, given the entry and what errors call it;
            raises ValueError where it cannot.

    Raises:
        ValueError: as [`parse_row`] does.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a row must be an object with query, pos_doc and neg_doc, got {describe(row)}")
    query = row.get("question") if row.get("query") is None else row["query"]
    if not isinstance(query, str):
        raise ValueError(f"{where}: query (or question) must be a string, got {describe(query)}")
    check_text(f"{where}: query", query)
    if row.get("pos_doc") is None:
        raise ValueError(f"{where}: pos_doc is missing; it must be a passage or a list of passages")
    positives = _read_documents(row, "pos_doc", where, read_document)
    if not positives:
        raise ValueError(f"{where}: pos_doc must hold at least one passage, got {describe(row['pos_doc'])}")
    negatives = _read_documents(row, "neg_doc", where, read_document)
    positive_scores = _read_scores(row, "pos_score", "pos_doc", len(positives), where)
    negative_scores = _read_scores(row, "neg_score", "neg_doc", len(negatives), where)
    if negatives and (positive_scores is None) != (negative_scores is None):
        given, missing = ("neg_score", "pos_score") if positive_scores is None else ("pos_score", "neg_score")
        raise ValueError(
            f"{where}: {missing} is missing although {given} is given; teacher scores must cover pos_doc and neg_doc"
        )
    return Row(query, positives, negatives, positive_scores, None if positive_scores is None else negative_scores or [])


def read_text(item: Any, where: str) -> str:
    """Returns the text of a passage, a string or an object with `text`; raises ValueError, naming it, otherwise."""
    text = item.get("text") if isinstance(item, Mapping) else item
    if isinstance(item, Mapping) and not text and _has_image(item):
        raise ValueError(f"{where} has an image and no text: images are not supported, give the passage a text")
    if not isinstance(text, str):
        raise ValueError(f"{where} must be a string or an object with a text, got {describe(item)}")
    return check_text(where, text)


def _has_image(item: Mapping[str, Any]) -> bool:
    # Not by truth value: an image may be an array, which has none.
    image = item.get("image")
    return image is not None and not (isinstance(image, str) and image == "")


def _plain(value: Any) -> Any:
    """Lists and numbers of Python in place of those of numpy and torch, which datasets give when so formatted."""
    return value.tolist() if hasattr(value, "tolist") else value


def _read_documents(
    row: Mapping[str, Any], field: str, where: str, read_document: Callable[[Any, str], Document]
) -> list[Document]:
    value = _plain(row.get(field))
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        return [read_document(value, f"{where}: {field}")]
    return [read_document(item, f"{where}: {field}[{index}]") for index, item in enumerate(value)]


def _read_scores(row: Mapping[str, Any], field: str, documents: str, count: int, where: str) -> list[float] | None:
    value = _plain(row.get(field))
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        if isinstance(_plain(row.get(documents)), (list, tuple)):
            raise ValueError(f"{where}: {field} must be a list, as {documents} is one, got {describe(value)}")
        value, names = [value], [field]
    else:
        names = [f"{field}[{index}]" for index in range(len(value))]
    if len(value) != count:
        raise ValueError(
            f"{where}: {field} must hold one number for each of the {count} passages of {documents}, got {len(value)}"
        )
    return [_read_score(item, f"{where}: {name}") for name, item in zip(names, value, strict=True)]


def _read_score(value: Any, where: str) -> float:
    value = _plain(value)
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an int beyond the range of floats
        pass
    raise ValueError(f"{where} must be a finite number, got {describe(value)}")

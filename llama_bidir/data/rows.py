"""One training row and its validation."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..validation import describe


class TrainingRow(NamedTuple):
    """A query with its relevant and its irrelevant passages, in the order of the source."""

    query: str
    positives: list[str]
    negatives: list[str]


def parse_row(row: Any, where: str) -> TrainingRow:
    """
    Reads a row of the training schema.

    Args:
        row: `query` (or `question`), `pos_doc` and, optionally, `neg_doc`, each a string, a list of strings or a list
            of mappings with `text`.
        where: what errors call the row, such as `train.jsonl:12`.

    Raises:
        ValueError: a field is missing or of another type, with `where` and the field.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a row must be an object with query, pos_doc and neg_doc, got {describe(row)}")
    query = row.get("question") if row.get("query") is None else row["query"]
    if not isinstance(query, str):
        raise ValueError(f"{where}: query (or question) must be a string, got {describe(query)}")
    if row.get("pos_doc") is None:
        raise ValueError(f"{where}: pos_doc is missing; it must be a passage or a list of passages")
    positives = _passages(row.get("pos_doc"), f"{where}: pos_doc")
    if not positives:
        raise ValueError(f"{where}: pos_doc must hold at least one passage, got {describe(row.get('pos_doc'))}")
    return TrainingRow(query, positives, _passages(row.get("neg_doc"), f"{where}: neg_doc"))


def _passages(value: Any, where: str) -> list[str]:
    values = [] if value is None else [value] if isinstance(value, (str, Mapping)) else value
    if not isinstance(values, list):
        raise ValueError(f"{where} must be a string or a list of passages, got {describe(value)}")
    passages = []
    for index, item in enumerate(values):
        text = item.get("text") if isinstance(item, Mapping) else item
        if not isinstance(text, str):
            raise ValueError(f"{where}[{index}] must be a string or an object with a text, got {describe(item)}")
        passages.append(text)
    return passages

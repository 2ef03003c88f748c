"""
Readers of BEIR and TREC files, with errors that name file and line.

A corpus and queries are JSON Lines, qrels BEIR's TSV or TREC's four columns, runs TREC's six; `.gz` is decompressed.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..utils.validation import check_text, describe
from .files import read_id, read_json_lines, read_lines

QRELS_HEADER = ["query-id", "corpus-id", "score"]
QRELS_RULES = {
    True: "3 columns separated by tabs (query-id, corpus-id, score)",
    False: "4 columns (query-id, 0, doc-id, relevance), or 3 separated by tabs under a line query-id, corpus-id, score",
}


class Judgement(NamedTuple):
    """A line of qrels: `relevance` is 1 or more for a relevant document."""

    line: int
    query_id: str
    doc_id: str
    relevance: int


class RunEntry(NamedTuple):
    """A line of a run: the document at a rank (from 1, as a rule) of a query."""

    line: int
    query_id: str
    doc_id: str
    rank: int
    score: float


def read_documents(path: Path) -> Iterator[tuple[str, str]]:
    """
    Yields identifier and text of the documents of a corpus (`_id`, `title`, `text`), in its order.

    A document's text is `title + " " + text`, or just `text` where there is no title.

    Raises:
        ValueError: a line breaks its rule, an `_id` comes twice, or there is no document, with file and line.
    """
    return _read_texts(path, "document")


def read_queries(path: Path) -> dict[str, str]:
    """
    Returns the text of each query of a JSON Lines file (`_id`, `text`), in its order.

    Raises:
        ValueError: a line breaks its rule, an `_id` comes twice, or there is no query, with file and line.
    """
    return dict(_read_texts(path, "query"))


def read_qrels(path: Path) -> Iterator[Judgement]:
    """
    Yields the judgements of a file, BEIR's TSV with its header or TREC's four columns, in its order.

    Raises:
        ValueError: a line breaks its rule or there is no judgement, with file and line.
    """
    judgement = None
    is_beir = False
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if judgement is None and not is_beir and line.split("\t") == QRELS_HEADER:
            is_beir = True
            continue
        columns = line.split("\t") if is_beir else line.split()
        if len(columns) != (3 if is_beir else 4) or not all(columns):
            rule = QRELS_RULES[is_beir]
            raise ValueError(
                f"{where}: a line of qrels must have {rule}, got {describe(line.strip())}; correct or remove it"
            )
        query_id, doc_id = columns[0], columns[-2]
        judgement = Judgement(number, query_id, doc_id, _read_int(columns[-1], f"{where}: score"))
        yield judgement
    if judgement is None:
        raise ValueError(f"{path}:1: the file has no judgements; it needs one a line")


def read_run(path: Path) -> Iterator[RunEntry]:
    """
    Yields the entries of a run in TREC's six columns, in the order of the file.

    Raises:
        ValueError: a line breaks its rule or there is no entry, with file and line.
    """
    entry = None
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        columns = line.split()
        if len(columns) != 6:
            raise ValueError(
                f"{where}: a line of a run must have 6 columns (query-id, Q0, doc-id, rank, score, tag), got "
                f"{describe(line.strip())}; correct or remove it"
            )
        query_id, _, doc_id, rank, score, _ = columns
        entry = RunEntry(
            number, query_id, doc_id, _read_int(rank, f"{where}: rank"), _read_float(score, f"{where}: score")
        )
        yield entry
    if entry is None:
        raise ValueError(f"{path}:1: the run has no entries; it needs one a line")


def _read_texts(path: Path, kind: str) -> Iterator[tuple[str, str]]:
    lines: dict[str, int] = {}
    for number, row in read_json_lines(path):
        where = f"{path}:{number}"
        identifier = read_id(row, "_id", where)
        if lines.setdefault(identifier, number) != number:
            raise ValueError(
                f"{where}: _id: the {kind} {identifier!r} is there already, in line {lines[identifier]}; keep one of "
                "the lines"
            )
        text = _read_text(row, "text", where)
        title = _read_text(row, "title", where) if kind == "document" and row.get("title") is not None else ""
        yield identifier, f"{title} {text}" if title else text
    if not lines:
        raise ValueError(f"{path}:1: the file has no lines; it needs one JSON object a line, one for each {kind}")


def _read_text(row: dict[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field} must be a string, got {describe(value)}; correct or remove the line")
    return check_text(f"{where}: {field}", value)


def _read_int(text: str, where: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{where} must be a whole number, got {text!r}; correct or remove the line") from None
    if abs(value) >= 2**31:
        raise ValueError(f"{where} must be a whole number of 32 bits, got {text!r}")
    return value


def _read_float(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {text!r}; correct or remove the line")
    return value

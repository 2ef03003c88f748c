"""
Qrels and runs: BEIR's TSV with its header or TREC's four columns, and TREC's six columns.

Readers decompress `.gz`, and their errors name file and line. Each rule of these files stands here and nowhere else.
"""

import logging
import math
import os
from array import array
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..utils.validation import describe
from .corpus import Corpus, Numbers, join_title, read_queries, read_titled_documents
from .files import BLANKS, check_file, read_lines

QRELS_HEADER = ["query-id", "corpus-id", "score"]
QRELS_RULES = {
    True: "3 columns separated by tabs (query-id, corpus-id, score)",
    False: "4 columns (query-id, 0, doc-id, relevance), or 3 separated by tabs under a line query-id, corpus-id, score",
}
UNKNOWN = -1
EXAMPLES = 5

logger = logging.getLogger(__name__)


class Judgement(NamedTuple):
    """A line of qrels: `relevance` is 1 or more for a relevant document."""

    line: int
    doc_id: str
    relevance: int


class RunEntry(NamedTuple):
    """A line of a run: the document at a rank (usually counted from 1) of a query."""

    line: int
    query_id: str
    doc_id: str
    rank: int
    score: float


def read_judgements(path: Path) -> dict[str, dict[str, Judgement]]:
    """
    Returns the judgements of each query by document, in the order of the file.

    Raises:
        ValueError: a line breaks its rule, a document is judged twice and differently, or there is no judgement, with
            file and line.
    """
    judgements: dict[str, dict[str, Judgement]] = {}
    header = ""
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if not judgements and not header and _is_header(line):
            header = line
            continue
        columns = _split_judgement(line, header)
        if len(columns) != (3 if header else 4) or not all(columns):
            raise _malformed(where, "qrels", QRELS_RULES[bool(header)], line)
        query_id, doc_id, relevance = columns[0], columns[-2], _read_int(columns[-1], f"{where}: score")
        judged = judgements.setdefault(query_id, {})
        first = judged.setdefault(doc_id, Judgement(number, doc_id, relevance))
        if first.relevance != relevance:
            raise ValueError(
                f"{where}: score: the document {doc_id!r} of query {query_id!r} is judged {relevance} here and "
                f"{first.relevance} in line {first.line}; keep one of the lines"
            )
    if not judgements:
        raise ValueError(f"{path}:1: the file has no judgements; it needs one per line")
    return judgements


def read_qrels(path: str | os.PathLike[str]) -> dict[str, dict[str, int]]:
    """
    Returns the relevance of each judged document by query.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line breaks its rule, or a document is judged twice and differently, with file and line.
    """
    judgements = read_judgements(check_file(path))
    return {
        query_id: {doc_id: judgement.relevance for doc_id, judgement in judged.items()}
        for query_id, judged in judgements.items()
    }


def write_qrels(path: str | os.PathLike[str], qrels: Mapping[str, Mapping[str, int]]) -> None:
    """Writes qrels as BEIR TSV with its header. Raises ValueError for an identifier that could not be read back."""
    for identifier in (*qrels, *(doc_id for docs in qrels.values() for doc_id in docs)):
        if not is_word(identifier.replace(" ", "_")) or identifier != identifier.strip(" "):
            raise ValueError(
                f"{os.fspath(path)}: the identifier {identifier!r} cannot be a column of qrels, because tabs "
                "separate the columns: rename it"
            )
    lines = ["\t".join(QRELS_HEADER)]
    lines += [f"{query_id}\t{doc_id}\t{value}" for query_id, docs in qrels.items() for doc_id, value in docs.items()]
    Path(path).write_bytes(("\n".join(lines) + "\n").encode())


def split_columns(line: str) -> list[str]:
    """Splits a line in TREC's format at spaces and tabs. Other white space is part of an identifier."""
    return [column for column in line.replace("\t", " ").split(" ") if column]


def is_word(text: str) -> bool:
    """Returns whether a text can be a column of a run: it is not empty and has no space, tab or line end."""
    return bool(text) and not any(blank in text for blank in BLANKS)


def iterate_run(path: Path) -> Iterator[RunEntry]:
    """
    Yields the entries of a run in the order of the file.

    Raises:
        ValueError: a line breaks its rule or there is no entry, with file and line.
    """
    entry = None
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        columns = split_columns(line)
        if len(columns) != 6:
            raise _malformed(where, "a run", "6 columns (query-id, Q0, doc-id, rank, score, tag)", line)
        query_id, _, doc_id, rank, score, _ = columns
        entry = RunEntry(
            number, query_id, doc_id, _read_int(rank, f"{where}: rank"), _read_float(score, f"{where}: score")
        )
        yield entry
    if entry is None:
        raise ValueError(f"{path}:1: the run has no entries; it needs one per line")


def read_run(path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """
    Returns the score of each document of a run by query. Like trec_eval, it ignores the ranks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line breaks its rule, or a query has a document twice, with file and line.
    """
    path = check_file(path)
    run: dict[str, dict[str, float]] = {}
    for line, query_id, doc_id, _, score in iterate_run(path):
        documents = run.setdefault(query_id, {})
        if doc_id in documents:
            # Read again, so that the lines of a valid run take no memory.
            entries = (entry for entry in iterate_run(path) if (entry.query_id, entry.doc_id) == (query_id, doc_id))
            raise _repeated_document(path, line, query_id, doc_id, next(entries).line)
        documents[doc_id] = score
    return run


def run_lines(query_id: str, doc_ids: Sequence[str], scores: Sequence[float], tag: str) -> Iterator[str]:
    """
    Yields the lines of a query in a run, ranked from 1 in the given order.

    Args:
        query_id, doc_ids, tag: words (see [`is_word`]).
        scores: one per document; reading them back gives the same floats.

    Raises:
        ValueError: an identifier or the tag is not a word, so the line could not be read back.
    """
    words = (query_id, *doc_ids, tag)
    if not all(words) or not is_word("".join(words)):
        word = next(word for word in words if not is_word(word))
        raise ValueError(
            f"{word!r}, of query {query_id!r}, is not one word, but blanks separate the columns of a run: rename it"
        )
    for rank, (doc_id, score) in enumerate(zip(doc_ids, scores, strict=True), start=1):
        yield f"{query_id} Q0 {doc_id} {rank} {float(score)!r} {tag}\n"


def write_run(path: str | os.PathLike[str], run: Mapping[str, Mapping[str, float]], tag: str) -> None:
    """Writes a run by falling score; equal scores keep their order."""
    lines: list[str] = []
    for query_id, scores in run.items():
        doc_ids = sorted(scores, key=lambda doc_id: -scores[doc_id])
        lines += run_lines(query_id, doc_ids, [scores[doc_id] for doc_id in doc_ids], tag)
    Path(path).write_bytes("".join(lines).encode())


class RankedRun:
    """
    The documents that a run lists for some queries, as row numbers of a corpus. An entry takes 24 bytes.

    Args:
        path: of the run.
        query_ids: the queries to keep.
        corpus: the documents.
        index: row number in the corpus by doc_id.
        source: the name of the source of the queries in errors.

    Raises:
        ValueError: a line breaks its rule, or the run has no entry for any of the queries.
    """

    def __init__(
        self, path: Path, query_ids: Collection[str], corpus: Corpus, *, index: Mapping[str, int], source: str
    ):
        self._path, self._corpus = path, corpus
        self._entries: dict[str, array[int]] = {}
        self._unknown: dict[int, str] = {}
        for line, query_id, doc_id, rank, _ in iterate_run(path):
            if query_id in query_ids:
                row = index.get(doc_id, UNKNOWN)
                self._entries.setdefault(query_id, array("q")).extend((rank, line, row))
                if row == UNKNOWN:
                    self._unknown[line] = doc_id
        if not self._entries:
            raise no_common_query(f"{path}: the run", source)

    def rows(self, query_id: str) -> list[int]:
        """
        Returns the row numbers of a query's documents by rank, in the order of the file where ranks are equal.

        Raises:
            ValueError: a document is not in the corpus or comes twice, with file and line.
        """
        entries = np.array(self._entries.get(query_id, ()), dtype=np.int64).reshape(-1, 3)
        for line in entries[entries[:, 2] == UNKNOWN, 1].tolist():
            raise unknown_id(f"{self._path}:{line}: doc-id", "document", self._unknown[line], self._corpus.name)
        return sort_entries(entries, self._path, query_id, self._corpus)[:, 2].tolist()


def sort_entries(entries: Numbers, path: Path, query_id: str, corpus: Corpus) -> Numbers:
    """
    Sorts the entries of a query by rank, and by line where ranks are equal.

    Args:
        entries: of shape `(num_entries, 3)`: rank, line and row number of a document in the corpus.
        path, query_id, corpus: for errors.

    Raises:
        ValueError: a document comes twice, with file and line.
    """
    ranks, lines, rows = entries.T
    if len(np.unique(rows)) < len(rows):
        first_lines: dict[int, int] = {}
        for line, row in sorted(zip(lines.tolist(), rows.tolist(), strict=True)):
            if (first := first_lines.setdefault(row, line)) != line:
                raise _repeated_document(path, line, query_id, corpus.ids([row])[0], first)
    return entries[np.lexsort((lines, ranks))]


def read_judged_queries(
    path: str | os.PathLike[str], qrels: Mapping[str, object], qrels_path: str | os.PathLike[str]
) -> dict[str, str]:
    """
    Returns the texts of the judged queries, in the order of the qrels. Queries without a text, as in NFCorpus, are left
    out with a warning.

    Args:
        path: the queries, JSON Lines (`_id`, `text`).
        qrels: the judgements by query.
        qrels_path: the file of the judgements, for errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line breaks its rule, or all judged queries are missing, with file and line.
    """
    texts = read_queries(check_file(path))
    missing = [query_id for query_id in qrels if query_id not in texts]
    if missing and len(missing) == len(qrels):
        first = next(iter(read_judgements(Path(qrels_path))[missing[0]].values()))
        raise unknown_id(f"{os.fspath(qrels_path)}:{first.line}: query-id", "query", missing[0], path)
    tell_missing(qrels_path, "judged queries", missing, path)
    return {query_id: texts[query_id] for query_id in qrels if query_id in texts}


def read_run_documents(
    path: str | os.PathLike[str],
    keep: Container[str],
    runs: Mapping[Path, Mapping[str, Mapping[str, float]]],
    *,
    see: Callable[[str, str, str], object] | None = None,
) -> dict[str, str]:
    """
    Returns the texts of some documents of a corpus. The other documents are not kept in memory.

    Args:
        path: the corpus, JSON Lines (`_id`, `title`, `text`).
        keep: the doc_ids of the documents to return.
        runs: runs by the file that they were read from. Every document that they list must be in the corpus.
        see: called with the doc_id, the title and the text of each document of the corpus.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line breaks its rule, or a document of a run is missing, with file and line.
    """
    unknown = {doc_id for run in runs.values() for documents in run.values() for doc_id in documents}
    texts = {}
    for doc_id, title, text in read_titled_documents(check_file(path)):
        unknown.discard(doc_id)
        if doc_id in keep:
            texts[doc_id] = join_title(title, text)
        if see is not None:
            see(doc_id, title, text)
    for run_path, run in runs.items() if unknown else ():
        for entry in iterate_run(run_path):
            if entry.doc_id in unknown and entry.doc_id in run.get(entry.query_id, ()):
                raise unknown_id(f"{run_path}:{entry.line}: doc-id", "document", entry.doc_id, path)
    return texts


def unknown_id(where: str, kind: str, identifier: str, path: str | os.PathLike[str]) -> ValueError:
    """The error of an identifier in a column of qrels or of a run that `path`, the corpus or the queries, lacks."""
    return ValueError(
        f"{where}: there is no {kind} {identifier!r} in {os.fspath(path)}; both files must be of the same dataset"
    )


def tell_missing(where: object, kind: str, identifiers: Sequence[str], path: str | os.PathLike[str]) -> None:
    """Warns about identifiers of the qrels that `path` (the corpus or the queries) lacks, if there are any."""
    if identifiers:
        examples = ", ".join(identifiers[:EXAMPLES]) + ", ..." * (len(identifiers) > EXAMPLES)
        logger.warning(f"{where}: left out {len(identifiers)} {kind} that {os.fspath(path)} lacks: {examples}")


def no_common_query(run: str, source: str) -> ValueError:
    """The error of a run that lists no query of its source, which may be the qrels or the training rows."""
    return ValueError(f"{run} has no entry for any query of {source}; both must be about the same queries")


def _repeated_document(path: Path, line: int, query_id: str, doc_id: str, first: int) -> ValueError:
    return ValueError(
        f"{path}:{line}: doc-id: the query {query_id!r} has the document {doc_id!r} already, in line {first}; keep one "
        "of the lines"
    )


def _is_header(line: str) -> bool:
    """Returns whether a line is BEIR's header. Case, quotes, and blanks around the names are ignored."""
    names = line.split("\t") if "\t" in line else split_columns(line)
    return [name.strip(BLANKS + "\"'").casefold().replace("_", "-") for name in names] == QRELS_HEADER


def _split_judgement(line: str, header: str) -> list[str]:
    """Splits a line of qrels as their header is split. Removes quotes around columns if the header has them."""
    if "\t" not in header:
        return split_columns(line)
    columns = [column.strip(BLANKS) for column in line.split("\t")]
    if header.lstrip(BLANKS)[0] in "\"'":
        quote = header.lstrip(BLANKS)[0]
        columns = [column.removeprefix(quote).removesuffix(quote) for column in columns]
    return columns


def _malformed(where: str, kind: str, rule: str, line: str) -> ValueError:
    shown = describe(line.strip(BLANKS))
    return ValueError(f"{where}: a line of {kind} must have {rule}, got {shown}; correct or remove it")


def _read_int(text: str, where: str) -> int:
    try:
        value = int(_check_digits(text))
    except ValueError:
        raise ValueError(f"{where} must be a whole number, got {text!r}; correct or remove the line") from None
    if abs(value) >= 2**31:
        raise ValueError(f"{where} must be a whole number of 32 bits, got {text!r}")
    return value


def _read_float(text: str, where: str) -> float:
    try:
        value = float(_check_digits(text))
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {text!r}; correct or remove the line")
    return value


def _check_digits(text: str) -> str:
    """Returns `text`. Raises ValueError for numbers that only Python reads: `1_0` (10), and digits of other scripts."""
    if "_" in text or not text.isascii() or text != text.strip():
        raise ValueError
    return text

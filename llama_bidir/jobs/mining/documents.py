"""Documents of a corpus by their identifiers, alone and as a run lists them for a query."""

import os
from array import array
from collections.abc import Collection
from pathlib import Path

from ...data.arrow import check_documents, index_documents
from ...data.corpus import Corpus
from ...data.trec import read_run


def number_documents(corpus: Corpus) -> dict[str, int]:
    """Returns the row number of each document by its identifier."""
    return index_documents(check_documents(corpus.dataset, os.fspath(corpus.path)))


def read_ranked(path: Path, corpus: Corpus, query_ids: Collection[str], depth: int) -> dict[str, "array[int]"]:
    """
    Reads the entries that a run has for some queries.

    Args:
        path: a run in TREC's six columns.
        corpus: what its documents are of.
        query_ids: the queries.
        depth: most documents of a query.

    Returns:
        the numbers of the documents of each query by rank, and in the order of the file where ranks are equal.

    Raises:
        ValueError: a line breaks its rule, a document is not in the corpus or comes twice, or there is no entry for any
            of the queries; with file and line.
    """
    index = number_documents(corpus)
    entries: dict[str, array[int]] = {}  # rank, line and number, flat: a run can have very many of them
    for entry in read_run(path):
        if entry.query_id not in query_ids:
            continue
        if entry.doc_id not in index:
            raise ValueError(
                f"{path}:{entry.line}: doc-id: there is no document {entry.doc_id!r} in {corpus.path}; give the corpus "
                "that the run was made from"
            )
        entries.setdefault(entry.query_id, array("q")).extend((entry.rank, entry.line, index[entry.doc_id]))
    if not entries:
        raise ValueError(f"{path}: the run has no entry for a query of the rows; they must be about the same queries")
    for query_id, flat in entries.items():
        lines: dict[int, int] = {}
        for _, line, number in sorted(zip(flat[::3], flat[1::3], flat[2::3], strict=True)):
            if lines.setdefault(number, line) != line:
                raise ValueError(
                    f"{path}:{line}: doc-id: the query has the document already, in line {lines[number]}; keep one of "
                    "the lines"
                )
        entries[query_id] = array("q", list(lines)[:depth])
    return entries

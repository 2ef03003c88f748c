"""First-stage candidates: a corpus, queries and a run, memory-mapped and cut into windows of whole queries."""

import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...data.arrow import DocumentFiles, FileStamp, check_documents, index_documents, stamp, write_dataset
from ...data.corpus import Corpus
from ...data.trec import read_queries, read_run
from ...scoring.pipeline import Pair
from ...utils.extras import require

if TYPE_CHECKING:
    from datasets import Dataset

Numbers = npt.NDArray[np.int64]


class QueryCandidates(NamedTuple):
    """A query and the row numbers of its documents in the corpus, by rank."""

    query_id: str
    text: str
    rows: Numbers


class Candidates:
    """
    The documents that a run lists for each query, memory-mapped. Queries without any are left out: query i is the i-th
    of those that have documents, in the order of the queries.

    Args:
        corpus: the documents.
        queries: text by query_id.
        blocks: what [`_generate_blocks`] made of the run.
        run: the run's path, for errors.

    Raises:
        ValueError: the run lists a document twice for a query, with file and line.
    """

    def __init__(self, corpus: Corpus, queries: Mapping[str, str], blocks: "Dataset", run: Path):
        pc = require("pyarrow.compute", "train")
        self.corpus, self._queries = corpus, list(queries.items())
        self._blocks = blocks.with_format("arrow")
        query_of_block = blocks.data.column("query").to_numpy()
        self._order = np.argsort(query_of_block, kind="stable")
        self._numbers, self._starts = np.unique(query_of_block[self._order], return_index=True)
        sizes = pc.list_value_length(blocks.data.column("row")).to_numpy().astype(np.int64)
        self.counts: Numbers = np.add.reduceat(sizes[self._order], self._starts)
        """How many documents each query has."""
        self._starts = np.append(self._starts, len(self._order))
        for query in np.flatnonzero(np.diff(self._starts) > 1):
            _by_rank(*self._read(int(query)), run)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def without_documents(self) -> list[str]:
        """The query_ids that the run does not list."""
        missing = np.ones(len(self._queries), dtype=bool)
        missing[self._numbers] = False
        return [self._queries[number][0] for number in np.flatnonzero(missing)]

    def __getitem__(self, query: int) -> QueryCandidates:
        query_id, text = self._queries[self._numbers[query]]
        ranks, lines, rows = self._read(query)
        return QueryCandidates(query_id, text, rows[np.lexsort((lines, ranks))])

    def windows(self, depth: int, window_pairs: int) -> list[range]:
        """
        Cuts the queries into windows: as many neighbours as have at most `window_pairs` documents within `depth`, or a
        single query that has more.
        """
        windows, start, num_pairs = [], 0, 0
        for query, count in enumerate(np.minimum(self.counts, depth).tolist()):
            if query > start and num_pairs + count > window_pairs:
                windows.append(range(start, query))
                start, num_pairs = query, 0
            num_pairs += count
        return [*windows, range(start, len(self))]

    def num_pairs(self, window: range, depth: int) -> int:
        return int(np.minimum(self.counts[window.start : window.stop], depth).sum())

    def pairs(self, window: range, depth: int) -> list[Pair]:
        """The pairs of a window: those of each query within `depth`, by rank."""
        groups = [self[query] for query in window]
        rows = np.unique(np.concatenate([group.rows[:depth] for group in groups])).tolist()
        texts = dict(zip(rows, self.corpus.texts(rows), strict=True))
        return [(group.text, texts[row]) for group in groups for row in group.rows[:depth].tolist()]

    def costs(self, windows: Sequence[range], depth: int, most_bytes: int) -> list[int]:
        """
        Bytes of text that each window has to score.

        Args:
            most_bytes: of a document, as the rest of it is cut.
        """
        sizes = np.minimum(self.corpus.text_bytes(), most_bytes)
        costs = []
        for window in windows:
            groups = [self[query] for query in window]
            costs.append(
                sum(
                    int(sizes[group.rows[:depth]].sum()) + len(group.text) * len(group.rows[:depth]) for group in groups
                )
            )
        return costs

    def _read(self, query: int) -> tuple[Numbers, Numbers, Numbers]:
        """Rank, line and row number of each document of a query."""
        blocks = self._blocks[self._order[self._starts[query] : self._starts[query + 1]].tolist()]
        return tuple(  # type: ignore[return-value]
            np.concatenate([chunk.flatten().to_numpy() for chunk in blocks[column].chunks])
            for column in ("rank", "line", "row")
        )


def open_candidates(
    corpus: Corpus,
    queries: Path,
    run: Path,
    *,
    texts: Mapping[str, str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Candidates:
    """
    Opens a run; the first time it is read and checked, and written as an Arrow file.

    Args:
        corpus: the documents.
        queries: BEIR's JSON Lines.
        run: TREC's six columns.
        texts: of the queries by query_id; read when not given.
        cache_dir: where the Arrow file is kept (see [`~data.arrow.write_dataset`]).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line breaks its rule, or names a query or a document that there is not, with file and line.
    """
    datasets = require("datasets", "train")
    numbers = [datasets.Value("int64")]
    features = datasets.Features(query=datasets.Value("int64"), rank=numbers, line=numbers, row=numbers)
    arguments = {
        "documents": check_documents(corpus.dataset, os.fspath(corpus.path)),
        "queries": os.fspath(queries),
        "run": os.fspath(run),
        "states": (stamp(queries), stamp(run)),
    }
    blocks = write_dataset(_generate_blocks, features, arguments, cache_dir)
    return Candidates(corpus, read_queries(queries) if texts is None else texts, blocks, run)


def _generate_blocks(
    documents: DocumentFiles, queries: str, run: str, states: tuple[FileStamp, ...], version: int
) -> Iterator[dict[str, Any]]:
    """
    Yields a record for each block of lines about one query, by rank. A run has one block a query as a rule, so that no
    more than one is in memory; one that goes back to a query has several.
    """
    index = index_documents(documents)
    numbers = {query_id: number for number, query_id in enumerate(read_queries(Path(queries)))}
    for query_id, entries in groupby(read_run(Path(run)), key=lambda entry: entry.query_id):
        block = array("q")
        for entry in entries:
            if query_id not in numbers:
                raise ValueError(
                    f"{run}:{entry.line}: query-id: there is no query {query_id!r} in {queries}: rerank with the "
                    "queries that the run was made from"
                )
            if entry.doc_id not in index:
                raise ValueError(
                    f"{run}:{entry.line}: doc-id: there is no document {entry.doc_id!r} in {documents.name}: rerank "
                    "with the corpus that the run was made from"
                )
            block.extend((entry.rank, entry.line, index[entry.doc_id]))
        ranks, lines, rows = np.frombuffer(block, dtype=np.int64).reshape(-1, 3).T
        order = _by_rank(ranks, lines, rows, Path(run))
        yield {"query": numbers[query_id], "rank": ranks[order], "line": lines[order], "row": rows[order]}


def _by_rank(ranks: Numbers, lines: Numbers, rows: Numbers, run: Path) -> Numbers:
    """The order by rank, and by line where ranks are equal; raises ValueError for a document that comes twice."""
    if len(np.unique(rows)) < len(rows):
        first_lines: dict[int, int] = {}
        for line, row in sorted(zip(lines.tolist(), rows.tolist(), strict=True)):
            if first_lines.setdefault(row, line) != line:
                raise ValueError(
                    f"{run}:{line}: doc-id: the query has the document already, in line {first_lines[row]}: keep one "
                    "of the lines"
                )
    return np.lexsort((lines, ranks))

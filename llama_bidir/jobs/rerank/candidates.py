"""First-stage candidates: the documents of a run by query, memory-mapped and cut into windows of whole queries."""

import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...data.arrow import FileStamp, stamp, write_dataset
from ...data.corpus import Corpus, Numbers, read_queries
from ...data.identical import find_identical
from ...data.trec import iterate_run, sort_entries, unknown_id
from ...prompts import Pair
from ...utils.extras import require

if TYPE_CHECKING:
    from datasets import Dataset


class QueryCandidates(NamedTuple):
    """A query and the row numbers of its documents in the corpus, by rank."""

    query_id: str
    text: str
    rows: Numbers


class Candidates:
    """
    The documents that a run lists for each query, memory-mapped. Query i is the i-th one that has documents, in the
    order of the queries.

    Args:
        corpus: the documents.
        queries: text by query_id.
        blocks: the records of [`_generate_blocks`].
        run: the path of the run, for errors.

    Raises:
        ValueError: the run lists a document twice for a query, with file and line.
    """

    def __init__(self, corpus: Corpus, queries: Mapping[str, str], blocks: "Dataset", run: Path):
        pc = require("pyarrow.compute", "train")
        self.corpus, self._queries, self._run = corpus, list(queries.items()), run
        self._blocks = blocks.with_format("arrow")
        query_of_block = blocks.data.column("query").to_numpy()
        self._order = np.argsort(query_of_block, kind="stable")
        self._numbers, self._starts = np.unique(query_of_block[self._order], return_index=True)
        self.num_identical: int = pc.sum(blocks.data.column("num_identical")).as_py()
        """How many documents were left out because they are the query itself."""
        sizes = pc.list_value_length(blocks.data.column("row")).to_numpy().astype(np.int64)
        self.counts: Numbers = np.add.reduceat(sizes[self._order], self._starts)
        """How many documents each query has."""
        self._starts = np.append(self._starts, len(self._order))
        for query in np.flatnonzero(np.diff(self._starts) > 1):
            self[int(query)]  # a document may come again in another block

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
        blocks = self._blocks[self._order[self._starts[query] : self._starts[query + 1]].tolist()]
        columns = (blocks[name].combine_chunks().flatten().to_numpy() for name in ("rank", "line", "row"))
        entries = sort_entries(np.stack(list(columns), axis=1), self._run, query_id, self.corpus)
        return QueryCandidates(query_id, text, entries[:, 2])

    def windows(self, depth: int, window_pairs: int) -> list[range]:
        """
        Cuts the queries into windows of neighbours.

        A window has at most `window_pairs` documents within `depth`, or a single query with more.
        """
        windows, start, num_pairs = [], 0, 0
        for query, count in enumerate(np.minimum(self.counts, depth).tolist()):
            if query > start and num_pairs + count > window_pairs:
                windows.append(range(start, query))
                start, num_pairs = query, 0
            num_pairs += count
        return [*windows, range(start, len(self))]

    def num_pairs(self, window: range, depth: int) -> int:
        """Returns the number of documents within `depth` of the queries of a window."""
        return int(np.minimum(self.counts[window.start : window.stop], depth).sum())

    def pairs(self, window: range, depth: int) -> list[Pair]:
        """Returns the pairs of a window: those of each query within `depth`, by rank."""
        groups = [self[query] for query in window]
        rows = np.unique(np.concatenate([group.rows[:depth] for group in groups])).tolist()
        texts = dict(zip(rows, self.corpus.texts(rows), strict=True))
        return [(group.text, texts[row]) for group in groups for row in group.rows[:depth].tolist()]

    def costs(self, windows: Sequence[range], depth: int, most_bytes: int) -> list[int]:
        """
        Returns the bytes of text that each window has to score.

        Args:
            windows: see [`windows`].
            depth: the largest number of documents per query.
            most_bytes: the most that count of a document, because the rest of it is cut.
        """
        sizes = np.minimum(self.corpus.text_bytes(), most_bytes)
        costs = []
        for window in windows:
            groups = [(len(group.text), group.rows[:depth]) for group in (self[query] for query in window)]
            costs.append(sum(int(sizes[rows].sum()) + length * len(rows) for length, rows in groups))
        return costs


def open_candidates(
    corpus: Corpus,
    queries: Path,
    run: Path,
    *,
    texts: Mapping[str, str] | None = None,
    ignore_identical_ids: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Candidates:
    """
    Opens a run. At the first opening, the run is read, checked and written as an Arrow file.

    Args:
        corpus: the documents.
        queries: BEIR's JSON Lines.
        run: a run in TREC's six columns.
        texts: the texts of the queries by query_id; None reads them from `queries`.
        ignore_identical_ids: leave out documents that are the query itself (see [`~data.identical`]).
        cache_dir: where the Arrow file is kept (see [`~data.arrow.write_dataset`]).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line breaks its rule, or names an unknown query or document, with file and line; or all documents
            are left out.
    """
    datasets = require("datasets", "train")
    numbers = [datasets.Value("int64")]
    number = datasets.Value("int64")
    features = datasets.Features(query=number, rank=numbers, line=numbers, row=numbers, num_identical=number)
    arguments = {
        "corpus": corpus,
        "queries": os.fspath(queries),
        "run": os.fspath(run),
        "ignore_identical_ids": ignore_identical_ids,
        "states": (stamp(queries), stamp(run)),
    }
    blocks = write_dataset(_generate_blocks, features, arguments, cache_dir)
    return Candidates(corpus, read_queries(queries) if texts is None else texts, blocks, run)


def _generate_blocks(
    corpus: Corpus, queries: str, run: str, ignore_identical_ids: bool, states: tuple[FileStamp, ...], version: int
) -> Iterator[dict[str, Any]]:
    """
    Yields a record for each block of lines about one query, by rank.

    Only one block is in memory at a time. A run usually has one block per query. If the lines of a query are not
    adjacent, it has several. The last record holds the number of all documents that were left out.
    """
    index = corpus.index()
    texts = read_queries(Path(queries))
    numbers = {query_id: number for number, query_id in enumerate(texts)}
    record, num_identical = None, 0
    for query_id, block in groupby(iterate_run(Path(run)), key=lambda entry: entry.query_id):
        flat = array("q")
        for entry in block:
            if query_id not in numbers:
                raise unknown_id(f"{run}:{entry.line}: query-id", "query", query_id, queries)
            if entry.doc_id not in index:
                raise unknown_id(f"{run}:{entry.line}: doc-id", "document", entry.doc_id, corpus.name)
            flat.extend((entry.rank, entry.line, index[entry.doc_id]))
        entries = sort_entries(np.frombuffer(flat, np.int64).reshape(-1, 3), Path(run), query_id, corpus)
        if ignore_identical_ids:
            mask = find_identical(corpus, query_id, texts[query_id], entries[:, 2], index)
            entries, num_identical = entries[~mask], num_identical + int(mask.sum())
        if not len(entries):
            continue
        if record is not None:
            yield record
        ranks, lines, rows = entries.T
        record = {"query": numbers[query_id], "rank": ranks, "line": lines, "row": rows, "num_identical": 0}
    if record is None:
        raise ValueError(
            f"{run}: every document is the query itself, so nothing is left to rerank: pass "
            "ignore_identical_ids=False (--no-ignore-identical-ids), or another run"
        )
    yield {**record, "num_identical": num_identical}

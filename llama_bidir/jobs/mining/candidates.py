"""Where the candidates of a row come from: its own `neg_doc`, BM25 over a corpus, or a run."""

import logging
from array import array
from collections.abc import Container
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...data import parse_row
from ...data.corpus import Corpus
from ...data.identical import SPARE_DOCUMENTS, find_identical, find_query_id, identify, is_query
from ...data.rows import as_list, no_rows, read_passage, read_query
from ...data.trec import RankedRun
from ...evaluation.bm25 import BM25
from .sources import MiningSource, SourceRow
from .windows import CandidateRow

logger = logging.getLogger(__name__)

KINDS = ("auto", "neg_doc", "bm25", "run")


class CandidateFinder:
    """
    Finds the candidates of rows.

    Args:
        source: the rows.
        kind: `neg_doc`, `bm25`, `run`, or `auto`: the run if there is one, else the `neg_doc` of a row, else BM25.
        corpus: the documents that BM25 searches and that a run lists.
        run: a run in TREC's six columns.
        depth: the largest number of candidates per row, known positives included.
        ignore_identical_ids: leave out documents that are the query itself (see [`~data.identical`]). They do not count
            for `depth`.

    Raises:
        ValueError: the kind is unknown, or needs a corpus or a run that is not given.
    """

    def __init__(
        self,
        source: MiningSource,
        kind: str,
        corpus: Corpus | None,
        run: Path | None,
        depth: int,
        *,
        ignore_identical_ids: bool = True,
    ):
        if kind not in KINDS:
            raise ValueError(f"candidates must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind = "run" if kind == "auto" and run is not None else kind
        if self.kind == "run" and run is None:
            raise ValueError("candidates of a run need the run: name it with run (--run)")
        if self.kind in ("bm25", "run") and corpus is None:
            raise ValueError(f"candidates of {self.kind} are documents of a corpus: name it with corpus (--corpus)")
        self._source, self._corpus, self._run, self._depth = source, corpus, run, depth
        self._ignore_identical_ids = ignore_identical_ids
        self._ranked: dict[str, array[int]] = {}
        self._num_identical: dict[str, int] = {}
        # Of queries that several rows have: what is relevant in one of them is not a negative in another.
        self._positives: dict[str, tuple[dict[str, None], set[str]]] = {}

    def check(self, name: str) -> int:
        """
        Reads all rows, and the run for them.

        Args:
            name: the name of the source in errors.

        Returns:
            the number of rows.

        Raises:
            ValueError: a row or the run breaks its rule, with file and line, or no row has a candidate.
        """
        num_rows = num_own = 0
        seen, repeated, queries = set[int](), set[int](), dict[str, str]()
        for row in self._source.read():
            num_rows += 1
            num_own += bool(as_list(row.fields.get("neg_doc")))
            query = parse_row(row.fields, row.where).query
            query_hash = hash(query)
            (repeated if query_hash in seen else seen).add(query_hash)
            if self.kind == "run":
                queries[row.query_id] = query
        if not num_rows:
            raise no_rows(name)
        if not num_own and (self._corpus is None or self.kind == "neg_doc"):
            raise ValueError(
                f"{name}: no row has candidates in neg_doc: name a corpus (--corpus), which BM25 then searches, or a "
                "run and its corpus (--run, --corpus)"
            )
        if self.kind == "auto" and self._corpus is not None and num_own == num_rows:
            logger.warning(
                f"{name}: all rows have candidates in neg_doc, so the corpus is not searched; --candidates bm25 does"
            )
        if self._corpus is not None and self._run is not None and self.kind == "run":
            index = self._corpus.index()
            run = RankedRun(self._run, queries, self._corpus, index=index, source="the rows")
            for query_id, query in queries.items():
                rows = np.array(run.rows(query_id), dtype=np.int64)
                if self._ignore_identical_ids:
                    mask = find_identical(self._corpus, query_id, query, rows, index)
                    rows, self._num_identical[query_id] = rows[~mask], int(mask.sum())
                self._ranked[query_id] = array("q", rows[: self._depth].tolist())
        if repeated:
            self._read_positives(repeated)
        return num_rows

    def find(self, row: SourceRow) -> CandidateRow:
        """Returns a row with its candidates as `neg_doc`, best first, and without scores."""
        query = read_query(row.fields, row.where)
        texts, ids = self._positives.get(query, ((), row.positive_ids))
        entries = [entry for entry in as_list(row.fields.get("neg_doc")) if not ids & identify(entry)]
        mask = [self._is_query(row, query, entry) for entry in entries]
        entries = [entry for entry, is_own in zip(entries, mask, strict=True) if not is_own][: self._depth]
        num_identical = sum(mask)
        if self._corpus is not None and (self.kind in ("bm25", "run") or (self.kind == "auto" and not entries)):
            if self.kind == "run":
                rows, num_identical = list(self._ranked[row.query_id]), self._num_identical.get(row.query_id, 0)
            else:
                rows, num_identical = self._search(self._corpus, row, query)
            documents = zip(self._corpus.ids(rows), self._corpus.texts(rows), strict=True)
            entries = [text for doc_id, text in documents if doc_id not in ids]
        # Any scores of the row belong to its former negatives.
        fields = {**row.fields, "neg_doc": entries, "pos_score": None, "neg_score": None}
        return CandidateRow(row.where, fields, tuple(texts), num_identical)

    def _is_query(self, row: SourceRow, query: str, entry: Any) -> bool:
        return self._ignore_identical_ids and is_query(
            find_query_id(row.fields), query, entry, read_passage(entry, f"{row.where}: neg_doc")
        )

    def _search(self, corpus: Corpus, row: SourceRow, query: str) -> tuple[list[int], int]:
        """Returns the rows that BM25 finds without the query itself, and how many rows were the query itself."""
        if not self._ignore_identical_ids:
            return self._bm25.search(query, self._depth)[0], 0
        rows = np.array(self._bm25.search(query, self._depth + SPARE_DOCUMENTS)[0], dtype=np.int64)
        mask = find_identical(corpus, find_query_id(row.fields), query, rows)
        return rows[~mask][: self._depth].tolist(), int(mask.sum())

    def _read_positives(self, query_hashes: Container[int]) -> None:
        for row in self._source.read():
            query, positives, *_ = parse_row(row.fields, row.where)
            if hash(query) in query_hashes:
                texts, ids = self._positives.setdefault(query, (dict[str, None](), set[str]()))
                texts.update(dict.fromkeys(positives))
                ids.update(row.positive_ids)

    @cached_property
    def _bm25(self) -> BM25:
        """The index of the corpus, made when the first row needs it."""
        if self._corpus is None:
            raise ValueError("BM25 searches a corpus, and there is none")
        return BM25(self._corpus.all_texts())

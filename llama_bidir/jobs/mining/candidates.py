"""Where the candidates of a row come from: its own `neg_doc`, BM25 over a corpus, or a run."""

import logging
from array import array
from collections.abc import Container
from functools import cached_property
from pathlib import Path

from ...data import parse_row
from ...data.corpus import Corpus
from ...data.rows import no_rows, read_query
from ...data.trec import RankedRun
from ...evaluation.bm25 import BM25
from .sources import MiningSource, SourceRow, identify
from .windows import CandidateRow, as_list

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

    Raises:
        ValueError: the kind is unknown, or needs a corpus or a run that is not given.
    """

    def __init__(self, source: MiningSource, kind: str, corpus: Corpus | None, run: Path | None, depth: int):
        if kind not in KINDS:
            raise ValueError(f"candidates must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind = "run" if kind == "auto" and run is not None else kind
        if self.kind == "run" and run is None:
            raise ValueError("candidates of a run need the run: name it with run (--run)")
        if self.kind in ("bm25", "run") and corpus is None:
            raise ValueError(f"candidates of {self.kind} are documents of a corpus: name it with corpus (--corpus)")
        self._source, self._corpus, self._run, self._depth = source, corpus, run, depth
        self._ranked: dict[str, array[int]] = {}
        # Of queries that several rows have: what is relevant in one of them is not a negative in another.
        self._positives: dict[str, tuple[dict[str, None], set[str]]] = {}

    def check(self, name: str) -> int:
        """
        Reads all rows, and the run for them.

        Args:
            name: what errors call the source.

        Returns:
            the number of rows.

        Raises:
            ValueError: a row or the run breaks its rule, with file and line, or no row has a candidate.
        """
        num_rows = num_own = 0
        seen, repeated, query_ids = set[int](), set[int](), dict[str, None]()
        for row in self._source.read():
            num_rows += 1
            num_own += bool(as_list(row.fields.get("neg_doc")))
            query_hash = hash(parse_row(row.fields, row.where).query)
            (repeated if query_hash in seen else seen).add(query_hash)
            if self.kind == "run":
                query_ids[row.query_id] = None
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
            run = RankedRun(self._run, query_ids, self._corpus, index=self._corpus.index(), source="the rows")
            self._ranked = {query_id: array("q", run.rows(query_id)[: self._depth]) for query_id in query_ids}
        if repeated:
            self._read_positives(repeated)
        return num_rows

    def find(self, row: SourceRow) -> CandidateRow:
        """Returns a row with its candidates as `neg_doc`, best first, and without scores."""
        query = read_query(row.fields, row.where)
        texts, ids = self._positives.get(query, ((), row.positive_ids))
        entries = [entry for entry in as_list(row.fields.get("neg_doc")) if not ids & identify(entry)][: self._depth]
        if self._corpus is not None and (self.kind in ("bm25", "run") or (self.kind == "auto" and not entries)):
            rows = self._ranked[row.query_id] if self.kind == "run" else self._bm25.search(query, self._depth)[0]
            documents = zip(self._corpus.ids(rows), self._corpus.texts(rows), strict=True)
            entries = [text for doc_id, text in documents if doc_id not in ids]
        # Any scores of the row belong to its former negatives.
        fields = {**row.fields, "neg_doc": entries, "pos_score": None, "neg_score": None}
        return CandidateRow(row.where, fields, tuple(texts))

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

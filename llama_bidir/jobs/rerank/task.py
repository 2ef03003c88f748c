"""Reranking of a first-stage run, or of what BM25 finds: files in, a file out."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from ...cross_encoder import CrossEncoder
from ...data.arrow import stamp
from ...data.corpus import open_corpus, read_queries
from ...data.identical import SPARE_DOCUMENTS, find_identical, tell_identical
from ...data.trec import is_word, run_lines
from ...evaluation.bm25 import rank_bm25
from ...evaluation.ranking import rank_candidates
from ...utils.extras import require
from ...utils.validation import check_int
from ..job import Job, JobResult, open_binary, run_job
from ..scoring import check_score
from ..task import TextPath, Window
from .candidates import open_candidates

logger = getLogger(__name__)

BM25_TAG = "bm25"
# English text has fewer. A document is cut behind the longest pair.
BYTES_PER_TOKEN = 4
EXAMPLES = 5


@dataclass(kw_only=True)
class RerankTask:
    """
    Describes reranking to a [`Job`]: windows of whole queries. The journal keeps the scores of each window.

    Args:
        corpus, queries, run, depth, tag, write_run, ignore_identical_ids, cache_dir: see [`rerank_run`].

    Raises:
        ValueError: an argument breaks its rule.
    """

    corpus: TextPath
    queries: TextPath
    run: TextPath | None = None
    depth: int = 100
    tag: str = "llama-bidir"
    write_run: TextPath | None = None
    ignore_identical_ids: bool = True
    cache_dir: TextPath | None = None

    verb = "rerank"
    label = "Reranking"
    activation_fn = None

    def __post_init__(self) -> None:
        self.depth = check_int("depth", self.depth)
        if not is_word(self.tag):
            raise ValueError(f"tag must be one word because it is a column of the run, got {self.tag!r}")
        if self.run is not None and self.write_run is not None:
            raise ValueError("write_run keeps the run that BM25 makes when none is given: leave out write_run or run")

    def open(self, beside: Callable[[str], Path]) -> None:
        """
        Reads and checks the input.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a line of a file breaks its rule, with file and line.
        """
        self._working_run = beside(self._bm25_name())
        self._documents = open_corpus(Path(self.corpus), self.cache_dir)
        self._texts = read_queries(Path(self.queries))
        if self.run is not None:
            self._open_run(Path(self.run))
        else:
            require("bm25s", "eval")
            self._check_words()

    def files(self) -> dict[str, Path | None]:
        run = None if self.run is None else Path(self.run)
        return {"corpus": Path(self.corpus), "queries": Path(self.queries), "run": run}

    def moves(self, beside: Callable[[str], Path]) -> dict[str, tuple[Path, Path]]:
        return {} if self.write_run is None else {"write_run": (beside(self._bm25_name()), Path(self.write_run))}

    def describe(self) -> dict[str, Any]:
        stamps = {
            f"{name}.{field}": value
            for name, path in self.files().items()
            if path is not None
            for field, value in stamp(path)._asdict().items()
        }
        options = {"depth": self.depth, "tag": self.tag, "ignore_identical_ids": self.ignore_identical_ids}
        return {"run.path": None, **stamps, **options}

    def working_files(self) -> list[Path]:
        return [] if self.run is not None else [self._working_run]

    def prepare(self) -> None:
        """Makes the run if none is given. Raises ValueError if BM25 finds nothing."""
        if self.run is not None:
            return
        num_documents = num_identical = 0
        spare = SPARE_DOCUMENTS if self.ignore_identical_ids else 0
        with open_binary(self._working_run, is_compressed=self._working_run.suffix == ".gz") as file:
            rankings = rank_bm25(self._documents.all_texts(), self._texts.values(), self.depth + spare)
            for (query_id, text), (rows, scores) in zip(self._texts.items(), rankings, strict=True):
                ids = self._documents.ids(rows) if rows else []
                if self.ignore_identical_ids:
                    mask = find_identical(self._documents, query_id, text, rows)
                    kept = np.flatnonzero(~mask).tolist()
                    ids, scores = [ids[place] for place in kept], [scores[place] for place in kept]
                    num_identical += int(mask.sum())
                ids, scores = ids[: self.depth], scores[: self.depth]
                file.writelines(line.encode() for line in run_lines(query_id, ids, scores, BM25_TAG))
                num_documents += len(ids)
        tell_identical(self.corpus, num_identical)
        if not num_documents:
            self._working_run.unlink()
            raise ValueError(
                f"{self.queries}: no query shares a word with a document of {self.corpus}, so BM25 finds nothing to "
                "rerank: give a run (--run), or the corpus that the queries are about"
            )

    def cut(self, window_pairs: int) -> list[range]:
        if self.run is None:
            self._open_run(self._working_run)
        tell_identical(self.run or self.corpus, self._candidates.num_identical)
        if missing := self._candidates.without_documents:
            examples = ", ".join(missing[:EXAMPLES]) + ", ..." * (len(missing) > EXAMPLES)
            logger.warning(
                f"{len(missing)} of {len(self._texts)} queries have no candidates and thus no line in the output: "
                f"{examples}"
            )
        return self._candidates.windows(self.depth, window_pairs)

    def num_pairs(self, window: range) -> int:
        return self._candidates.num_pairs(window, self.depth)

    def costs(self, windows: Sequence[range], max_length: int) -> list[int]:
        """Bytes of text."""
        return self._candidates.costs(windows, self.depth, BYTES_PER_TOKEN * max_length)

    def read(self, windows: Iterable[range]) -> Iterator[Window]:
        for window in windows:
            yield Window(self._candidates.pairs(window, self.depth), window)

    def record(self, window: Window, scores: list[float]) -> bytes:
        """The scores as float32."""
        values = np.asarray(scores, dtype=np.float32)
        if not np.isfinite(values).all():
            for query_id, doc_ids, query_scores in self._split(window.source, values):
                for doc_id, score in zip(doc_ids, query_scores.tolist(), strict=False):
                    check_score(f"the score of document {doc_id!r} for query {query_id!r}", score)
        return values.tobytes()

    def write(self, windows: Sequence[range], records: Iterator[bytes], file: IO[bytes]) -> dict[str, Any]:
        """A run in TREC's six columns, with the queries in the order of the queries file."""
        for window, record in zip(windows, records, strict=True):
            for query_id, doc_ids, scores in self._split(window, np.frombuffer(record, dtype=np.float32)):
                order, ranked = rank_candidates(scores.tolist(), len(doc_ids))
                lines = run_lines(query_id, [doc_ids[place] for place in order], ranked, self.tag)
                file.writelines(line.encode() for line in lines)
        return {}

    def for_actors(self) -> Self:
        cache_dir = None if self.cache_dir is None else os.path.abspath(self.cache_dir)
        corpus, queries, run = map(os.path.abspath, (self.corpus, self.queries, self.run or self._working_run))
        return replace(self, corpus=corpus, queries=queries, run=run, cache_dir=cache_dir, write_run=None)

    def _bm25_name(self) -> str:
        is_compressed = self.write_run is not None and Path(self.write_run).suffix.lower() == ".gz"
        return "bm25.gz" if is_compressed else "bm25"

    def _split(self, window: range, scores: np.ndarray) -> Iterator[tuple[str, list[str], np.ndarray]]:
        """Yields query_id, all doc_ids by rank, and the scores of the first of them, for each query of a window."""
        start = 0
        for query in window:
            query_id, _, rows = self._candidates[query]
            stop = start + min(len(rows), self.depth)
            yield query_id, self._documents.ids(rows.tolist()), scores[start:stop]
            start = stop

    def _open_run(self, run: Path) -> None:
        queries = Path(self.queries)
        self._candidates = open_candidates(
            self._documents,
            queries,
            run,
            texts=self._texts,
            ignore_identical_ids=self.ignore_identical_ids,
            cache_dir=self.cache_dir,
        )

    def _check_words(self) -> None:
        """Raises ValueError for an identifier that cannot be a column of the run that BM25 makes."""
        for path, identifiers in ((self.queries, self._texts), (self.corpus, self._documents.all_ids())):
            for name in identifiers:
                if not is_word(name):
                    raise ValueError(
                        f"{path}: _id: {name!r} is not one word, which a column of a run must be: rename it"
                    )


def rerank_run(
    cross_encoder: CrossEncoder,
    *,
    corpus: TextPath,
    queries: TextPath,
    output: TextPath,
    run: TextPath | None = None,
    depth: int = 100,
    batch_size: int | None = None,
    max_tokens_per_batch: int | None = None,
    tag: str = "llama-bidir",
    write_run: TextPath | None = None,
    ignore_identical_ids: bool = True,
    overwrite: bool = False,
    cache_dir: TextPath | None = None,
    show_progress_bar: bool | None = None,
) -> JobResult:
    """
    Reranks a first-stage run from files to a file. A job that was killed resumes when you call this again.

    Under torchrun, every process calls this with the same arguments. They share the windows of queries, and the first
    one writes the output, so all machines must share its folder.

    Args:
        cross_encoder: a model with one label.
        corpus: BEIR's JSON Lines (`_id`, `title`, `text`). This file and the next two may be compressed (`.gz`).
        queries: BEIR's JSON Lines (`_id`, `text`).
        output: the run to write, in TREC's six columns, compressed if its name ends in `.gz`. Queries are in the order
            of the queries file, and those without candidates have no line.
        run: a run in TREC's six columns. When not given, BM25 ranks the corpus for each query.
        depth: how many documents of each query are scored, the first by rank. The others keep their order below them
            (see [`rank_candidates`]).
        batch_size, max_tokens_per_batch: as in [`CrossEncoder.predict`].
        tag: the last column of the output.
        write_run: where to keep the run that BM25 makes.
        ignore_identical_ids: leave out documents that are the query itself, as in ArguAna and Quora (see
            [`~data.identical`]), with a warning that counts them.
        overwrite: replace existing files at `output` and `write_run`, and drop a stopped job with different arguments.
        cache_dir: where the corpus and the run are kept as Arrow files; None is the cache of `datasets`.
        show_progress_bar: whether to show a progress bar. The default shows it if `llama_bidir.jobs.job` logs at INFO.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: `output` or `write_run` exists, and `overwrite` is not set.
        ValueError: an argument or a line of a file breaks its rule (with file and line), a stopped job had different
            arguments (with what changed), or the model has several labels.
        ScoreError: a score is NaN or infinite.
        RuntimeError: another process failed, or is writing to the same output.
    """
    task = RerankTask(
        corpus=corpus,
        queries=queries,
        run=run,
        depth=depth,
        tag=tag,
        write_run=write_run,
        ignore_identical_ids=ignore_identical_ids,
        cache_dir=cache_dir,
    )
    job = Job(task, output, overwrite=overwrite, batch_size=batch_size, max_tokens_per_batch=max_tokens_per_batch)
    return run_job(job, cross_encoder, show_progress_bar=show_progress_bar)

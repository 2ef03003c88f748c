"""A reranking job: what it reads, what it has done, and what it writes, whoever computes the scores."""

import gzip
import io
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from ...data.arrow import stamp
from ...data.corpus import open_corpus, read_queries
from ...data.trec import run_lines
from ...evaluation.bm25 import rank_bm25
from ...evaluation.ranking import rank_candidates
from ...scoring.pipeline import Pair
from ...utils.extras import require
from ...utils.outputs import check_apart, check_free
from ...utils.sharing import deal
from ...utils.validation import check_positive_int
from .candidates import Candidates, open_candidates
from .journal import Journal
from .ranks import Ranks, check_shared_file

logger = logging.getLogger(__name__)

TextPath = str | os.PathLike[str]

BM25_TAG = "bm25"
# Of a document in English; what lies behind the longest pair is cut.
BYTES_PER_TOKEN = 4
EXAMPLES = 5


class RerankJob:
    """
    Reads and checks the input of a job; then [`start`], [`record`] for each window, [`finish`], and [`close`] always.

    Args:
        corpus, queries, run, output, depth, batch_size, max_tokens_per_batch, tag, write_run, overwrite, cache_dir:
            see [`rerank_run`].

    Raises:
        FileNotFoundError, FileExistsError, ValueError: see [`rerank_run`].
    """

    def __init__(
        self,
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
        overwrite: bool = False,
        cache_dir: TextPath | None = None,
    ):
        for name, value in (
            ("depth", depth),
            ("batch_size", batch_size),
            ("max_tokens_per_batch", max_tokens_per_batch),
        ):
            check_positive_int(name, value)
        if len(tag.split()) != 1 or tag != tag.strip():
            raise ValueError(f"tag must be a word, as it is a column of the run, got {tag!r}")
        if run is not None and write_run is not None:
            raise ValueError("write_run is for the run that BM25 makes where none is given: leave it out, or the run")
        self.corpus_path, self.queries_path, self.output = Path(corpus), Path(queries), Path(output)
        self.run_path = None if run is None else Path(run)
        self.write_run = None if write_run is None else Path(write_run)
        inputs = {"corpus": self.corpus_path, "queries": self.queries_path, "run": self.run_path}
        check_apart(inputs, {"write_run": self.write_run, "output": self.output})
        self.depth, self.batch_size, self.max_tokens_per_batch = depth, batch_size, max_tokens_per_batch
        self.tag, self.overwrite, self.cache_dir = tag, overwrite, cache_dir
        self.ranks = Ranks()
        self.journal = Journal(self.output, rank=self.ranks.rank)
        self.settings: dict[str, Any] = {}
        self.windows: list[range] = []
        self._check_targets()
        self.corpus = open_corpus(self.corpus_path, cache_dir)
        self.queries = read_queries(self.queries_path)
        self._candidates = None if self.run_path is None else self._open_candidates(self.run_path)
        if self.run_path is None:
            require("bm25s", "eval")
            self._check_words()

    @property
    def candidates(self) -> Candidates:
        """The queries that have documents, once there is a run."""
        if self._candidates is None:
            raise RuntimeError("there is no run before the job is started")
        return self._candidates

    @property
    def first_stage_run(self) -> Path:
        """The given run, or the one that BM25 makes."""
        is_compressed = self.write_run is not None and self.write_run.suffix.lower() == ".gz"
        return self.run_path or self.journal.beside("bm25.gz" if is_compressed else "bm25")

    def start(self, scoring: Mapping[str, Any], settings: Mapping[str, Any]) -> list[int]:
        """
        Begins the job, or goes on with it.

        Args:
            scoring: what decides a score, by name (see [`describe_scoring`]).
            settings: see [`choose_settings`]; those of the first start hold.

        Returns:
            the numbers of the windows that this process has to score.

        Raises:
            ValueError: the job had other arguments, with what has changed.
        """
        arguments = {**self._describe_input(), **scoring}
        self.settings = self.ranks.first(lambda: self._start_journal(arguments, settings))
        if self.ranks.rank:
            check_shared_file(self.journal.path, self.ranks)
            self.journal.read()
        if self.journal.is_finished:
            return []
        if self._candidates is None:
            self.ranks.first(self._rank_with_bm25)
            self._candidates = self._open_candidates(self.first_stage_run)
        self.windows = self.candidates.windows(self.depth, self.settings["window_pairs"])
        done = self.journal.done
        left = [number for number in range(len(self.windows)) if number not in done]
        if missing := self.candidates.without_documents:
            examples = ", ".join(missing[:EXAMPLES]) + ", ..." * (len(missing) > EXAMPLES)
            logger.warning(
                f"{len(missing)} of {len(self.queries)} queries have no candidates, and so no line in the output: "
                f"{examples}"
            )
        if done:
            logger.warning(
                f"going on from {self.journal.path}: {self.num_pairs(done)} of "
                f"{self.num_pairs(range(len(self.windows)))} pairs are scored"
            )
        # All processes have read the journal before one of them appends to it.
        self.ranks.wait()
        if self.ranks.size == 1:
            return left
        most_bytes = BYTES_PER_TOKEN * int(arguments["max_length"])
        costs = self.candidates.costs([self.windows[number] for number in left], self.depth, most_bytes)
        return [left[index] for index in deal(costs, self.ranks.size)[self.ranks.rank]]

    def num_pairs(self, numbers: Sequence[int] | set[int]) -> int:
        """Pairs of some windows."""
        return sum(self.candidates.num_pairs(self.windows[number], self.depth) for number in numbers)

    def pairs(self, number: int) -> list[Pair]:
        """Pairs of a window."""
        return self.candidates.pairs(self.windows[number], self.depth)

    def record(self, number: int, scores: Sequence[float]) -> None:
        """
        Keeps the scores of a window, float32 values.

        Raises:
            ValueError: a score is NaN or infinite.
        """
        window = self.windows[number]
        if len(scores) != self.candidates.num_pairs(window, self.depth):
            raise RuntimeError(f"window {number} has another number of pairs than the {len(scores)} scores")
        if not all(map(math.isfinite, scores)):
            for query_id, doc_ids, query_scores in self._split(window, scores):
                for doc_id, score in zip(doc_ids, query_scores, strict=False):
                    if not math.isfinite(score):
                        raise ValueError(
                            f"the score of document {doc_id!r} for query {query_id!r} is {score} and has no rank: "
                            "check the weights of the model, or use a dtype with more range"
                        )
        self.journal.append(number, scores)

    def finish(self) -> None:
        """
        Writes the run, when all processes have scored their windows, and removes the journal.

        Raises:
            FileExistsError: there is something at the output by now, and `overwrite` is not set.
            RuntimeError: another process has ended before.
        """
        self.ranks.wait()
        self.ranks.first(self._finish)

    def close(self) -> None:
        """Lets another start go on with the job."""
        self.journal.close()

    def _finish(self) -> None:
        if not self.journal.is_finished:
            self.journal.read()
            with _open_whole(self.journal.beside("run"), is_compressed=self.output.suffix.lower() == ".gz") as file:
                for number, window in enumerate(self.windows):
                    for query_id, doc_ids, scores in self._split(window, self.journal.scores(number)):
                        order, ranked = rank_candidates(scores, len(doc_ids))
                        file.writelines(run_lines(query_id, [doc_ids[place] for place in order], ranked, self.tag))
            self.journal.finish()
        self._check_targets()
        for working, target in self._targets():
            if working.exists():
                working.replace(target)
        self.journal.remove()

    def _split(self, window: range, scores: Sequence[float]) -> Iterator[tuple[str, list[str], Sequence[float]]]:
        """Yields query_id, all doc_ids by rank, and the scores of the first of them, for each query of a window."""
        start = 0
        for query in window:
            query_id, _, rows = self.candidates[query]
            stop = start + min(len(rows), self.depth)
            yield query_id, self.corpus.ids(rows.tolist()), scores[start:stop]
            start = stop

    def _describe_input(self) -> dict[str, Any]:
        files = {"corpus": self.corpus_path, "queries": self.queries_path}
        if self.run_path is not None:
            files["run"] = self.run_path
        named: dict[str, Any] = {
            f"{name}.{field}": value for name, path in files.items() for field, value in stamp(path)._asdict().items()
        }
        if self.run_path is None:
            named["run.path"] = None
        return {
            **named,
            "depth": self.depth,
            "batch_size": self.batch_size,
            "max_tokens_per_batch": self.max_tokens_per_batch,
            "tag": self.tag,
        }

    def _start_journal(self, arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        return self.journal.start(arguments, settings, overwrite=self.overwrite)

    def _rank_with_bm25(self) -> None:
        if self.first_stage_run.exists():
            return  # written by a start before this one
        with _open_whole(self.first_stage_run, is_compressed=self.first_stage_run.suffix == ".gz") as file:
            rankings = rank_bm25(self.corpus.all_texts(), self.queries.values(), self.depth)
            num_documents = 0
            for query_id, (rows, scores) in zip(self.queries, rankings, strict=True):
                file.writelines(run_lines(query_id, self.corpus.ids(rows) if rows else [], scores, BM25_TAG))
                num_documents += len(rows)
            if not num_documents:
                raise ValueError(
                    f"{self.queries_path}: no query shares a word with a document of {self.corpus_path}, so BM25 finds "
                    "nothing to rerank: give a run (--run), or the corpus that the queries are about"
                )

    def _check_words(self) -> None:
        """Raises ValueError for an identifier that cannot be a column of the run that BM25 makes."""
        for path, identifiers in ((self.queries_path, self.queries), (self.corpus_path, self.corpus.all_ids())):
            for name in identifiers:
                if name.split() != [name]:
                    raise ValueError(
                        f"{path}: _id: {name!r} is not one word, which a column of a run must be: rename it"
                    )

    def _open_candidates(self, run: Path) -> Candidates:
        return open_candidates(self.corpus, self.queries_path, run, texts=self.queries, cache_dir=self.cache_dir)

    def _targets(self) -> list[tuple[Path, Path]]:
        """Working files and where they go; the output is the last, as it says that all is done."""
        written = [] if self.write_run is None else [(self.first_stage_run, self.write_run)]
        return [*written, (self.journal.beside("run"), self.output)]

    def _check_targets(self) -> None:
        for working, target in self._targets():
            is_own = self.journal.is_finished and not working.exists()  # moved there just before a kill
            check_free(target, overwrite=self.overwrite or is_own, is_file=True)


@contextmanager
def _open_whole(path: Path, *, is_compressed: bool) -> Iterator[IO[str]]:
    """Gives a text file that appears at `path` when the block ends, safe from a loss of power, or not at all."""
    working = path.with_name(f"{path.name}.new")
    try:
        with working.open("wb") as raw:
            # Without a name and a time, the same text gives the same bytes.
            packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if is_compressed else raw
            with io.TextIOWrapper(cast(IO[bytes], packed), encoding="utf-8", newline="\n") as text:
                yield text
                text.flush()
                if is_compressed:
                    packed.close()
                raw.flush()
                os.fsync(raw.fileno())
        working.replace(path)
    finally:
        working.unlink(missing_ok=True)

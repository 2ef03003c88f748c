"""Reranking with a CrossEncoder in this process, or in each of those that torchrun has started."""

import logging
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from ...cross_encoder import CrossEncoder
from .job import RerankJob
from .scorer import WindowScorer, check_one_score, choose_settings, describe_scoring

logger = logging.getLogger(__name__)


class RerankResult(NamedTuple):
    """What a call did: the run it wrote, the pairs that this process scored, and the seconds that took."""

    output: Path
    num_pairs: int
    seconds: float


def rerank_run(
    cross_encoder: CrossEncoder,
    *,
    corpus: str | os.PathLike[str],
    queries: str | os.PathLike[str],
    output: str | os.PathLike[str],
    run: str | os.PathLike[str] | None = None,
    depth: int = 100,
    batch_size: int | None = None,
    max_tokens_per_batch: int | None = None,
    tag: str = "llama-bidir",
    write_run: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    show_progress_bar: bool | None = None,
) -> RerankResult:
    """
    Reranks a first-stage run with files in and a file out. A job that was killed goes on when it is called again.

    Under torchrun, every process calls this with the same arguments: the windows of queries are shared among them, and
    the first one writes the output. The folder of the output must then be shared.

    Args:
        cross_encoder: with one score a pair.
        corpus: BEIR's JSON Lines (`_id`, `title`, `text`); `.gz` is decompressed, as it is for the next two.
        queries: BEIR's JSON Lines (`_id`, `text`).
        output: the run to write, TREC's six columns; queries in the order of the queries file, and those without
            candidates have no line. Compressed where the name ends in `.gz`.
        run: TREC's six columns. When not given, BM25 ranks the corpus for each query.
        depth: documents of each query that are scored, the first by rank; the others keep their order below (see
            [`rank_candidates`]).
        batch_size, max_tokens_per_batch: as in [`CrossEncoder.predict`].
        tag: the last column of the output.
        write_run: where to keep the run that BM25 makes.
        overwrite: replace what is at `output` and `write_run`, and drop a stopped job of other arguments.
        cache_dir: where the corpus and the run are kept as Arrow files; None is the cache of `datasets`.
        show_progress_bar: shown when not given and this module logs at INFO.

    Raises:
        FileNotFoundError: a file is not there.
        FileExistsError: there is something at `output` or `write_run`, and `overwrite` is not set.
        ValueError: an argument or a line of a file breaks its rule (with file and line), a stopped job had other
            arguments (with what has changed), the model has several labels, or a score is NaN or infinite.
        RuntimeError: another process failed.
    """
    job = RerankJob(
        corpus=corpus,
        queries=queries,
        output=output,
        run=run,
        depth=depth,
        batch_size=batch_size,
        max_tokens_per_batch=max_tokens_per_batch,
        tag=tag,
        write_run=write_run,
        overwrite=overwrite,
        cache_dir=cache_dir,
    )
    return rerank_job(job, cross_encoder, show_progress_bar=show_progress_bar)


def rerank_job(job: RerankJob, cross_encoder: CrossEncoder, *, show_progress_bar: bool | None = None) -> RerankResult:
    """The same for a job whose input has been read, so that errors in it come before a model is loaded."""
    check_one_score(cross_encoder)
    if show_progress_bar is None:
        show_progress_bar = logger.isEnabledFor(logging.INFO)
    with closing(job):
        numbers = job.start(describe_scoring(cross_encoder), choose_settings(cross_encoder, job.max_tokens_per_batch))
        started = time.perf_counter()
        with progress_bar(job, numbers, is_shown=show_progress_bar) as progress:
            scorer = WindowScorer(
                cross_encoder,
                batch_size=job.batch_size,
                max_tokens_per_batch=job.settings["max_tokens_per_batch"],
                progress=progress,
            )
            windows = (job.pairs(number) for number in numbers)
            for number, scores in zip(numbers, scorer.score(windows), strict=True):
                job.record(number, scores)
        seconds = time.perf_counter() - started
        scorer.log()
        job.finish()
    return RerankResult(job.output, job.num_pairs(numbers), seconds)


def progress_bar(job: RerankJob, numbers: list[int], *, is_shown: bool) -> "tqdm[Any]":
    """A bar of pairs: of the whole job, or of the windows of the first process among several."""
    is_alone = job.ranks.size == 1
    total, left = job.num_pairs(range(len(job.windows))), job.num_pairs(numbers)
    return tqdm(
        total=total if is_alone else left,
        initial=total - left if is_alone else 0,
        desc="Reranking" if is_alone else f"Reranking, process 0 of {job.ranks.size}",
        unit="pair",
        disable=not is_shown or job.ranks.rank > 0,
    )

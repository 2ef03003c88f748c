"""Reranking on a Ray cluster: an actor for people's own pipelines, and the engine of `rerank --engine ray`."""

import os
import time
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ...cross_encoder import CrossEncoder
from ...data.corpus import open_corpus
from ...utils.extras import require
from .candidates import open_candidates
from .job import RerankJob
from .local import RerankResult, progress_bar
from .scorer import WindowScorer, check_one_score, choose_settings, describe_scoring

# Blocks of windows that Ray hands out: what an actor that dies has to do again.
MOST_BLOCKS = 10_000


class CrossEncoderActor:
    """
    Scores the pairs of a batch; for `ray.data.Dataset.map_batches`, which makes one an actor.

        scored = pairs.map_batches(
            CrossEncoderActor, fn_constructor_args=("my-reranker",), concurrency=8, num_gpus=1, batch_size=4096
        )

    Args:
        args, kwargs: of [`CrossEncoder`].
        query_column, passage_column: hold the strings of each pair.
        score_column: is added, float32.
        batch_size: at most so many pairs a forward pass; by tokens when not given.
    """

    def __init__(
        self,
        *args: Any,
        query_column: str = "query",
        passage_column: str = "passage",
        score_column: str = "score",
        batch_size: int | None = None,
        **kwargs: Any,
    ):
        self.columns, self.score_column, self.batch_size = (query_column, passage_column), score_column, batch_size
        self.cross_encoder = CrossEncoder(*args, **{"distributed": False, **kwargs})

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """
        Returns the batch with scores.

        Raises:
            ValueError: a column is missing.
        """
        for column in self.columns:
            if column not in batch:
                raise ValueError(
                    f"the batch has no column {column!r}, only {', '.join(batch)}: name query_column and passage_column"
                )
        pairs = list(zip(*(batch[column] for column in self.columns), strict=True))
        scores = self.cross_encoder.predict(pairs, self.batch_size, show_progress_bar=False)
        return {**batch, self.score_column: scores}


def rerank_with_ray(
    job: RerankJob,
    model: str,
    model_arguments: Mapping[str, Any] | None = None,
    *,
    num_actors: int | None = None,
    gpus_per_actor: float | None = None,
    cpus_per_actor: float = 1,
    show_progress_bar: bool = False,
) -> RerankResult:
    """
    Does a job with Ray Data: a `map_batches` over the numbers of its windows. Actors read corpus, queries and run
    themselves, so that all machines must see the files; what travels is numbers and scores. An actor that dies is
    replaced and its windows are given out again, and the journal takes each window once.

    Args:
        job: see [`RerankJob`].
        model, model_arguments: of [`CrossEncoder`], in each actor.
        num_actors: how many; one for each GPU of the cluster when not given, or for each `cpus_per_actor` without any.
        gpus_per_actor: 1 when not given and the cluster has GPUs, else 0.
        cpus_per_actor: also the number of threads that Ray gives to an actor.
        show_progress_bar: of pairs.

    Raises:
        ImportError: Ray is not installed.
        ValueError, RuntimeError: see [`rerank_run`]; an error in an actor is raised as Ray's.
    """
    ray = require("ray", "ray")
    ray_data = require("ray.data", "ray")
    if job.ranks.size > 1:
        raise ValueError("the ray engine has processes of its own: start it without torchrun")
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    resources = ray.cluster_resources()
    num_gpus = resources.get("GPU", 0)
    if gpus_per_actor is None:
        gpus_per_actor = 1 if num_gpus else 0
    if num_actors is None:
        of_gpus = num_gpus / gpus_per_actor if gpus_per_actor else resources.get("CPU", 1) / cpus_per_actor
        num_actors = max(1, int(of_gpus))
    arguments = {"distributed": False, **(model_arguments or {})}
    model = os.path.abspath(model) if os.path.isdir(model) else model  # actors may work in another folder
    needs = {"num_gpus": gpus_per_actor, "num_cpus": cpus_per_actor}
    describe = ray.remote(**needs)(_describe)
    with closing(job):
        try:
            described = ray.get(describe.remote(model, arguments, job.max_tokens_per_batch))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # without the traceback of the actor in its text
        numbers = job.start(*described)
        started = time.perf_counter()
        if numbers:
            windows = ray_data.from_items(
                [{"window": number} for number in numbers], override_num_blocks=min(len(numbers), MOST_BLOCKS)
            )
            scored = windows.map_batches(
                _WindowActor,
                fn_constructor_args=(model, arguments, _inputs_of(job)),
                compute=ray_data.ActorPoolStrategy(size=num_actors),
                batch_size=1,
                **needs,
            )
            left = set(numbers)
            with progress_bar(job, numbers, is_shown=show_progress_bar) as progress:
                for row in scored.iter_rows():
                    number = int(row["window"])
                    if number in left:
                        left.remove(number)
                        scores = np.frombuffer(row["scores"], dtype=np.float32).tolist()
                        job.record(number, scores)
                        progress.update(len(scores))
            if left:
                raise RuntimeError(f"Ray has returned no scores of {len(left)} windows: start again to score them")
        seconds = time.perf_counter() - started
        job.finish()
    return RerankResult(job.output, job.num_pairs(numbers), seconds)


def _describe(
    model: str, arguments: Mapping[str, Any], max_tokens: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    cross_encoder = CrossEncoder(model, **arguments)
    check_one_score(cross_encoder)
    return describe_scoring(cross_encoder), choose_settings(cross_encoder, max_tokens)


def _inputs_of(job: RerankJob) -> dict[str, Any]:
    absolute = {
        name: os.path.abspath(path)
        for name, path in (("corpus", job.corpus_path), ("queries", job.queries_path), ("run", job.first_stage_run))
    }
    return {
        **absolute,
        "cache_dir": None if job.cache_dir is None else os.path.abspath(job.cache_dir),
        "depth": job.depth,
        "batch_size": job.batch_size,
        **job.settings,
    }


class _WindowActor:
    """Scores windows by number, as a single process would."""

    def __init__(self, model: str, arguments: Mapping[str, Any], inputs: Mapping[str, Any]):
        open_run = partial(open_candidates, cache_dir=inputs["cache_dir"])
        corpus = open_corpus(Path(inputs["corpus"]), inputs["cache_dir"])
        self.candidates = open_run(corpus, Path(inputs["queries"]), Path(inputs["run"]))
        self.depth = inputs["depth"]
        self.windows = self.candidates.windows(self.depth, inputs["window_pairs"])
        self.scorer = WindowScorer(
            CrossEncoder(model, **arguments),
            batch_size=inputs["batch_size"],
            max_tokens_per_batch=inputs["max_tokens_per_batch"],
            progress=tqdm(disable=True),
        )

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        numbers = [int(number) for number in batch["window"]]
        pairs = [self.candidates.pairs(self.windows[number], self.depth) for number in numbers]
        scores = [np.asarray(values, dtype=np.float32).tobytes() for values in self.scorer.score(pairs)]
        return {"window": numbers, "scores": scores}

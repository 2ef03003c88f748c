"""Scoring on a Ray cluster: an actor for your own pipelines, and the engine of `--engine ray`."""

import os
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..cross_encoder import CrossEncoder
from ..utils.extras import require
from .job import Job, JobResult, score_windows
from .scoring import fix_scoring
from .task import Limits, Task

# Ray hands out blocks of windows. An actor that dies loses its block.
MOST_BLOCKS = 10_000


class CrossEncoderActor:
    """
    Scores the pairs of a batch. `ray.data.Dataset.map_batches` makes one in each actor.

        scored = pairs.map_batches(
            CrossEncoderActor, fn_constructor_args=("my-reranker",), concurrency=8, num_gpus=1, batch_size=4096
        )

    Args:
        args, kwargs: of [`CrossEncoder`].
        query_column, passage_column: columns with the strings of each pair.
        score_column: the column that is added, float32.
        batch_size: most pairs per forward pass; limited by tokens alone when not given.
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


def run_with_ray(
    job: Job,
    model: str,
    model_arguments: Mapping[str, Any] | None = None,
    *,
    num_actors: int | None = None,
    gpus_per_actor: float | None = None,
    cpus_per_actor: float = 1,
    show_progress_bar: bool = False,
) -> JobResult:
    """
    Does a job with Ray Data: a `map_batches` over its windows. Actors read the input themselves, so all machines must
    see the files. Only windows and their records travel. Ray replaces an actor that dies and hands out its windows
    again, and the journal takes each window once.

    Args:
        job: the job, not started.
        model, model_arguments: of [`CrossEncoder`], in each actor.
        num_actors: one per GPU of the cluster when not given, or one per `cpus_per_actor` if it has none.
        gpus_per_actor: 1 when not given and the cluster has GPUs, else 0.
        cpus_per_actor: also the number of threads that Ray gives to an actor.
        show_progress_bar: of pairs.

    Raises:
        ImportError: Ray is not installed.
        ValueError, RuntimeError: see [`Job`]; an error in an actor is raised as Ray's.
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
    model_arguments = dict(model_arguments or {})
    model = os.path.abspath(model) if os.path.isdir(model) else model  # actors may have another working folder
    needs = {"num_gpus": gpus_per_actor, "num_cpus": cpus_per_actor}
    with closing(job):
        try:
            fix = ray.remote(**needs)(_fix_scoring)
            fixed = ray.get(fix.remote(model, model_arguments, job.task.label, job.limits.max_tokens_per_batch))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # without the traceback of the actor in its text
        numbers = job.start(*fixed)
        started = time.perf_counter()
        if numbers:
            items = [{"number": n, "start": job.windows[n].start, "stop": job.windows[n].stop} for n in numbers]
            scored = ray_data.from_items(items, override_num_blocks=min(len(numbers), MOST_BLOCKS)).map_batches(
                _WindowActor,
                fn_constructor_args=(model, model_arguments, job.task.for_actors(), job.limits),
                compute=ray_data.ActorPoolStrategy(size=num_actors),
                batch_size=1,
                **needs,
            )
            left = set(numbers)
            with job.progress_bar(numbers, is_shown=show_progress_bar) as progress:
                for row in scored.iter_rows():
                    number = int(row["number"])
                    if number in left:
                        left.remove(number)
                        job.journal.own.append(number, row["record"])
                        progress.update(job.num_pairs([number]))
            if left:
                raise RuntimeError(f"Ray returned no scores for {len(left)} windows: start again to score them")
        seconds = time.perf_counter() - started
        job.finish()
    return JobResult(job.output, job.num_pairs(numbers), seconds)


def _fix_scoring(model: str, arguments: Mapping[str, Any], *args: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return fix_scoring(CrossEncoder(model, **arguments), *args)


class _WindowActor:
    """Makes the records of windows as a single process would."""

    def __init__(self, model: str, arguments: Mapping[str, Any], task: Task, limits: Limits):
        self.task, self.limits = task, limits
        self.task.open(Path)  # where its working files are does not matter: it has them all
        self.cross_encoder = CrossEncoder(model, **arguments)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        windows = [range(start, stop) for start, stop in zip(batch["start"], batch["stop"], strict=True)]
        records = score_windows(self.task, self.cross_encoder, windows, self.limits, tqdm(disable=True))
        return {"number": batch["number"], "record": list(records)}

"""Long work on windows of pairs that resumes: shared among processes, recorded window by window, written at the end."""

import gzip
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from itertools import tee
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from tqdm.auto import tqdm

from ..cross_encoder import CrossEncoder
from ..scoring.probability import rank_by
from ..utils.errors import naming
from ..utils.outputs import check_apart, check_free
from ..utils.sharing import deal
from ..utils.validation import check_positive_int
from .journal import Journal
from .ranks import Ranks, check_shared_file
from .scoring import fix_scoring, naming_the_cause
from .task import Limits, NothingToWriteError, Task, TextPath

logger = logging.getLogger(__name__)


class JobResult(NamedTuple):
    """What a call did: the file that it wrote, the pairs that this process scored, and the seconds that it took."""

    output: Path
    num_pairs: int
    seconds: float


class Job:
    """
    A task with its output and its state. Call [`start`], `journal.own.append` for each window, then [`finish`], and
    always [`close`].

    Args:
        task: not open yet; its input is read and checked here.
        output: the file to write, compressed if its name ends in `.gz`.
        overwrite: replace existing outputs, and drop a stopped job with different arguments.
        batch_size, max_tokens_per_batch: as in [`CrossEncoder.predict`].
        window_pairs: pairs per window, which a kill may lose; chosen for the device when not given.

    Raises:
        FileExistsError: there is an output already, and `overwrite` is not set.
        FileNotFoundError, ValueError: see the task.
        RuntimeError: another process is at work on the same output.
    """

    def __init__(
        self,
        task: Task,
        output: TextPath,
        *,
        overwrite: bool = False,
        batch_size: int | None = None,
        max_tokens_per_batch: int | None = None,
        window_pairs: int | None = None,
    ):
        self.task, self.output, self.overwrite = task, Path(output), overwrite
        self.limits = Limits(
            check_positive_int("batch_size", batch_size),
            check_positive_int("max_tokens_per_batch", max_tokens_per_batch),
        )
        self._window_pairs = check_positive_int("window_pairs", window_pairs)
        self.ranks = Ranks()
        self.journal = Journal(self.output, task.verb, rank=self.ranks.rank)
        self.windows: list[range] = []
        self.summary: dict[str, Any] = {}
        # The output is the last to move: when it is there, all is done.
        output_move = (self.journal.beside("output"), self.output)
        self._moves = {**task.moves(self.journal.beside), "output": output_move}
        self.ranks.first(self._check_targets)
        task.open(self.journal.beside)
        check_apart(task.files(), {name: target for name, (_, target) in self._moves.items()})

    def start(self, scoring: Mapping[str, Any], settings: Mapping[str, Any]) -> list[int]:
        """
        Starts the job or resumes it.

        Args:
            scoring, settings: see [`fix_scoring`]; the settings of the first start hold.

        Returns:
            the numbers of the windows that this process has to score.

        Raises:
            ValueError: the job had different arguments, with what changed.
        """
        settings = {**settings, "window_pairs": self._window_pairs or settings["window_pairs"]}
        arguments = {**self.task.describe(), **self.limits._asdict(), **scoring}
        settings, done = self.ranks.first(partial(self._start, arguments, settings))
        self.limits = self.limits._replace(max_tokens_per_batch=settings["max_tokens_per_batch"])
        if self.ranks.rank:
            check_shared_file(self.journal.path, self.ranks)
        if done is None:
            return []
        self.windows = self.task.cut(settings["window_pairs"])
        if done:
            logger.warning(
                f"resuming from {self.journal.path}: {self.num_pairs(done)} of "
                f"{self.num_pairs(range(len(self.windows)))} pairs are scored"
            )
        left = [number for number in range(len(self.windows)) if number not in done]
        if self.ranks.size == 1:
            return left
        costs = self.task.costs([self.windows[number] for number in left], int(arguments["max_length"]))
        return [left[index] for index in deal(costs, self.ranks.size)[self.ranks.rank]]

    def num_pairs(self, numbers: Iterable[int]) -> int:
        """Returns the number of pairs in some windows."""
        return sum(self.task.num_pairs(self.windows[number]) for number in numbers)

    def progress_bar(self, numbers: Sequence[int], *, is_shown: bool) -> "tqdm[Any]":
        """Returns a bar of pairs: those of the whole job, or of the first process's share if there are several."""
        is_alone = self.ranks.size == 1
        total, left = self.num_pairs(range(len(self.windows))), self.num_pairs(numbers)
        return tqdm(
            total=total if is_alone else left,
            initial=total - left if is_alone else 0,
            desc=self.task.label if is_alone else f"{self.task.label}, process 0 of {self.ranks.size}",
            unit="pair",
            disable=not is_shown or self.ranks.rank > 0,
        )

    def finish(self) -> None:
        """
        Writes the output when all processes have scored their windows, and removes the journal.

        Raises:
            FileExistsError: something has appeared at an output, and `overwrite` is not set.
            RuntimeError: another process ended too early.
            NothingToWriteError: the output would be empty.
        """
        if self.ranks.rank:
            self.close()  # the first process reads it
        self.ranks.wait()
        self.summary = self.ranks.first(self._finish)

    def close(self) -> None:
        """Lets another process resume the job."""
        self.journal.close()

    def _start(self, arguments: dict[str, Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], set[int] | None]:
        """Returns the settings that hold and the windows that are done, or None if the output is whole."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        settings = self.journal.start(arguments, settings, overwrite=self.overwrite)
        if self._is_whole():
            return settings, None
        if not (self.journal.own.get("prepared") and all(path.exists() for path in self.task.working_files())):
            self.journal.own.note("prepared", False)  # a kill may leave a part of a file
            self.task.prepare()
            self.journal.own.note("prepared", True)
        return settings, self.journal.done()

    def _finish(self) -> dict[str, Any]:
        if not self._is_whole():
            working = self._moves["output"][0]
            try:
                with open_binary(working, is_compressed=self.output.suffix.lower() == ".gz") as file:
                    summary = self.task.write(self.windows, self.journal.records(len(self.windows)), file)
            except NothingToWriteError:
                self.journal.remove()
                raise
            self.journal.own.note("finished", summary)
        summary = self.journal.own.get("finished")
        self._check_targets()
        for working, target in self._moves.values():
            if working.exists():
                working.replace(target)
        self.journal.remove()
        return summary

    def _is_whole(self) -> bool:
        """Returns whether the output was written, although it may not have been moved yet."""
        return self.journal.own.get("finished") is not None and any(path.exists() for path in self._moves["output"])

    def _check_targets(self) -> None:
        for working, target in self._moves.values():
            # A process may have been killed after it moved the file.
            is_own = target.is_file() and not working.exists() and self.journal.was_finished()
            check_free(target, overwrite=self.overwrite or is_own, is_file=True)


def run_job(job: Job, cross_encoder: CrossEncoder, *, show_progress_bar: bool | None = None) -> JobResult:
    """
    Does a job in this process. Under torchrun, every process calls this, and they share the windows of the job.

    Args:
        job: the job, which has not started.
        cross_encoder: a model with one label.
        show_progress_bar: whether to show a progress bar. The default shows it if this module logs at INFO.

    Raises:
        RuntimeError: the journal cannot be written, for example because the disk is full. The message has its path.
    """
    if show_progress_bar is None:
        show_progress_bar = logger.isEnabledFor(logging.INFO)
    with closing(job), _named_journal(job.journal.path):
        numbers = job.start(*fix_scoring(cross_encoder, job.task.label, job.limits.max_tokens_per_batch))
        started = time.perf_counter()
        with job.progress_bar(numbers, is_shown=show_progress_bar) as progress:
            windows = [job.windows[number] for number in numbers]
            records = score_windows(job.task, cross_encoder, windows, job.limits, progress)
            num_done = progress.n
            for number, record in zip(numbers, records, strict=True):
                job.journal.own.append(number, record)
                num_done += job.num_pairs([number])
                progress.update(num_done - progress.n)  # a window may have fewer pairs than it can have
        seconds = time.perf_counter() - started
        job.finish()
    return JobResult(job.output, job.num_pairs(numbers), seconds)


@contextmanager
def _named_journal(path: Path) -> Iterator[None]:
    """Adds the path of the journal to an error of SQLite, which does not name a file."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise RuntimeError(f"{path}: {error}; start again to resume when the file can be written") from error


def score_windows(
    task: Task, cross_encoder: CrossEncoder, windows: Sequence[range], limits: Limits, progress: "tqdm[Any]"
) -> Iterator[bytes]:
    """Yields the record of each window and moves a bar of pairs. The task is open."""
    first, second = tee(task.read(windows))
    chunks = cross_encoder.predict_chunks(
        (window.pairs for window in first),
        limits.batch_size,
        activation_fn=rank_by(task.activation_fn or cross_encoder.activation_fn),
        max_tokens_per_batch=limits.max_tokens_per_batch,
        progress=progress,
    )
    for window, scores in zip(second, chunks, strict=True):
        with naming_the_cause(cross_encoder):
            record = task.record(window, scores.tolist())
        yield record


@contextmanager
def open_binary(path: Path, *, is_compressed: bool) -> Iterator[IO[bytes]]:
    """
    Opens a file for writing. When the block ends, the file is synced to the disk.

    Raises:
        OSError: the file cannot be written, with its path.
    """
    with naming(path), path.open("wb") as raw:
        if is_compressed:
            # Without a name and a time, the same content gives the same bytes.
            with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
                yield cast(IO[bytes], file)
        else:
            yield raw
        raw.flush()
        os.fsync(raw.fileno())

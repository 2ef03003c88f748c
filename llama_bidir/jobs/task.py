"""What a kind of job has to tell: its windows of pairs, its records and its output."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, Self

from ..prompts import Pair
from ..scoring.probability import Activation

TextPath = str | os.PathLike[str]


class Limits(NamedTuple):
    """Most pairs and most tokens per forward pass."""

    batch_size: int | None
    max_tokens_per_batch: int | None


class Window(NamedTuple):
    """The pairs to score together, and what the task needs to make a record of their scores."""

    pairs: list[Pair]
    source: Any


class NothingToWriteError(ValueError):
    """All windows are scored, and no record gives a line of the output. A further start would end the same way."""


class Task(Protocol):
    """
    A kind of work: which windows of pairs there are, what is recorded of each, and how records become the output.

    A task that is not open yet can be pickled.
    """

    @property
    def verb(self) -> str:
        """The kind of job on the command line and in the journal, such as `rerank`."""

    @property
    def label(self) -> str:
        """The kind of job in messages, such as `Reranking`."""

    @property
    def activation_fn(self) -> Activation | None:
        """Applied to the logits; None is the activation of the cross-encoder."""

    def open(self, beside: Callable[[str], Path]) -> None:
        """Reads and checks the input. `beside` gives the path of a working file of the job."""

    def files(self) -> dict[str, Path | None]:
        """Returns the input files by their names in errors."""

    def moves(self, beside: Callable[[str], Path]) -> dict[str, tuple[Path, Path]]:
        """Returns further outputs by their names in errors: the working file and where it goes at the end."""

    def describe(self) -> dict[str, Any]:
        """Returns what decides the output, by name, in values of JSON."""

    def working_files(self) -> list[Path]:
        """Returns the files that [`prepare`] makes."""

    def prepare(self) -> None:
        """Makes the working files that the windows need. The first process calls it when one of them is missing."""

    def cut(self, window_pairs: int) -> list[range]:
        """Returns the windows, in every process the same: ranges of queries or rows with about `window_pairs` pairs."""

    def num_pairs(self, window: range) -> int:
        """Returns the number of pairs in a window, or the most that it can have."""

    def costs(self, windows: Sequence[range], max_length: int) -> list[int]:
        """Returns the work of each window in any unit. Pairs are cut to `max_length` tokens."""

    def read(self, windows: Iterable[range]) -> Iterator[Window]:
        """Yields windows in the given order."""

    def record(self, window: Window, scores: list[float]) -> bytes:
        """Returns what the journal keeps of a window. Raises ScoreError for a score that is NaN or infinite."""

    def write(self, windows: Sequence[range], records: Iterator[bytes], file: IO[bytes]) -> dict[str, Any]:
        """Writes the output and returns a summary in values of JSON. Raises NothingToWriteError if it is empty."""

    def for_actors(self) -> Self:
        """Returns a copy, not open, for processes that may have another working folder."""

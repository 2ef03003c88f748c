"""
Mined rows that outlive a kill, beside their final place.

`OUT.partial-rows` is the output as far as it goes. `OUT.partial` begins with a line about the job, and each further
line says what the rows file held when a window of rows was done. A line that is not whole, and rows that no line speaks
of, are as good as not written: a kill at any moment loses no more than the window that was on its way.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from ...utils.outputs import check_free
from ...utils.resume import as_recorded, can_go_on, lock

logger = logging.getLogger(__name__)


class Window(NamedTuple):
    """
    A window of rows that is done.

    Args:
        num_rows: of the source, from its start to the end of the window.
        num_bytes: of the output, the same.
        counts: what happened in the window.
        without_negatives: what errors call the rows without a negative.
    """

    num_rows: int
    num_bytes: int
    counts: dict[str, int]
    without_negatives: list[str]


class Journal:
    """
    The output of a mining job as far as it goes.

    Args:
        output: where the rows will be when all are there; its folder must be there.
        arguments: what decides them, by name.
        overwrite: begin anew where a journal of other arguments is there, instead of raising, and replace `output`.

    Raises:
        ValueError: there is a journal of other arguments, with what has changed, or another file in its place.
    """

    def __init__(self, output: Path, arguments: Mapping[str, Any], *, overwrite: bool):
        self.output, self.overwrite = output, overwrite
        self.windows: list[Window] = []
        self._path = output.with_name(f"{output.name}.partial")
        self._rows_path = output.with_name(f"{output.name}.partial-rows")
        arguments = as_recorded(arguments)
        self._path.touch()
        self._lock = lock(self._path)
        try:
            length = self._read(arguments) if self._path.stat().st_size else 0
        except BaseException:
            self._lock.close()
            raise
        mode = "r+b" if length else "wb"
        self._rows: IO[bytes] = self._rows_path.open(mode)
        self._rows.truncate(self.num_bytes)
        self._rows.seek(self.num_bytes)
        self._file: IO[bytes] = self._path.open(mode)
        self._file.truncate(length)
        self._file.seek(length)
        if not length:
            self._write(self._file, _line(arguments))

    @property
    def num_rows(self) -> int:
        """How many rows of the source are done."""
        return self.windows[-1].num_rows if self.windows else 0

    @property
    def num_bytes(self) -> int:
        """How long the output is so far."""
        return self.windows[-1].num_bytes if self.windows else 0

    def append(self, content: bytes, num_rows: int, counts: Mapping[str, int], without_negatives: list[str]) -> None:
        """
        Adds a window, which is safe from a kill when this returns.

        Args:
            content: bytes of the output.
            num_rows: how many rows of the source the window had.
            counts, without_negatives: see [`Window`].
        """
        window = Window(self.num_rows + num_rows, self.num_bytes + len(content), dict(counts), without_negatives)
        self._write(self._rows, content)
        self._write(self._file, _line(window))
        self.windows.append(window)

    def finish(self) -> None:
        """Moves the rows to their place and removes the journal (see [`remove_finished`])."""
        self.close()
        check_free(self.output, overwrite=self.overwrite)  # something may have appeared there meanwhile
        self._rows_path.replace(self.output)
        self._path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Removes rows and journal."""
        self.close()
        self._rows_path.unlink()
        self._path.unlink()

    def close(self) -> None:
        """Leaves rows and journal for the next start."""
        for file in (self._rows, self._file, self._lock):
            file.close()

    def _read(self, arguments: Mapping[str, Any]) -> int:
        """Reads the windows of a former start; returns the length of the journal, or 0 to begin anew."""
        with self._path.open("rb") as file:
            lines = _whole_lines(file)
            former = next(lines, None)
            if former is None and _is_torn(self._path):
                return 0
            if former is None or not isinstance(former[0], dict):
                raise ValueError(f"{self._path}: is not a journal of mine: move it away, or choose another output")
            has_rows = next(lines, None) is not None  # without any, nothing is lost
            if not can_go_on(self._path, former[0], arguments, overwrite=self.overwrite or not has_rows):
                return 0
            file.seek(former[1])
            lines = _whole_lines(file, former[1])
            if not self._rows_path.exists():
                return 0
            length, num_bytes = former[1], self._rows_path.stat().st_size
            for values, end in lines:
                window = Window(*values)
                if window.num_bytes > num_bytes:
                    break  # a machine that went down has kept less of the rows
                self.windows.append(window)
                length = end
        if self.windows:
            logger.warning(f"going on after {self.num_rows} rows of a stopped run")
        return length

    @staticmethod
    def _write(file: IO[bytes], content: bytes) -> None:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def remove_finished(output: Path) -> None:
    """Removes what a kill between the two last steps of [`Journal.finish`] leaves: a journal without its rows."""
    path, rows = (output.with_name(f"{output.name}.{name}") for name in ("partial", "partial-rows"))
    if not output.exists() or not path.exists() or rows.exists():
        return
    with lock(path) as file:
        job, _ = next(_whole_lines(file), (None, 0))
        if isinstance(job, dict):
            path.unlink(missing_ok=True)


@contextmanager
def open_journal(output: Path, arguments: Mapping[str, Any], *, overwrite: bool) -> Iterator[Journal]:
    """Opens a [`Journal`] and closes it in the end, whatever happens."""
    journal = Journal(output, arguments, overwrite=overwrite)
    try:
        yield journal
    finally:
        journal.close()


def _line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _is_torn(path: Path) -> bool:
    """Whether a file is what a kill leaves of the first line."""
    content = path.read_bytes()
    return not content or (content.startswith(b"{") and b"\n" not in content)


def _whole_lines(file: IO[bytes], end: int = 0) -> Iterator[tuple[Any, int]]:
    """Yields the value of each line, and where it ends, up to the first that is not whole; the file is at `end`."""
    for line in file:
        end += len(line)
        try:
            value = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n"):
            return
        yield value, end

"""
What a reranking job has done so far, beside its output, so that it goes on after a kill.

`OUT.partial` begins with a line about the job. Each further line holds the scores of a window, or says that the job is
finished. Every line starts with a checksum, and one that does not fit is as good as not written: a kill at any moment
loses no more than the window that was on its way. Process n > 0 under torchrun appends to `OUT.partial-n`.
"""

import glob
import json
import logging
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ...utils.resume import as_recorded, can_go_on, lock

logger = logging.getLogger(__name__)

FINISHED = b"finished"


class Journal:
    """
    Args:
        output: the file that the job will write; its folder must be there.
        rank: of this process.
    """

    def __init__(self, output: Path, *, rank: int = 0):
        self.path = output.with_name(f"{output.name}.partial")
        self.is_finished = False
        """Whether the files of the job are whole, so that they only have to be moved to their places."""
        self._own = self.path if rank == 0 else self.path.with_name(f"{self.path.name}-{rank}")
        self._seed = 0
        self._lock: IO[bytes] | None = None
        self._places: dict[int, tuple[Path, int]] = {}
        self.read()

    def beside(self, name: str) -> Path:
        """A working file of the job."""
        return self.path.with_name(f"{self.path.name}-{name}")

    @property
    def done(self) -> set[int]:
        """Numbers of the windows that have been scored."""
        return set(self._places)

    def read(self) -> None:
        """Looks for the windows in the files of all processes."""
        self._places, self.is_finished = {}, False
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            self._seed = zlib.crc32(file.readline())  # so that lines of another job do not fit
        for path in [self.path, *self._files_of_others()]:
            with path.open("rb") as file:
                start = 0
                for line in file:
                    content = _content(line, self._seed)
                    if content == FINISHED:
                        self.is_finished = True
                    elif content is not None:
                        self._places[int(content.partition(b" ")[0])] = (path, start)
                    start += len(line)

    def start(self, arguments: Mapping[str, Any], settings: Mapping[str, Any], *, overwrite: bool) -> dict[str, Any]:
        """
        Begins the journal, or goes on with the one that is there.

        Args:
            arguments: what decides the output, by name.
            settings: what the first start chose for the others to follow.
            overwrite: drop a journal of other arguments.

        Returns:
            the settings that hold.

        Raises:
            ValueError: there is a journal of other arguments, with what has changed, or another file in its place.
            RuntimeError: another process is at work on the same output.
        """
        job = {"arguments": as_recorded(arguments), "settings": dict(settings)}
        if self.path.exists():
            self._take_lock()
            former = self._read_job()
            has_scores = self.is_finished or bool(self._places)  # without any, nothing is lost
            if can_go_on(self.path, former["arguments"], job["arguments"], overwrite=overwrite or not has_scores):
                return former["settings"]
        self.remove()
        working = self.beside("new")
        working.write_bytes(_line(json.dumps(job).encode(), 0))
        working.replace(self.path)
        self._take_lock()
        self.read()
        return job["settings"]

    def append(self, window: int, scores: Sequence[float]) -> None:
        """Writes the scores of a window, float32 values, which are then safe from a kill."""
        self._append(f"{window} {json.dumps(list(scores))}".encode())

    def finish(self) -> None:
        """Notes that the files of the job are whole."""
        self._append(FINISHED, sync=True)
        self.is_finished = True

    def scores(self, window: int) -> list[float]:
        """
        Returns the scores of a window.

        Raises:
            RuntimeError: it is not in the journal, although the job has scored it.
        """
        if window not in self._places:
            raise RuntimeError(
                f"{self.path}: window {window} is not in the journal any more; did another process write to it? Start "
                "again to score what is missing"
            )
        path, start = self._places[window]
        with path.open("rb") as file:
            file.seek(start)
            content = _content(file.readline(), self._seed)
        if content is None:
            raise RuntimeError(f"{path}: has changed at byte {start} while it was read; start again")
        return json.loads(content.partition(b" ")[2])

    def remove(self) -> None:
        """Removes all files of the job, the one that tells that there is a job as the last."""
        for path in [*self._files_of_others(), *map(self.beside, ("run", "bm25", "bm25.gz", "new"))]:
            path.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets other processes go on with the job."""
        if self._lock is not None:
            self._lock.close()

    def _take_lock(self) -> None:
        """Keeps other processes of this machine away until [`close`], or the end of this one, however it comes."""
        self.close()
        self._lock = lock(self.path)

    def _append(self, content: bytes, *, sync: bool = False) -> None:
        if not self.path.exists():
            raise RuntimeError(f"{self.path}: is gone, as if another process had finished the job")
        with self._own.open("ab+") as file:
            is_torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
            file.write(b"\n" * is_torn + _line(content, self._seed))
            if sync:
                file.flush()
                os.fsync(file.fileno())

    def _files_of_others(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}-[0-9]*"))

    def _read_job(self) -> dict[str, Any]:
        with self.path.open("rb") as file:
            content = _content(file.readline(), 0)
        if content is None:
            raise ValueError(f"{self.path}: is not a journal of rerank: move it away, or choose another output")
        return json.loads(content)


def _line(content: bytes, seed: int) -> bytes:
    return b"%08x %b\n" % (zlib.crc32(content, seed), content)


def _content(line: bytes, seed: int) -> bytes | None:
    """What a line holds, or None where it is not whole."""
    content = line[9:-1]
    return content if line == _line(content, seed) else None

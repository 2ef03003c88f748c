"""
The state of a job, kept beside its output so that the job resumes after a kill.

`OUT.partial` is a SQLite file with the arguments of the job and a record for each window that is done. Under torchrun,
process n > 0 keeps its records in `OUT.partial-n`. A record is one transaction: a kill loses only the window under way.
"""

import heapq
import json
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from ..utils.resume import as_recorded, can_resume, lock

# Marks a SQLite file as one of ours, so that no other one is overwritten.
APPLICATION_ID = int.from_bytes(b"lbj1")
WORKING_FILES = ("output", "bm25", "bm25.gz")
# Errors of SQLite that are not caused by the content of the file, such as a full disk.
OTHER_ERRORS = (
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_CONSTRAINT,
)


class StateFile:
    """
    The state of one process: a SQLite file that is locked while it is open.

    The lock is [`~utils.resume.lock`], because SQLite's own lock fails on file systems without locks.

    Args:
        path: created if it is missing.
        verb: the kind of job, such as `rerank`.

    Raises:
        RuntimeError: another process has the file open.
        ValueError: the file is not a state file. Every method also raises it if the content of the file is damaged.
    """

    def __init__(self, path: Path, verb: str):
        self.path = path
        self._lock = lock(path)
        self._database = sqlite3.connect(f"{path.absolute().as_uri()}?nolock=1", uri=True, isolation_level=None)
        try:
            with self._named_errors():
                # A kill during the first transaction leaves a file without tables.
                self.is_new = not self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                is_ours = self._database.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
            is_known = self.is_new or (is_ours and self.get("verb") == verb)
        except sqlite3.Error as error:
            # `lock` has opened the file. If SQLite cannot open it, the header of the file is the reason.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_CANTOPEN:  # such as a failing disk
                self.close()
                raise
            is_known = False
        except ValueError:
            is_known = False
        if not is_known:
            self.close()
            raise ValueError(f"{path}: is not a journal of {verb}: move it away, or choose another output")
        if self.is_new:
            self.reset({"verb": verb})

    def reset(self, notes: Mapping[str, Any]) -> None:
        """Drops all records and notes and makes new notes, in one transaction."""
        with self._named_errors(), self._database as database:
            database.execute("BEGIN")
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            database.execute("DROP TABLE IF EXISTS notes")
            database.execute("DROP TABLE IF EXISTS windows")
            database.execute("CREATE TABLE notes (name TEXT PRIMARY KEY, value TEXT)")
            database.execute("CREATE TABLE windows (number INTEGER PRIMARY KEY, record BLOB)")
            for name, value in notes.items():
                self.note(name, value)

    def note(self, name: str, value: Any) -> None:
        """Keeps a JSON value under a name."""
        with self._named_errors():
            self._database.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, json.dumps(value)))

    def get(self, name: str) -> Any:
        """Returns the value of a note, or None if there is none."""
        with self._named_errors():
            row = self._database.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        try:
            return None if row is None else json.loads(row[0])
        except (TypeError, ValueError, RecursionError) as error:
            raise self.damaged(f"the note {name!r} is not JSON") from error

    def append(self, number: int, record: bytes) -> None:
        """Keeps the record of a window, which is safe from a kill when this returns."""
        with self._named_errors():
            self._database.execute("INSERT INTO windows VALUES (?, ?)", (number, record))

    def numbers(self) -> set[int]:
        """Returns the numbers of the windows that have records."""
        with self._named_errors():
            numbers = {number for (number,) in self._database.execute("SELECT number FROM windows")}
        if not all(isinstance(number, int) for number in numbers):
            raise self.damaged("the number of a window is not a whole number")
        return numbers

    def records(self) -> Iterator[tuple[int, bytes]]:
        """Yields the number and the record of each window, by number."""
        with self._named_errors():
            rows = self._database.execute("SELECT number, record FROM windows ORDER BY number")
            for number, record in rows:
                if not isinstance(record, bytes):
                    raise self.damaged(f"the record of window {number} is not bytes")
                yield number, record

    def damaged(self, reason: object) -> ValueError:
        """Returns the error for a damaged file."""
        return ValueError(f"{self.path}: the journal is damaged: {reason}; remove it to start over")

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # reading the message of an error can fail too
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in OTHER_ERRORS:
                raise
            raise self.damaged(error) from error

    def close(self) -> None:
        """Closes the file and releases its lock."""
        self._database.close()
        self._lock.close()


class Journal:
    """
    The state files of a job. Nothing is read or created before [`start`].

    Args:
        output: the file that the job writes.
        verb: the kind of job, such as `rerank`.
        rank: number of this process.
    """

    def __init__(self, output: Path, verb: str, *, rank: int = 0):
        self.path = output.with_name(f"{output.name}.partial")
        self.verb = verb
        self._own_path = self.path if rank == 0 else self.beside(str(rank))
        self._own: StateFile | None = None

    def beside(self, name: str) -> Path:
        """Returns the path of a working file of the job."""
        return self.path.with_name(f"{self.path.name}-{name}")

    @property
    def own(self) -> StateFile:
        """The state file of this process, opened when it is first used."""
        if self._own is None:
            self._own = StateFile(self._own_path, self.verb)
        return self._own

    def was_finished(self) -> bool:
        """Returns whether a former process made the output whole and was killed before it removed the journal."""
        if self._own is not None or not self.path.exists():
            return self._own is not None and self._own.get("finished") is not None
        try:
            return self.own.get("finished") is not None
        except ValueError:
            return False  # another file, which `start` refuses
        finally:
            self.close()

    def start(self, arguments: Mapping[str, Any], settings: Mapping[str, Any], *, overwrite: bool) -> dict[str, Any]:
        """
        Starts a job, or resumes the one whose state is there.

        Args:
            arguments: what decides the output, by name.
            settings: what the first start chooses for all later ones.
            overwrite: drop the state of a job with different arguments.

        Returns:
            the settings that hold.

        Raises:
            ValueError: a job with different arguments is there, with what changed, or something else is in its place.
            RuntimeError: another process is at work on the same output.
        """
        arguments = as_recorded(arguments)
        former, kept = self.own.get("arguments"), self.own.get("settings")
        if former is not None:
            if not isinstance(former, dict) or not isinstance(kept, dict):
                raise self.own.damaged("its arguments and settings are not objects of JSON")
            is_empty = self.own.get("finished") is None and not self.done()  # then nothing is lost
            if can_resume(self.path, former, arguments, overwrite=overwrite or is_empty):
                return kept
        self._remove_parts()
        self.own.reset({"verb": self.verb, "arguments": arguments, "settings": settings})
        return dict(settings)

    def done(self) -> set[int]:
        """Returns the numbers of the windows that any process has recorded."""
        numbers = self.own.numbers()
        for path in self._other_paths():
            with closing(StateFile(path, self.verb)) as state:
                numbers |= state.numbers()
        return numbers

    def records(self, num_windows: int) -> Iterator[bytes]:
        """
        Yields the records of all processes by window number.

        Raises:
            RuntimeError: a window has no record, although it was scored.
        """
        with ExitStack() as stack:
            others = [stack.enter_context(closing(StateFile(path, self.verb))) for path in self._other_paths()]
            found = heapq.merge(*(state.records() for state in (self.own, *others)))
            for expected in range(num_windows):
                number, record = next(found, (None, b""))
                if number != expected:
                    raise RuntimeError(
                        f"{self.path}: window {expected} is missing, as if another program had changed the file: start "
                        "again to score it"
                    )
                yield record

    def remove(self) -> None:
        """Removes all files of the job. `OUT.partial`, which shows that there is a job, is the last."""
        self._remove_parts()
        self.close()
        _unlink(self.path)

    def close(self) -> None:
        """Lets another process resume the job."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def _remove_parts(self) -> None:
        for path in self._other_paths():
            StateFile(path, self.verb).close()  # raises if it is not ours, or a process still writes to it
            _unlink(path)
        for name in WORKING_FILES:
            self.beside(name).unlink(missing_ok=True)

    def _other_paths(self) -> list[Path]:
        name = re.compile(rf"{re.escape(self.path.name)}-\d+")
        return sorted(path for path in self.path.parent.iterdir() if name.fullmatch(path.name))


def _unlink(path: Path) -> None:
    """Removes a SQLite file that is closed, and the rollback journal that a kill may have left beside it."""
    path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
    path.unlink(missing_ok=True)

"""What resumable work has in common: it resumes with the same arguments only, and one process at a time does it."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


def as_recorded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments as they come back from a record in JSON: tuples as lists, for example."""
    return dict(json.loads(json.dumps(arguments)))


def describe_changes(former: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """Names the arguments of a stopped run that have changed, with both values. Empty if none has."""
    return "; ".join(
        f"{name} was {former.get(name)!r} and is {arguments.get(name)!r}"
        for name in [*arguments, *sorted(former.keys() - arguments.keys())]
        if former.get(name) != arguments.get(name)
    )


def can_resume(
    journal: str | os.PathLike[str], former: Mapping[str, Any], arguments: Mapping[str, Any], *, overwrite: bool
) -> bool:
    """
    Returns whether a stopped job resumes. If it starts over instead, the log says what changed.

    Args:
        journal: path of the stopped job's journal, for messages.
        former, arguments: of the stopped job and of this start, by name, as they are recorded.
        overwrite: whether a job with different arguments may be dropped.

    Raises:
        ValueError: the arguments differ, with what changed, and `overwrite` is not set.
    """
    changes = describe_changes(former, arguments)
    if not changes:
        return True
    if not overwrite:
        raise ValueError(
            f"{os.fspath(journal)}: holds a stopped run with different arguments: {changes}. Use the same arguments to "
            "resume, overwrite (--overwrite) to start over, or another output"
        )
    logger.warning(f"{os.fspath(journal)}: started over because the arguments differ: {changes}")
    return False


def lock(path: str | os.PathLike[str]) -> IO[bytes]:
    """
    Locks a file, which is created if it is missing, against other processes on this machine. The lock lasts until the
    returned file is closed or this process ends.

    Raises:
        RuntimeError: another process holds the lock.
    """
    file = Path(path).open("ab")  # noqa: SIM115  # the caller closes it
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RuntimeError(
                f"{os.fspath(path)}: another process is at work on this output: wait for it to end, or stop it"
            ) from None
        except OSError as error:  # some shared file systems have no locks
            logger.info(f"{os.fspath(path)}: not locked: {error}")
    return file

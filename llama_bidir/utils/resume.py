"""What runs that go on after a kill have in common: they go on with the same arguments only."""

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
    """Arguments as a journal in JSON gives them back."""
    return dict(json.loads(json.dumps(arguments)))


def describe_changes(former: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """Says which arguments of a stopped run are others now; empty when none is."""
    return "; ".join(
        f"{name} was {former.get(name)!r} and is {arguments.get(name)!r}"
        for name in [*arguments, *sorted(former.keys() - arguments.keys())]
        if former.get(name) != arguments.get(name)
    )


def can_go_on(
    journal: str | os.PathLike[str], former: Mapping[str, Any], arguments: Mapping[str, Any], *, overwrite: bool
) -> bool:
    """
    Says whether a stopped job is gone on with, or begun anew, which is logged with what has changed.

    Args:
        journal: the stopped job's, for messages.
        former, arguments: of the stopped job and of this start, by name, as they are recorded.
        overwrite: a job of other arguments may be dropped.

    Raises:
        ValueError: the arguments are others, with what has changed, and `overwrite` is not set.
    """
    changes = describe_changes(former, arguments)
    if not changes:
        return True
    if not overwrite:
        raise ValueError(
            f"{os.fspath(journal)}: holds a stopped run with other arguments: {changes}. Start with the same ones to "
            "go on, with overwrite (--overwrite) to begin anew, or with another output"
        )
    logger.warning(f"{os.fspath(journal)}: began anew, as other arguments were given: {changes}")
    return False


def lock(journal: str | os.PathLike[str]) -> IO[bytes]:
    """
    Keeps other processes of this machine away from a journal until what it returns is closed, or this process ends.

    Raises:
        RuntimeError: another process is at work on the same output.
    """
    file = Path(journal).open("rb")  # noqa: SIM115  # held by the caller
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RuntimeError(
                f"{os.fspath(journal)}: another process is at work on this output: wait for it, or end it first"
            ) from None
        except OSError as error:  # not on every shared file system
            logger.info(f"{os.fspath(journal)}: no lock: {error}")
    return file

"""Creates private folders to prepare outputs in, and removes those that killed processes left behind."""

import errno
import glob
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from .exchange import must_stay

try:
    import fcntl
except ImportError:  # Windows does not have this module
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

SAVING = ".saving-"
LOCK_SUFFIX = ".lock"
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Makes errors about a full disk or missing permissions name the output, whichever library wrote the file."""
    try:
        yield
    except Exception as error:
        in_text = re.search(r"\(os error (\d+)\)", str(error))  # safetensors gives the number in its message
        number = error.errno if isinstance(error, OSError) else int(in_text[1]) if in_text else None
        if "inline_container" in str(error):  # torch gives no reason
            number = errno.ENOSPC if shutil.disk_usage(Path(path).absolute().parent).free < 2**20 else errno.EIO
        if number not in WRITE_ERRORS:
            raise
        files = [name for field in ("filename", "filename2") if (name := getattr(error, field, None)) is not None]
        home = Path(os.path.realpath(path)).parent
        if files and not any(Path(os.fsdecode(name)).is_relative_to(home) for name in files):
            raise  # the error is about a file that is read
        reason = f"{os.strerror(number)}; nothing was saved, and the folder is unchanged"
        raise OSError(number, reason, os.fspath(path)) from error


@contextmanager
def workspace_for(target: Path) -> Iterator[Path]:
    """Yields a folder to prepare `target` in. It is beside `target`, or inside it if that is not possible."""
    target.parent.mkdir(parents=True, exist_ok=True)
    is_inside = target.is_dir() and (must_stay(target) or not os.access(target.parent, os.W_OK))
    home, prefix = (target, SAVING) if is_inside else (target.parent, f".{target.name}-")
    _remove_abandoned(home, prefix)
    with ExitStack() as stack:
        with explained(target):
            workspace = _make_locked(home, prefix, stack)
        yield workspace


def _make_locked(home: Path, prefix: str, stack: ExitStack) -> Path:
    """Creates a private folder. First creates a locked file beside it, which shows that the folder is in use."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=prefix, suffix=LOCK_SUFFIX, dir=home)
        file = stack.enter_context(open(descriptor, "ab"))  # noqa: SIM115  # until the stack closes it
        _try_lock(file)
        if os.path.exists(name) and os.path.samestat(os.stat(name), os.fstat(descriptor)):
            break  # otherwise another process has removed the file as abandoned
    workspace = Path(name.removesuffix(LOCK_SUFFIX))
    stack.callback(_remove_workspace, workspace)
    workspace.mkdir(mode=0o700)
    return workspace


def _remove_workspace(workspace: Path) -> None:
    shutil.rmtree(workspace, ignore_errors=True)
    if not workspace.exists():
        Path(f"{workspace}{LOCK_SUFFIX}").unlink(missing_ok=True)


def _remove_abandoned(home: Path, prefix: str) -> None:
    """Removes the workspaces that killed processes left behind. A running process holds the lock of its workspace."""
    for path in home.glob(f"{glob.escape(prefix)}*{LOCK_SUFFIX}"):
        try:
            with path.open("ab") as file:
                if not _try_lock(file):
                    continue
                workspace = Path(os.fspath(path).removesuffix(LOCK_SUFFIX))
                _remove_workspace(workspace)
            logger.warning(f"removed {workspace}, which a killed process had left behind")
        except OSError as error:
            logger.warning(f"{path} was left behind by a killed process and cannot be removed: {error}")


def _try_lock(file: IO[bytes]) -> bool:
    """Tries to lock a file until it is closed. Returns whether the lock was free."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True

"""Swaps two folders in one step, if the system can do that."""

import ctypes
import errno
import os
import sys
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def exchange(first: Path, second: Path) -> bool:
    """
    Swaps two folders on the same file system in one step (`renameat2` of Linux).

    Returns:
        False if that is impossible, as on another system or on NFS. Nothing has then changed.

    Raises:
        OSError: the disk is full.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), ctypes.c_uint(RENAME_EXCHANGE)) == 0:
        return True
    number = ctypes.get_errno()
    if number in NO_SPACE:
        raise OSError(number, os.strerror(number), os.fspath(first))
    return False


def must_stay(folder: Path) -> bool:
    """Returns whether a folder cannot be swapped: it is the working folder, or something is mounted on or inside it."""
    try:
        if Path.cwd().is_relative_to(folder):
            return True
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError):  # the working folder was deleted, or the system has no list of mounts
        return True
    written = os.fspath(folder).replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011")
    return any(mount == written or mount.startswith(f"{written}/") for mount in mounts)

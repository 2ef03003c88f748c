"""Outputs that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """
    Gives a new folder beside `path` that becomes `path` when the block ends, and is removed when the block fails.

    Args:
        path: the folder to make; its parents are made when missing.
        overwrite: replace what is at `path`.

    Raises:
        FileExistsError: there is something at `path`, and `overwrite` is not set.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{os.fspath(path)!r} exists: allow it to be overwritten, or choose another output")
    target.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield working
        # mkdtemp lets nobody else read; a folder that was made by mkdir would follow the umask.
        umask = os.umask(0)
        os.umask(umask)
        working.chmod(0o777 & ~umask)
        if target.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            target.rename(replaced / target.name)
            working.rename(target)
            shutil.rmtree(replaced)
        else:
            working.rename(target)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise

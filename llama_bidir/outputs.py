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
    _check_free(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield working
        # mkdtemp lets nobody else read; a folder that was made by mkdir would follow the umask.
        umask = os.umask(0)
        os.umask(umask)
        working.chmod(0o777 & ~umask)
        _check_free(target, overwrite)  # something may have appeared there meanwhile
        if not target.exists():
            working.rename(target)
            return
        replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
        target.rename(replaced / target.name)
        try:
            working.rename(target)
        except BaseException:
            (replaced / target.name).rename(target)
            raise
        finally:
            shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise


def _check_free(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"{os.fspath(target)!r} exists: pass overwrite (--overwrite) to replace it, or choose another output"
        )


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file beside `path` and renames it, so that `path` is never half written."""
    target = Path(path)
    working = target.with_name(f".{target.name}.tmp")
    working.write_text(text, encoding="utf-8")
    working.replace(target)

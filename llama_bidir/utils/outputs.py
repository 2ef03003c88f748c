"""Outputs that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def check_free(path: str | os.PathLike[str], *, overwrite: bool, is_file: bool = False) -> None:
    """
    Raises FileExistsError where there is something at `path` already.

    Args:
        path: of an output.
        overwrite: what is there may be replaced.
        is_file: the output is a file, which never replaces a folder.
    """
    if is_file and os.path.isdir(path):
        raise FileExistsError(f"{os.fspath(path)!r} is a folder: name a file")
    if os.path.exists(path) and not overwrite:
        raise FileExistsError(
            f"{os.fspath(path)!r} exists: pass overwrite (--overwrite) to replace it, or choose another output"
        )


def check_apart(
    inputs: Mapping[str, str | os.PathLike[str] | None], outputs: Mapping[str, str | os.PathLike[str] | None]
) -> None:
    """
    Raises ValueError where two of the files are one, of which an output is one or both.

    Args:
        inputs, outputs: paths by what errors call them; None where there is none.
    """
    names = {os.path.realpath(path): name for name, path in inputs.items() if path is not None}
    for name, path in outputs.items():
        if path is not None and (other := names.setdefault(os.path.realpath(path), name)) != name:
            raise ValueError(f"{name} and {other} must be two files, got {os.fspath(path)!r} for both")


@contextmanager
def whole_folder(
    path: str | os.PathLike[str], *, overwrite: bool = False, keep: str | None = None, marker: str | None = None
) -> Iterator[Path]:
    """
    Gives a new folder beside `path` that becomes `path` when the block ends, and is removed when the block fails.

    Args:
        path: the folder to make; its parents are made when missing.
        overwrite: replace what is at `path`.
        keep: what the block reads, maybe a path, which must not lie in the folder that is replaced.
        marker: a file that the folder must hold to be replaced, if it holds anything.

    Raises:
        FileExistsError: there is something at `path`, and `overwrite` is not set or it is something else.
        ValueError: what is to be kept lies there.
    """
    target = Path(path)
    if keep is not None and os.path.exists(keep) and Path(keep).resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{keep!r} lies in the output {os.fspath(path)!r}, which would replace it: choose another one")
    if overwrite and marker and target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise FileExistsError(
            f"{os.fspath(path)!r} holds something else (it has no {marker}), which overwrite does not remove: choose "
            "another output"
        )
    check_free(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield working
        # mkdtemp lets nobody else read; a folder that was made by mkdir would follow the umask.
        umask = os.umask(0)
        os.umask(umask)
        working.chmod(0o777 & ~umask)
        check_free(target, overwrite=overwrite)  # something may have appeared there meanwhile
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


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file beside `path` and renames it, so that `path` is never half written."""
    target = Path(path)
    working = target.with_name(f".{target.name}.tmp")
    working.write_text(text, encoding="utf-8")
    working.replace(target)

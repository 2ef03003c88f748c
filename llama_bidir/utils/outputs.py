"""Outputs that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def check_free(path: str | os.PathLike[str], *, overwrite: bool, is_file: bool = False) -> None:
    """
    Checks that an output may be written.

    Args:
        path: of the output.
        overwrite: whether an existing output may be replaced.
        is_file: the output is a file; a file never replaces a folder.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is not set or `path` is a folder where a file is to be written.
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
    Checks that no output is the same file as an input or another output.

    Args:
        inputs, outputs: each path (None when it is not used) under the name that errors call it.

    Raises:
        ValueError: two names stand for the same file.
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
    Yields a new folder that becomes `path` when the block ends and is removed when the block fails.

    Args:
        path: the folder to make; its parents are made when missing.
        overwrite: replace `path` when it exists.
        keep: a path or a Hub id that the block reads. A path must not lie inside the folder that is replaced.
        marker: a file that an existing folder must contain to be replaced, unless the folder is empty.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is not set or the folder has no `marker`.
        ValueError: `keep` lies inside `path`.
    """
    target = Path(path)
    if keep is not None and os.path.exists(keep) and Path(keep).resolve().is_relative_to(target.resolve()):
        raise ValueError(f"{keep!r} lies in the output {os.fspath(path)!r}, which replaces it: choose another output")
    if overwrite and marker and target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise FileExistsError(
            f"{os.fspath(path)!r} holds something else (it has no {marker}), which overwrite does not remove: choose "
            "another output"
        )
    check_free(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    new, old = workspace / "new", workspace / "old"
    try:
        # mkdtemp makes a private folder; one made by mkdir follows the umask.
        new.mkdir()
        yield new
        check_free(target, overwrite=overwrite)  # `path` may have appeared during the block
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file beside `path` and renames it, so that `path` is never half written."""
    target = Path(path)
    working = target.with_name(f".{target.name}.tmp")
    working.write_text(text, encoding="utf-8")
    working.replace(target)

"""Outputs that appear whole or not at all."""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath

from ..files_llama_bidir import INTERRUPTED_SAVE
from .exchange import NO_SPACE, exchange, must_stay
from .workspace import SAVING, explained, workspace_for

logger = logging.getLogger(__name__)

ENTRY_POINTS = ("config.json", "adapter_config.json")


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
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    keep: str | None = None,
    marker: str | None = None,
    replaces: Callable[[PurePath], bool] = lambda file: True,
    is_shared: bool = False,
) -> Iterator[Path]:
    """
    Yields a new folder that becomes `path` when the block ends and is removed when the block fails.

    The new folder is swapped with an existing one in one step. A process that is killed leaves the old folder or the
    new one. If a swap is impossible (see [`~exchange.exchange`]), the new files move into the existing folder one by
    one. A process that is killed during this leaves a folder without a `config.json`, which does not load. The
    subfolder `.interrupted-save` then holds the new files that have not been moved.

    Args:
        path: the folder to make. Missing parents are created.
        overwrite: replace `path` when it exists.
        keep: a path or a Hub id that the block reads. A path must not lie inside the folder that is replaced.
        marker: a file that an existing folder must contain to be replaced, unless the folder is empty.
        replaces: called with the path of a file in the existing folder; returns whether the file is removed. Other
            files stay. The default removes all files.
        is_shared: other processes write to the existing folder at the same time, so it must stay the same folder.

    Raises:
        FileExistsError: `path` exists, and `overwrite` is not set or the folder has no `marker`.
        ValueError: `keep` lies inside `path`.
        OSError: a file cannot be written, for example because the disk is full. The folder is unchanged.
    """
    target = Path(os.path.realpath(path))
    if keep is not None and os.path.exists(keep) and Path(keep).resolve().is_relative_to(target):
        raise ValueError(f"{keep!r} lies in the output {os.fspath(path)!r}, which replaces it: choose another output")
    if overwrite and marker and target.is_dir() and not _holds(target, marker):
        raise FileExistsError(
            f"{os.fspath(path)!r} holds something else (it has no {marker}), which overwrite does not remove: choose "
            "another output"
        )
    check_free(path, overwrite=overwrite)
    if target.is_file():
        raise NotADirectoryError(f"{os.fspath(path)!r} is a file: name a folder")
    with workspace_for(target) as workspace, explained(path):
        new = workspace / "new"
        new.mkdir()  # follows the umask, unlike the workspace
        yield new
        check_free(path, overwrite=overwrite)  # `path` may have appeared during the block
        _settle(new, mode=new.stat().st_mode & 0o666)
        if not target.exists():
            new.rename(target)
        elif is_shared or not _take_its_place(target, new, replaces):
            _move_into(target, new, replaces)
        _sync(target.parent)


def _settle(folder: Path, mode: int) -> None:
    """Gives all files the permissions of the umask, because some libraries write private files. Syncs them to disk."""
    for path in [*_files(folder)]:
        if not (folder / path).is_symlink():
            os.chmod(folder / path, mode)
            _sync(folder / path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk, if the system supports that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows cannot open a folder
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[PurePath]:
    """The paths in a folder of all its files and links, and of its empty folders."""
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        links = [name for name in folders if (here / name).is_symlink()]
        for name in [*files, *links]:
            yield (here / name).relative_to(folder)
        if not files and not folders and here != folder:
            yield here.relative_to(folder)


def _keep_others(old: Path, new: Path, replaces: Callable[[PurePath], bool], made: list[Path]) -> None:
    """Links the files to keep from an old folder into the new one. Appends each new path to `made`."""
    for path in [*_files(old)]:
        if os.path.lexists(new / path) or replaces(path):
            continue
        for parent in [*reversed(path.parents)][1:]:
            if not (new / parent).exists():
                (new / parent).mkdir()
                shutil.copymode(old / parent, new / parent)
        if _is_folder(old / path):
            (new / path).mkdir()
            shutil.copymode(old / path, new / path)
        else:
            os.link(old / path, new / path, follow_symlinks=False)
        made.append(new / path)


def _take_its_place(target: Path, new: Path, replaces: Callable[[PurePath], bool]) -> bool:
    """Replaces the old folder by the new one in one step. If that is impossible, returns False and changes nothing."""
    if must_stay(target) or new.is_relative_to(target):
        return False
    made: list[Path] = []
    try:
        old_state, new_state = target.stat(), new.stat()
        if (old_state.st_uid, old_state.st_gid) != (new_state.st_uid, new_state.st_gid):
            os.chown(new, old_state.st_uid, old_state.st_gid)
        os.chmod(new, old_state.st_mode & 0o7777)
        _keep_others(target, new, replaces, made)
        if exchange(target, new):
            _keep_others(new, target, replaces, [])  # files that another process has written in the meantime
            return True
    except OSError as error:  # for example, the file system has no links, or another user owns the folder
        if error.errno in NO_SPACE:
            raise
        logger.info(f"{target} cannot be replaced in one step: {error}")
    for path in made:
        path.rmdir() if _is_folder(path) else path.unlink()
    return False


def _move_into(target: Path, new: Path, replaces: Callable[[PurePath], bool]) -> None:
    """Moves the files of a new folder into an existing one. Entry points are removed first and moved in last."""
    moving = target / INTERRUPTED_SAVE
    shutil.rmtree(moving, ignore_errors=True)
    new.rename(moving)
    files = sorted(_files(moving), key=lambda path: (path.name in ENTRY_POINTS, path.name != ENTRY_POINTS[0], path))
    for name in ENTRY_POINTS:
        (target / name).unlink(missing_ok=True)
    for path in [*_files(target)]:
        if path.parts[0] != INTERRUPTED_SAVE and not path.parts[0].startswith(SAVING) and replaces(path):
            _remove(target, path)
    for path in files:
        if _is_folder(moving / path):
            (target / path).mkdir(parents=True, exist_ok=True)
        else:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (moving / path).replace(target / path)
    shutil.rmtree(moving)
    _sync(target)


def _remove(folder: Path, path: PurePath) -> None:
    """Removes a file or an empty folder from a folder, and each parent that becomes empty."""
    (folder / path).rmdir() if _is_folder(folder / path) else (folder / path).unlink()
    for parent in [*path.parents][:-1]:
        if any((folder / parent).iterdir()):
            break
        (folder / parent).rmdir()


def _holds(folder: Path, marker: str) -> bool:
    """Returns whether a folder contains `marker`, is empty, or was left behind by an interrupted save."""
    names = os.listdir(folder)
    return not names or INTERRUPTED_SAVE in names or (folder / marker).is_file()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file beside `path` and renames it, so that `path` is never half written."""
    target = Path(path)
    working = target.with_name(f".{target.name}.tmp")
    content = text.encode()
    try:
        working.write_bytes(content)
        if target.exists():
            shutil.copymode(target, working)
        working.replace(target)
    except OSError:  # such as a full disk
        working.unlink(missing_ok=True)
        raise

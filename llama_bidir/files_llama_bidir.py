# Copyright 2026 The llama-bidir authors. Licensed under the Apache License, Version 2.0.
"""Finds and reads the files of a checkpoint, and refuses files that are damaged or name files outside the folder."""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
MAX_JSON_DEPTH = 50
LFS_BEGIN = b"version https://git-lfs"
ADAPTER_STEMS = ("adapter_model", "adapter_model")  # see `check_weight_files`
INTERRUPTED_SAVE = ".interrupted-save"  # the subfolder that holds new files while they replace old ones


def check_checkpoint_path(name_or_path: str | os.PathLike[str]) -> None:
    """
    Raises OSError for a local path without a checkpoint or with an incomplete one. Otherwise transformers would look
    for the name on the Hub.
    """
    name = os.fspath(name_or_path)
    looks_like_path = os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1
    if os.path.isfile(name) and not name.endswith(".json"):
        raise NotADirectoryError(
            f"{name!r} is not a checkpoint: it is a file. Pass the folder that holds a config.json"
        )
    if looks_like_path and not os.path.exists(name):
        raise FileNotFoundError(
            f"{name!r} is not a checkpoint: there is no such folder. Pass a folder that holds a config.json, or the id "
            "of a Hub repository such as 'meta-llama/Llama-3.2-1B'"
        )
    interrupted = os.path.join(name, INTERRUPTED_SAVE)
    if os.path.isdir(interrupted) and not os.path.exists(os.path.join(name, "config.json")):
        raise FileNotFoundError(
            f"{name!r} is not a checkpoint: a save into it was interrupted or has not finished. Save into it again, or "
            f"move the new files that are still in {interrupted!r} up into {name!r} to finish that save"
        )


def find_file(name_or_path: str, file: str, source: Mapping[str, Any]) -> str | None:
    """Returns the path of a file in a folder or in a Hub repository, or None if there is none. Downloads if needed."""
    flags = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found: str | None = cached_file(name_or_path, file, **flags, **source)
    return found


def is_inside(path: Any) -> bool:
    """Returns whether a path in a file of a checkpoint stays inside the folder of the checkpoint."""
    is_path = isinstance(path, str) and "\\" not in path
    return is_path and not os.path.isabs(path) and ".." not in Path(path).parts


def check_is_downloaded(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a git-lfs pointer, which git leaves in place of a large file that it has not fetched."""
    with open(path, "rb") as file:
        if file.read(len(LFS_BEGIN)) == LFS_BEGIN:
            raise ValueError(
                f"{os.fspath(path)!r} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder"
            )


def read_json(path: str | os.PathLike[str], kind: type[dict[str, Any]] | type[list[Any]] = dict) -> Any:
    """
    Reads a JSON file of a checkpoint.

    Args:
        path: the file; errors name it.
        kind: the expected type of its content.

    Raises:
        ValueError: the file is a git-lfs pointer, is not JSON in UTF-8, is nested too deeply, or holds another type.
    """
    name = os.fspath(path)
    check_is_downloaded(name)
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{name!r} is nested too deep to be read: get the file again") from None
    except ValueError as error:  # also a UnicodeDecodeError
        raise ValueError(f"{name!r} is not a JSON file in UTF-8: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(
            f"{name!r} must hold a JSON {'object' if kind is dict else 'array'}, got {type(content).__name__}"
        )
    check_depth(content, name)
    return content


def check_depth(content: Any, name: str) -> None:
    """Raises ValueError for JSON that is nested so deeply that copying it would exceed Python's recursion limit."""
    level = [content]
    for _ in range(MAX_JSON_DEPTH):
        nested = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [value for values in nested for value in values]
    if level:
        raise ValueError(f"{name!r} is nested deeper than {MAX_JSON_DEPTH} levels: get the file again")


def check_weight_files(
    name_or_path: str,
    source: Mapping[str, Any],
    *,
    use_safetensors: bool | None = None,
    variant: str | None = None,
    stems: tuple[str, str] = ("model", "pytorch_model"),
) -> None:
    """
    Checks the weight files of a checkpoint before they are read.

    Args:
        name_or_path (`str`): a folder or the id of a Hub repository.
        source (`dict`): arguments for the Hub, such as `revision`.
        use_safetensors (`bool`, *optional*): `False` allows pickled weights, for torch's safe loader.
        variant (`str`, *optional*): as in [`PreTrainedModel.from_pretrained`].
        stems (`tuple`): the names of the safetensors file and of the pickled file, without extensions.

    Raises:
        ValueError: the weights are a pickle and `use_safetensors` is not `False`, an index names a file outside the
            folder, or a file is damaged. The message names the file.
    """

    def find(stem: str, suffix: str) -> tuple[str | None, bool]:
        """Returns the file with the weights or with the index of their shards, and whether it is an index."""
        name = stem if variant is None else f"{stem}.{variant}"
        if (file := find_file(name_or_path, f"{name}{suffix}", source)) is not None:
            return file, False
        name = f"{stem}{suffix}.index" if variant is None else f"{stem}{suffix}.index.{variant}"
        return find_file(name_or_path, f"{name}.json", source), True

    suffix = ".bin" if use_safetensors is False else ".safetensors"
    file, is_index = find(stems[use_safetensors is False], suffix)
    if file is None and use_safetensors is not False:
        pickled, _ = find(stems[1], ".bin")
        if pickled is not None:
            raise ValueError(
                f"{name_or_path!r} holds its weights as a pickle ({os.path.basename(pickled)}), a format that can run "
                "code: pass use_safetensors=False (model_kwargs={'use_safetensors': False} to a CrossEncoder) to read "
                "it with torch's safe loader, and save it as safetensors"
            )
    if file is None:
        return  # the loader reports that there are no weights
    if not is_index:
        check_weight_file(file)
        return
    for shard in read_shards(file, suffix):
        if os.path.isdir(name_or_path):  # the shards of a repository are not downloaded yet
            check_weight_file(os.path.join(os.path.dirname(file), shard))


def read_shards(index: str, suffix: str) -> list[str]:
    """Returns the file names in the index of a sharded checkpoint. Raises ValueError for a file outside its folder."""
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(content.get("metadata"), dict) or not isinstance(weight_map, dict):
        raise ValueError(f"{index!r} must hold the objects weight_map and metadata: get the file again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not shard.endswith(suffix):
            raise ValueError(f"{index!r} must name {suffix} files, got {shard!r}")
        if not is_inside(shard):
            raise ValueError(f"{index!r} names a file outside of its folder, which is refused: {shard!r}")
    return sorted(set(weight_map.values()))


def check_weight_file(path: str) -> None:
    """Raises ValueError with the name of a weight file that is damaged or that torch's safe loader refuses."""
    check_is_downloaded(path)
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, framework="pt"):
                return
        torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except SafetensorError as error:
        raise ValueError(f"{path!r} is not a whole safetensors file: {error}. Get the file again") from None
    except Exception as error:
        raise ValueError(
            f"{path!r} is refused by torch's safe loader, because it is damaged or holds more than tensors "
            f"({type(error).__name__}): get the weights as safetensors"
        ) from None

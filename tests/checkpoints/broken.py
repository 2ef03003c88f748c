"""A maker of broken and hostile checkpoints: each case changes one thing in a copy of a good folder."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
TOO_DEEP = "[" * 100_000 + "]" * 100_000
MARK = "executed"

Break = Callable[[Path], None]


def edit(file: str, **fields: Any) -> Break:
    """Sets fields of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def config(**fields: Any) -> Break:
    return edit("config.json", **fields)


def rope(**fields: Any) -> Break:
    return config(rope_parameters={"rope_theta": 1e4, **fields})


def tokenizer_config(**fields: Any) -> Break:
    return edit("tokenizer_config.json", **fields)


def put(file: str, content: str | bytes) -> Break:
    """Writes a file, over the one that is there."""

    def change(folder: Path) -> None:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def without(*files: str, then: Break = lambda folder: None) -> Break:
    """Removes files."""

    def change(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()
        then(folder)

    return change


def cut(file: str, size: int) -> Break:
    """Cuts bytes from the end of a file."""

    def change(folder: Path) -> None:
        (folder / file).write_bytes((folder / file).read_bytes()[:-size])

    return change


def shards(target: str, index: str = "model.safetensors.index.json") -> Break:
    """Replaces the weights by an index of one shard, `target`, which is really there; {outside} is another folder."""

    def change(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir(exist_ok=True)
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        name = target.format(outside=outside)
        if name.endswith(".safetensors"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_file(weights, folder / name, metadata={"format": "pt"})
        else:
            torch.save(weights, folder / name)
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))

    return change


def linked(folder: Path) -> None:
    """The weights are a symbolic link to a file of another folder, as in the cache of the Hub."""
    (folder / "model.safetensors").rename(folder.parent / "blob")
    (folder / "model.safetensors").symlink_to(folder.parent / "blob")


def pickled(folder: Path) -> None:
    """The weights are a pickle of tensors."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


class Command:
    """An object that runs a command when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.fspath(self.mark),)


def armed(file: str) -> Break:
    """Writes a pickle that makes the folder `executed` when it is loaded, in place of the weights."""

    def change(folder: Path) -> None:
        for weights in ("model.safetensors", "adapter_model.safetensors"):
            (folder / weights).unlink(missing_ok=True)
        torch.save({"score.weight": Command(folder.parent / MARK)}, folder / file)
        with (folder / f"{file}.plain").open("wb") as copy:
            pickle.dump(Command(folder.parent / MARK), copy)

    return change


def code(auto_map: Any, **fields: Any) -> Break:
    """Gives the tokenizer code of its own, which makes the folder `executed` when it is imported."""

    def change(folder: Path) -> None:
        tokenizer_config(auto_map=auto_map, **fields)(folder)
        (folder / "tokenization_x.py").write_text(f"import os\nos.mkdir({os.fspath(folder.parent / MARK)!r})\n")

    return change

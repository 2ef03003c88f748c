"""Recipes: YAML files whose keys are the fields of the dataclasses that a training run takes."""

import dataclasses
import difflib
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from ..training import CrossEncoderTrainingArguments, DataArguments, ModelArguments

T = TypeVar("T")


class Recipe(NamedTuple):
    """The three blocks of a recipe, as what [`training.train`] takes."""

    model: ModelArguments
    data: DataArguments
    training: CrossEncoderTrainingArguments


def list_recipes() -> list[str]:
    """Names of the bundled recipes."""
    return sorted(
        path.name.removesuffix(".yaml") for path in files(__package__).iterdir() if path.name.endswith(".yaml")
    )


def load_recipe(
    name_or_path: str | os.PathLike[str], overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> Recipe:
    """
    Reads a recipe.

    Args:
        name_or_path: the name of a bundled recipe, or a YAML file.
        overrides: values by block and key that replace the file's.

    Raises:
        FileNotFoundError: there is neither such a recipe nor such a file.
        ValueError: a block or a key is unknown, with the nearest known one, or a required key is missing.
    """
    name = os.fspath(name_or_path)
    path = files(__package__) / f"{name}.yaml" if name in list_recipes() else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {name!r}: pass a YAML file or one of {', '.join(list_recipes())}")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, Mapping):
        raise ValueError(f"{name}: a recipe holds the blocks {', '.join(Recipe._fields)}, got {type(content).__name__}")
    for block in [*content, *(overrides or {})]:
        _check_key(name, block, Recipe._fields)
    blocks = {block: {**(content.get(block) or {}), **(overrides or {}).get(block, {})} for block in Recipe._fields}
    return Recipe(
        model=_build(ModelArguments, blocks["model"], f"{name}: model"),
        data=_build(DataArguments, blocks["data"], f"{name}: data"),
        training=_build(CrossEncoderTrainingArguments, blocks["training"], f"{name}: training"),
    )


def _build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        _check_key(where, key, fields)
    for field in fields.values():
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if not has_default and field.name not in values:
            raise ValueError(f"{where}: {field.name} is required")
    return cls(**values)


def _check_key(where: str, key: str, known: Any) -> None:
    if key not in known:
        nearest = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.0)[0]
        raise ValueError(f"{where}: unknown key {key!r}; the nearest known one is {nearest!r}")

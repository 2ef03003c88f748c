"""Reading a recipe: from a YAML file, and values that replace some of it, to what [`training.train`] takes."""

import dataclasses
import difflib
import logging
import os
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import yaml

from ...utils.extras import require
from .. import CrossEncoderTrainingArguments, DataArguments, ModelArguments
from .values import convert, field_hints

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Recipe(NamedTuple):
    """The blocks of a recipe, as what [`training.train`] takes; `lora` is None where no adapter is trained."""

    model: ModelArguments
    data: DataArguments
    training: CrossEncoderTrainingArguments
    lora: dict[str, Any] | None = None


def block_class(block: str) -> Any:
    """The dataclass whose fields are the keys of a block; that of `lora` imports PEFT."""
    classes = {"model": ModelArguments, "data": DataArguments, "training": CrossEncoderTrainingArguments}
    return classes[block] if block in classes else require("peft", "train").LoraConfig


def list_recipes() -> list[str]:
    """Names of the bundled recipes."""
    return sorted(
        path.name.removesuffix(".yaml") for path in files(__package__).iterdir() if path.name.endswith(".yaml")
    )


def describe_recipe(name: str) -> str:
    """The first sentence of what a recipe says it does: the second paragraph of the comment that it begins with."""
    lines = _find(name).read_text(encoding="utf-8").splitlines()
    comment = "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    paragraphs = [" ".join(paragraph.split()) for paragraph in comment.split("\n\n")]
    return paragraphs[1].split(". ")[0].rstrip(".") + "." if len(paragraphs) > 1 else ""


def load_recipe(
    name_or_path: str | os.PathLike[str], overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> Recipe:
    """
    Reads a recipe and fits it to this machine: one process leaves `fsdp` out, which shards between several; without an
    accelerator `bf16` computes on the CPU; and `eval_strategy`, where it is not given, follows from `data.eval` and
    `eval_steps`.

    Args:
        name_or_path: the name of a bundled recipe, or a YAML file.
        overrides: values by block and key that replace the file's.

    Raises:
        FileNotFoundError: there is neither such a recipe nor such a file.
        ValueError: a block or a key is unknown, with the nearest known one; a required key is missing; or a value is
            not of the type of its field.
        ImportError: there is a `lora` block, but PEFT is not installed.
    """
    name = os.fspath(name_or_path)
    content = _read(name)
    given = overrides or {}
    for block in [*content, *given]:
        _check_key(name, block, Recipe._fields)
    values: dict[str, dict[str, Any]] = {}
    for block in Recipe._fields:
        in_file = content.get(block)
        if not isinstance(in_file, Mapping | None):
            raise ValueError(f"{name}: {block} must be a mapping of keys to values, got {in_file!r}")
        # A block that is there without a key, `lora: {}`, asks for an adapter with the defaults.
        if block != "lora" or in_file is not None or block in given:
            values[block] = _convert(block, _merge(in_file or {}, given.get(block, {})), f"{name}: {block}")
    values["training"].setdefault("log_level_replica", "error")  # the first process speaks for all
    if values["data"].get("eval"):
        strategy = "steps" if values["training"].get("eval_steps") else "epoch"
        values["training"].setdefault("eval_strategy", strategy)
    _fit_to_machine(values["training"], name)
    return Recipe(
        model=_build(ModelArguments, values["model"], f"{name}: model"),
        data=_build(DataArguments, values["data"], f"{name}: data"),
        training=_build(CrossEncoderTrainingArguments, values["training"], f"{name}: training"),
        lora=values.get("lora"),
    )


def _find(name: str) -> Traversable:
    path = files(__package__) / f"{name}.yaml" if name in list_recipes() else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {name!r}: pass a YAML file or one of {', '.join(list_recipes())}")
    return path


def _read(name: str) -> Mapping[Any, Any]:
    try:
        content = yaml.safe_load(_find(name).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: a recipe is a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{name}: a recipe holds the blocks {', '.join(Recipe._fields)}, got {type(content).__name__}")
    return content


def _merge(in_file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    schedule = "lr_scheduler_type"
    if schedule in given and given[schedule] != in_file.get(schedule):
        # Those of the file belong to its own schedule, and another may not take them.
        in_file = {key: value for key, value in in_file.items() if key != "lr_scheduler_kwargs"}
    return {**in_file, **given}


def _convert(block: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    hints = field_hints(block_class(block))
    for key in values:
        _check_key(where, key, hints)
    return {key: convert(value, hints[key], f"{where}: {key}") for key, value in values.items()}


def _build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if not has_default and field.name not in values:
            raise ValueError(f"{where}: {field.name} is required")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _check_key(where: str, key: str, known: Any) -> None:
    if key not in known:
        nearest = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.0)[0]
        raise ValueError(f"{where}: unknown key {key!r}; the nearest known one is {nearest!r}")


def _fit_to_machine(training: dict[str, Any], name: str) -> None:
    if training.get("fsdp") and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        logger.warning(
            f"{name}: training.fsdp, which shards the weights between processes, is left out: this is one process"
        )
        del training["fsdp"]
        sharding = training.pop("fsdp_config", None)
        if isinstance(sharding, Mapping) and sharding.get("activation_checkpointing"):
            # The Trainer's own, which older releases of transformers know as gradient_checkpointing.
            names = field_hints(CrossEncoderTrainingArguments)
            training.setdefault(
                "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing", True
            )
    if (training.get("bf16") or training.get("bf16_full_eval")) and not torch.accelerator.is_available():
        # TrainingArguments accepts bfloat16 without a GPU only when told that a CPU is meant.
        training.setdefault("use_cpu", True)

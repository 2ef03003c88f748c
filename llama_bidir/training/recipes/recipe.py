"""Recipes: from a YAML file, and values that replace some of its own, to the arguments of [`training.train`]."""

import logging
import os
from collections.abc import Iterable, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ...utils.extras import require
from ...utils.launch import launch_number
from ...utils.names import nearest
from .. import CrossEncoderTrainingArguments, DataArguments, ModelArguments
from .loader import RecipeError, load_yaml
from .values import YAML_ERRORS, convert, field_hints

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Recipe(NamedTuple):
    """The blocks of a recipe, in the order of [`training.train`]'s arguments. `lora` is None without an adapter."""

    model: ModelArguments
    data: DataArguments
    training: CrossEncoderTrainingArguments
    lora: dict[str, Any] | None = None


def block_hints(block: str) -> dict[str, Any]:
    """Returns the annotation of each key of a block; raises ImportError for `lora` where PEFT is not installed."""
    classes = {"model": ModelArguments, "data": DataArguments, "training": CrossEncoderTrainingArguments}
    return field_hints(classes[block] if block in classes else require("peft", "train").LoraConfig)


def list_recipes() -> list[str]:
    """Returns the names of the bundled recipes."""
    names = (path.name for path in files(__package__).iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def describe_recipe(name: str) -> str:
    """Returns what a recipe does: the first sentence of the second paragraph of the comment at its top."""
    lines = _find(name).read_text(encoding="utf-8").splitlines()
    comment = "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    _, _, description = comment.partition("\n\n")
    sentence = " ".join(description.partition("\n\n")[0].split()).split(". ")[0].rstrip(".")
    return f"{sentence}." if sentence else ""


def load_recipe(
    name_or_path: str | os.PathLike[str], overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> Recipe:
    """
    Reads a recipe and fits it to this machine.

    A run of one process leaves `fsdp` out, because FSDP shards between processes. Without an accelerator, `bf16`
    computes on the CPU. Where `eval_strategy` is not given, it follows from `data.eval`, `data.eval_rerank` and
    `eval_steps`.

    Args:
        name_or_path: the name of a bundled recipe, or a YAML file.
        overrides: values by block and key, which replace those of the file.

    Raises:
        FileNotFoundError: there is neither such a recipe nor such a file.
        ValueError: a block or a key is unknown (the message names the nearest known one), a required key is missing, or
            a value does not have the type of its field.
        ImportError: there is a `lora` block, but PEFT is not installed.
    """
    name, given = os.fspath(name_or_path), overrides or {}
    content = _read(name)
    for block in [*content, *given]:
        _check_key(name, block, Recipe._fields)
    values: dict[str, dict[str, Any]] = {}
    for block in Recipe._fields:
        in_file = content.get(block)
        if not isinstance(in_file, Mapping | None):
            raise ValueError(f"{name}: {block} must be a mapping of keys to values, got {in_file!r}")
        # An empty block, `lora: {}`, asks for an adapter with the defaults.
        if block != "lora" or in_file is not None or block in given:
            values[block] = _convert(block, _merge(in_file or {}, given.get(block, {})), f"{name}: {block}")
    if "model_name_or_path" not in values["model"]:
        raise ValueError(f"{name}: model: model_name_or_path is required")
    _fit_to_machine(values["training"], name)
    if values["data"].get("eval") or values["data"].get("eval_rerank"):
        strategy = "steps" if values["training"].get("eval_steps") else "epoch"
        values["training"].setdefault("eval_strategy", strategy)
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
        content = load_yaml(_find(name).read_text(encoding="utf-8"), name)
    except RecipeError:
        raise
    except YAML_ERRORS as error:
        raise ValueError(f"{name}: a recipe is a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{name}: a recipe holds the blocks {', '.join(Recipe._fields)}, got {type(content).__name__}")
    return content


def _merge(in_file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    schedule = "lr_scheduler_type"
    if schedule in given and given[schedule] != in_file.get(schedule):
        # The file's keywords belong to its own schedule. A different schedule may not take them.
        in_file = {key: value for key, value in in_file.items() if key != "lr_scheduler_kwargs"}
    return {**in_file, **given}


def _convert(block: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    hints = block_hints(block)
    for key in values:
        _check_key(where, key, hints)
    return {key: convert(value, hints[key], f"{where}: {key}") for key, value in values.items()}


def _check_key(where: str, key: Any, known: Iterable[str]) -> None:
    if key not in known:
        raise ValueError(f"{where}: unknown key {key!r}; the nearest known one is {nearest(key, known)!r}")


def _build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except OSError as error:  # a key such as accelerator_config may name a file
        raise type(error)(f"{where}: {error}") from error


def _fit_to_machine(training: dict[str, Any], name: str) -> None:
    training.setdefault("log_level_replica", "error")  # the first process logs for all
    if training.get("fsdp") and launch_number("WORLD_SIZE", 1) == 1:
        logger.warning(f"{name}: training.fsdp is left out: it shards weights between processes, and this is one")
        del training["fsdp"]
        sharding = training.pop("fsdp_config", None)
        if isinstance(sharding, Mapping) and sharding.get("activation_checkpointing"):
            # The Trainer's own, which older releases of transformers call gradient_checkpointing.
            new, old = "activation_checkpointing", "gradient_checkpointing"
            training.setdefault(new if new in block_hints("training") else old, True)
    if (training.get("bf16") or training.get("bf16_full_eval")) and not torch.accelerator.is_available():
        # TrainingArguments accepts bfloat16 without an accelerator only with use_cpu.
        training.setdefault("use_cpu", True)

"""Values of recipes: what the annotation of a field allows, and how YAML or text becomes it."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Any

import yaml

# PyYAML raises these for text that is not YAML, for an impossible date or number, and for deep nesting.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)
EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@cache
def field_hints(cls: Any) -> dict[str, Any]:
    """Returns the annotation of each field that the constructor of a dataclass takes."""
    hints = typing.get_type_hints(cls)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    if "fsdp" in hints:
        hints["fsdp"] = bool | hints["fsdp"]  # as TrainingArguments documents it; the annotation leaves bool out
    return hints


def kinds_of(hint: Any) -> set[type]:
    """Returns the types that an annotation allows: keys of `EXPECTED`, NoneType, and `object` for anything else."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(kinds_of, typing.get_args(hint)))
    if origin is typing.Literal:
        return set(map(type, typing.get_args(hint)))
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {str}
    return {kind if kind in EXPECTED or kind is types.NoneType else object}


def element_kinds(hint: Any) -> set[type]:
    """Returns the types that the elements of the lists that an annotation allows may have; empty if it allows none."""
    lists = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is list]
    return set().union(*(kinds_of(element) for part in lists for element in typing.get_args(part)))


def _mapped_kinds(hint: Any) -> set[type]:
    """Returns the types of the values in the mappings that an annotation allows; empty if it allows none."""
    mappings = [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is dict]
    return set().union(*(kinds_of(typing.get_args(part)[1]) for part in mappings))


def convert(value: Any, hint: Any, where: str) -> Any:
    """
    Fits a value to the annotation of its field.

    Text becomes a number where the field takes numbers but no text, because YAML reads `1e-5` as text; so do the values
    of a mapping to numbers. A single source becomes a list of one where the field takes a list.

    Args:
        value: as YAML or the caller gives it.
        hint: the annotation.
        where: the name of the field in errors.

    Raises:
        ValueError: the value is of another type, or it is not a finite number.
    """
    kinds, given = kinds_of(hint), value
    if isinstance(value, str) and str not in kinds and kinds & {bool, int, float}:
        value = _read_number(value)
    elements = element_kinds(hint)
    for index, item in enumerate(value if isinstance(value, list) and str in elements else ()):
        if isinstance(item, int | float) and type(item) not in elements:
            raise ValueError(f"{where}[{index}] must be text, got {item!r}: put it in quotes")
    if isinstance(value, Mapping) and float in _mapped_kinds(hint):
        return {name: convert(item, float, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {given!r}")
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        return int(value)
    if object in kinds or type(value) in kinds or (type(value) is int and float in kinds):
        return value
    if list in kinds and (value is None or isinstance(value, str | Mapping)):
        return [] if value is None else [value]
    if value is not None and type(value) not in EXPECTED:
        return value  # an object that a caller from Python gives
    expected = [name for kind, name in EXPECTED.items() if kind in kinds and not (kind is int and float in kinds)]
    quotes = ": put it in quotes" if str in kinds and isinstance(value, int | float) else ""
    raise ValueError(f"{where} must be {' or '.join(expected)}, got {given!r}{quotes}")


def _read_number(text: str) -> bool | float | str:
    """Returns the number or the truth value that a text stands for, or the text itself."""
    try:
        return float(text)
    except ValueError:
        return TRUTH.get(text.lower(), text)

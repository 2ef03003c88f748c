"""Values of a recipe: from what YAML or a command line gives to what a field is annotated with."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from enum import Enum
from functools import cache
from typing import Any

import yaml

EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


@cache
def field_hints(cls: Any) -> dict[str, Any]:
    """The annotation of each field that a dataclass is built with, by name."""
    hints = typing.get_type_hints(cls)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    if "fsdp" in hints:
        hints["fsdp"] = bool | hints["fsdp"]  # what its documentation says; it is annotated for a command line
    return hints


def kinds_of(hint: Any) -> set[type]:
    """The types that an annotation allows: those of `EXPECTED`, None and, for anything else, `object`."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return set().union(*(kinds_of(part) for part in typing.get_args(hint)))
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(hint)}
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {str}
    return {kind if kind in EXPECTED or kind is types.NoneType else object}


def convert(value: Any, hint: Any, where: str) -> Any:
    """
    Fits a value to an annotation. YAML gives `1e-5` as text, and one source may stand for a list of them.

    Args:
        value: as YAML or the caller gives it.
        hint: the annotation of the field.
        where: what errors call the field.

    Raises:
        ValueError: the value is of another type.
    """
    kinds = kinds_of(hint)
    given = value
    if isinstance(value, str) and str not in kinds and kinds & {bool, int, float}:
        value = _read_number(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {given!r}")
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        return int(value)
    if object in kinds or type(value) in kinds or (type(value) is int and float in kinds):
        return value
    if list in kinds and (value is None or isinstance(value, str | Mapping)):
        return [] if value is None else [value]
    if value is not None and type(value) not in EXPECTED:
        return value
    quotes = ": put it in quotes" if str in kinds and isinstance(value, int | float) else ""
    raise ValueError(f"{where} must be {_expected(kinds)}, got {given!r}{quotes}")


def parse_value(text: str, hint: Any, where: str) -> Any:
    """
    Reads a value of a command line as YAML; text where a field takes text, unless it is a list or a mapping in braces.

    Raises:
        ValueError: it is no YAML.
    """
    kinds = kinds_of(hint)
    for part in (hint, *typing.get_args(hint)):
        if typing.get_origin(part) is list:
            kinds = kinds.union(*(kinds_of(element) for element in typing.get_args(part)))
    if text in ("", "~", "null"):
        return None
    if str in kinds and not kinds & {bool, int, float} and not (kinds & {list, dict} and text[0] in "[{"):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: {text!r} is no value in YAML: {' '.join(str(error).split())}") from error


def _read_number(text: str) -> Any:
    """The number, or true or false, that a text stands for; the text where it is neither."""
    for read in (int, float, _TRUTH.__getitem__):
        try:
            return read(text.lower())
        except (ValueError, KeyError):
            continue
    return text


_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _expected(kinds: set[type]) -> str:
    names = [name for kind, name in EXPECTED.items() if kind in kinds and not (kind is int and float in kinds)]
    return " or ".join(names)

"""Values of a recipe on the command line: `--training.learning_rate 1e-5 --data.train a.jsonl b.jsonl`."""

import difflib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from .recipe import Recipe, block_class
from .values import field_hints, kinds_of, parse_value


def parse_overrides(arguments: Sequence[str], *, options: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """
    Reads `--block.key value ...` and `--block.key=value` for [`load_recipe`].

    A key may be written with dashes, and without its block where only one block has it. Values are read as YAML;
    several are a list; an empty one and `null` are None; a key that is true or false needs none to be true.

    Args:
        arguments: the part of a command line that holds them.
        options: others that the command knows, to name the nearest one.

    Returns:
        values by block and key.

    Raises:
        ValueError: an option is unknown, with the nearest known one, in several blocks, or without a value.
    """
    overrides: dict[str, dict[str, Any]] = {}
    for option, texts in _split(arguments):
        block, key = _find(option, options)
        hint = field_hints(block_class(block))[key]
        overrides.setdefault(block, {})[key] = _parse(texts, hint, f"--{block}.{key}")
    return overrides


def _split(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    option, texts = None, list[str]()
    for argument in arguments:
        if argument.startswith("--"):
            if option is not None:
                yield option, texts
            option, has_value, text = argument.partition("=")
            texts = [text] if has_value else []
        elif option is None:
            raise ValueError(f"unexpected argument {argument!r}: write --block.key before a value")
        else:
            texts.append(argument)
    if option is not None:
        yield option, texts


def _find(option: str, options: Sequence[str]) -> tuple[str, str]:
    block, dot, key = option.removeprefix("--").replace("-", "_").partition(".")
    if dot and block in Recipe._fields and key in field_hints(block_class(block)):
        return block, key
    # PEFT, which has the fields of `lora`, may be missing.
    known = {
        f"--{name}.{field}": (name, field)
        for name in Recipe._fields
        if name != "lora" or find_spec("peft") is not None
        for field in field_hints(block_class(name))
    }
    if dot:
        nearest = difflib.get_close_matches(option, [*known, *options], n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown option {option!r}; the nearest is {nearest!r}")
    found = [name for name, (_, field) in known.items() if field == block]
    if len(found) > 1:
        raise ValueError(f"several blocks have the option {option!r}: write {' or '.join(found)}")
    if found:
        return known[found[0]]
    short = {f"--{field}": name for name, (_, field) in known.items()} | {name: name for name in options}
    nearest = difflib.get_close_matches(option.replace("_", "-"), [name.replace("_", "-") for name in short], 1, 0.0)[0]
    nearest = next(name for key, name in short.items() if key.replace("_", "-") == nearest)
    raise ValueError(f"unknown option {option!r}; the nearest is {nearest!r}")


def _parse(texts: list[str], hint: Any, where: str) -> Any:
    kinds = kinds_of(hint)
    if not texts and bool in kinds:
        return True
    if not texts:
        raise ValueError(f"{where} needs a value")
    values = [parse_value(text, hint, where) for text in texts]
    if len(values) == 1:
        return values[0]
    if list not in kinds:
        raise ValueError(f"{where} takes one value, got {len(values)}: {' '.join(texts)}")
    return values

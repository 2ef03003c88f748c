"""Values of a recipe on the command line: `--training.learning_rate 1e-5 --data.train a.jsonl b.jsonl`."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ...utils.names import nearest
from .loader import RecipeError, load_yaml
from .recipe import Recipe, block_hints
from .values import YAML_ERRORS, element_kinds, kinds_of

logger = logging.getLogger(__name__)


def parse_overrides(arguments: Sequence[str], *, options: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """
    Reads `--block.key value ...` and `--block.key=value` for [`load_recipe`].

    A key may be written with dashes. Its block may be left out where only one block has the key. Values are read as
    YAML where the field does not take text. Several values are a list. An empty value and `null` are None. A key that
    takes true or false is true when it has no value. The last value of a repeated key is used, with a warning.

    Args:
        arguments: the part of a command line that holds the keys of the recipe.
        options: the other options of the command, which an error may name as the nearest one.

    Returns:
        values by block and key.

    Raises:
        ValueError: an option is unknown, is in several blocks or has no value, or its value is not YAML.
    """
    given: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            option, has_value, text = argument.partition("=")
            given.append((option, [text] if has_value else []))
        elif not given:
            raise ValueError(f"unexpected argument {argument!r}: write --block.key before a value")
        else:
            given[-1][1].append(argument)
    overrides: dict[str, dict[str, Any]] = {}
    for option, texts in given:
        block, key = _find(option, options)
        if key in overrides.get(block, {}):
            logger.warning(f"--{block}.{key} is given more than once: the last value is used")
        overrides.setdefault(block, {})[key] = _parse(texts, block_hints(block)[key], f"--{block}.{key}")
    return overrides


def _find(option: str, options: Sequence[str]) -> tuple[str, str]:
    """Returns the block and the key that an option names."""
    block, has_block, key = option.removeprefix("--").replace("-", "_").partition(".")
    if has_block and block in Recipe._fields and key in block_hints(block):
        return block, key
    known = [
        (name, field)
        for name in Recipe._fields
        if name != "lora" or find_spec("peft") is not None  # PEFT defines the fields of lora
        for field in block_hints(name)
    ]
    found = [] if has_block else [(name, field) for name, field in known if field == block]
    if len(found) == 1:
        return found[0]
    if found:
        choices = " or ".join(f"--{name}.{field}" for name, field in found)
        raise ValueError(f"several blocks have the option {option!r}: write {choices}")
    names = {f"--{name}.{field}" if has_block else f"--{field}": f"--{name}.{field}" for name, field in known}
    names |= {name: name for name in options}
    raise ValueError(f"unknown option {option!r}; the nearest is {names[nearest(option, names)]!r}")


def _parse(texts: list[str], hint: Any, where: str) -> Any:
    kinds = kinds_of(hint)
    if not texts and bool in kinds:
        return True
    if not texts:
        raise ValueError(f"{where} needs a value")
    if len(texts) > 1 and list not in kinds:
        raise ValueError(f"{where} takes one value, got {len(texts)}: {' '.join(texts)}")
    values = [_parse_value(text, kinds | element_kinds(hint), where) for text in texts]
    return values[0] if len(values) == 1 else values


def _parse_value(text: str, kinds: set[type], where: str) -> Any:
    if text in ("", "~", "null"):
        return None
    is_collection = text[0] in "[{" and kinds & {list, dict}
    if str in kinds and not kinds & {bool, int, float} and not is_collection:
        return text
    try:
        return load_yaml(text, where)
    except RecipeError:
        raise
    except YAML_ERRORS as error:
        raise ValueError(f"{where}: {text!r} is not a value in YAML: {' '.join(str(error).split())}") from error

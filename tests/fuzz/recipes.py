"""Recipes: damaged YAML, odd values, and values on the command line."""

from typing import Any

import yaml
from hypothesis import strategies as st

from llama_bidir.training.recipes import Recipe, load_recipe, parse_overrides
from llama_bidir.training.recipes.recipe import block_hints

from .damage import altered, damaged
from .readers import write_file
from .target import Target, attempt, check_message
from .texts import any_texts

RECIPE: dict[str, Any] = {
    "model": {"model_name_or_path": "base", "pooling": "avg", "temperature": 1.0, "dtype": "float32"},
    "data": {"train": ["a.jsonl", {"path": "b", "weight": 2}], "group_size": 5, "skip_bad_rows": False},
    "training": {
        "output_dir": "out",
        "learning_rate": 3e-6,
        "max_steps": 9,
        "save_strategy": "no",
        "lr_scheduler_kwargs": {"min_lr": 0.1},
    },
    "lora": {"r": 8, "target_modules": ["q_proj"]},
}
PIECES = [
    b"\n  x: 1",
    b"\nmodel: {}",
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!python/object:os.system ",
    b"!!binary ",
    b"? ",
    b"- ",
]
PIECES += [
    b"2001-99-99",
    b"0x_",
    b"1e-5",
    b"1:99",
    b"0o9",
    b"on",
    b"---\n",
    b"...\n",
    b"%YAML 9.9\n",
    b"[" * 2000,
    b"|\n",
]
OPTIONS = ["learning_rate", "train", "data.train", "model.pooling", "lora.r", "lora.target_modules", "bf16", "seed"]
OPTIONS += ["training.lr-scheduler-kwargs", "training.fsdp", "training.", ".x", "x", "", "data.group_size", "model"]
VALUES = [
    "1",
    "1e-5",
    "0.5",
    "true",
    "null",
    "",
    "~",
    "[1, 2]",
    "{a: 1}",
    "[",
    "a.jsonl",
    "-1",
    "1_0",
    "nan",
    "*a",
    "&a x",
]
VALUES += ["é", "2001-99-99", "0x_", "[" * 2000, "!!python/name:os.system", "x" * 3000, "\x00", "{a: {a: {a: 1}}}"]

yaml_text = yaml.safe_dump(RECIPE).encode()


@st.composite
def damaged_yaml(draw: st.DrawFn) -> bytes:
    content = draw(damaged(yaml_text, most=2)) if draw(st.booleans()) else yaml_text
    for piece in draw(st.lists(st.sampled_from(PIECES), max_size=2)):
        at = draw(st.integers(0, len(content)))
        content = content[:at] + piece + content[at:]
    return content


def check_values(recipe: Recipe) -> None:
    """What a recipe that was accepted holds."""
    assert type(recipe.model.model_name_or_path) is str
    assert type(recipe.data.train) is list
    assert recipe.model.temperature is None or isinstance(recipe.model.temperature, (int, float))
    assert type(recipe.data.group_size) is int
    assert type(recipe.data.skip_bad_rows) is bool
    assert isinstance(recipe.training.learning_rate, (int, float))


def check_yaml(content: bytes) -> None:
    """A recipe gives arguments of the right types, or an error that names the file; no tag of YAML runs code."""
    path = write_file("recipe.yaml", ("", content))
    recipe, error = attempt(load_recipe, path)
    if error is not None:
        return check_message(error, path)
    return check_values(recipe)


def check_recipe(recipe: Any) -> None:
    """A recipe of odd values gives arguments of the right types, or an error that names the file."""
    path = write_file("recipe.yaml", ("", yaml.safe_dump(recipe).encode()))
    loaded, error = attempt(load_recipe, path)
    if error is not None:
        return check_message(error, path)
    check_values(loaded)
    for block in ("model", "data"):
        for key, value in (recipe.get(block) or {}).items():
            found = getattr(getattr(loaded, block), key)
            is_read = isinstance(value, str) and not isinstance(found, str)  # a number that YAML takes for text
            assert found == value or is_read or isinstance(found, list) or value in ("", None)
    return None


def check_overrides(arguments: list[tuple[str, list[str]]], joined: bool) -> None:
    """Options give values of keys that exist, or an error that names one; the recipe takes them or names itself."""
    words = []
    for option, values in arguments:
        words += [f"--{option}={values[0]}", *values[1:]] if joined and values else [f"--{option}", *values]
    overrides, error = attempt(parse_overrides, words, options=["--dry-run"])
    if error is not None:
        keys = [option.replace("-", "_").rpartition(".")[2] for option, _ in arguments]
        assert any(key in str(error).replace("-", "_") for key in keys)
        return None
    for block, values in overrides.items():
        assert values.keys() <= block_hints(block).keys()
    recipe, error = attempt(load_recipe, "quickstart", overrides)
    if error is not None:
        return check_message(error, "quickstart")
    return check_values(recipe)


options = st.sampled_from(OPTIONS) | st.sampled_from(
    [f"{block}.{key}" for block in Recipe._fields for key in sorted(block_hints(block))]
)
TARGETS = [
    Target("YAML of recipes", check_yaml, {"content": damaged_yaml()}, weight=0.5, test_cases=50),
    Target("values of recipes", check_recipe, {"recipe": altered(RECIPE)}),
    Target(
        "recipes on the command line",
        check_overrides,
        {
            "arguments": st.lists(
                st.tuples(options, st.lists(st.sampled_from(VALUES) | any_texts, max_size=3)), min_size=1, max_size=3
            ),
            "joined": st.booleans(),
        },
    ),
]

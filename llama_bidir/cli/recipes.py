"""List the bundled recipes."""

import argparse

from .options import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares no options."""


def run(arguments: argparse.Namespace) -> None:
    """Prints the name of each recipe and what it does."""
    from ..training.recipes import describe_recipe, list_recipes

    names = list_recipes()
    say(*(f"{name:<{max(map(len, names))}}  {describe_recipe(name)}" for name in names))

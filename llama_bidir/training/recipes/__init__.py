"""Recipes: YAML files whose keys are the fields of the dataclasses that [`training.train`] takes."""

from .overrides import parse_overrides
from .recipe import Recipe, describe_recipe, list_recipes, load_recipe

__all__ = ["Recipe", "describe_recipe", "list_recipes", "load_recipe", "parse_overrides"]

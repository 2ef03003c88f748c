"""The name that somebody probably meant."""

import difflib
from collections.abc import Iterable


def nearest(name: object, known: Iterable[str]) -> str:
    """Returns the known name that looks most like `name`. Case, dashes and underscores do not count."""
    by_key = {_key(each): each for each in known}
    return by_key[difflib.get_close_matches(_key(str(name)), by_key, n=1, cutoff=0.0)[0]]


def _key(name: str) -> str:
    return name.casefold().replace("_", "-")

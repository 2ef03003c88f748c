"""Errors that tell bad input from work that failed, for callers that treat the two differently."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


class InputTypeError(TypeError):
    """A value that the user gave has the wrong type. Any other TypeError is a fault of the program."""


class ScoreError(ValueError):
    """A model gave a score that is NaN or infinite, so the work failed although the input may be right."""


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Adds a path to an OSError from the block if it does not name a file, as for a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise

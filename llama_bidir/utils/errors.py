"""Errors that tell bad input from work that failed, for callers that treat the two differently."""


class InputTypeError(TypeError):
    """A value that the user gave has the wrong type. Any other TypeError is a fault of the program."""


class ScoreError(ValueError):
    """A model gave a score that is NaN or infinite, so the work failed although the input may be right."""

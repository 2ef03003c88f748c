"""Reads the numbers that torchrun and `accelerate launch` set in the environment of a process."""

import os

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def launch_number(name: str, default: int) -> int:
    """
    Returns the number in an environment variable, or the default if the variable is unset or empty.

    Raises:
        ValueError: the variable is not a whole number.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"the environment variable {name} must be a whole number, got {text!r}: unset it, or start with torchrun"
        ) from None


def check_launch() -> None:
    """
    Unsets empty variables, because transformers and accelerate would fail to read them.

    Raises:
        ValueError: another variable is not a whole number.
    """
    for name in NAMES:
        launch_number(name, 0)
        if not os.environ.get(name, "0").strip():
            del os.environ[name]

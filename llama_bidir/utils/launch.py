"""The numbers that torchrun and `accelerate launch` give to a process in its environment."""

import os

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def launch_number(name: str, default: int) -> int:
    """
    Returns a number of this process, or the default if the variable is unset or empty.

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
    Unsets the variables that are empty, because transformers and accelerate would fail to read them.

    Raises:
        ValueError: one of the others is not a whole number.
    """
    for name in NAMES:
        launch_number(name, 0)
        if not os.environ.get(name, "0").strip():
            del os.environ[name]

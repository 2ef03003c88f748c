"""What torchrun and `accelerate launch` need of a process: numbers in its environment, and a clean end."""

import gc
import os
import sys

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


def leave_process_group() -> None:
    """
    Destroys torch's process group, if there is one, so the threads of gloo end before Python does. A thread that frees
    a tensor of its last collective while Python shuts down would abort the process (seen with torch 2.13).
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        gc.collect()  # a wrapped model in a reference cycle would keep the group and its threads alive
        distributed.destroy_process_group()

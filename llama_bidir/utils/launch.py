"""How the process of a command starts and ends: its environment, that of torchrun, and its process group."""

import gc
import os
import sys
from pathlib import PurePath

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
# Each decides how long a thread of GNU's or LLVM's OpenMP spins before it sleeps.
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# GNU's threads first spin for some hundred microseconds: without any spinning, small batches took a third longer on an
# idle machine. The default is 300,000 turns. LLVM's threads do not read the second variable and sleep at once.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}


def is_command() -> bool:
    """
    Returns whether Python was started as `llama-bidir` or as `python -m llama_bidir`.

    The answer is right only while the package itself is imported, because `sys.argv[0]` is "-m" only until Python has
    found the module to run.
    """
    program, *arguments = sys.argv or [""]
    if program != "-m":
        return PurePath(program).stem == "llama-bidir"
    options = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
    return options[-1:] in (["llama_bidir"], ["-mllama_bidir"])


def wait_passively() -> None:
    """
    Makes OpenMP's threads sleep soon while they wait, unless the environment says how they wait.

    Threads that spin take the CPU from the threads that they wait for, if other processes keep the cores busy. The call
    has an effect only before torch is imported. Processes that this process starts inherit the setting.
    """
    if not os.environ.keys() & set(WAIT_VARIABLES):
        os.environ.update(PASSIVE)


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

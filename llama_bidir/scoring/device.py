"""The devices of this machine, the dtypes that its CPU multiplies fast, and caches that must stay small."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..utils.launch import launch_number

# On a CPU, oneDNN and torch's wrapper around it cache 0.4 to 2.4 MB per distinct number of tokens in a batch, usually
# for 1,024 numbers: gigabytes in a long job. They read these variables before their first computation.
ONEDNN_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
ONEDNN_CACHE_ENTRIES = "64"


def limit_onednn_caches() -> None:
    """Bounds the memory of oneDNN's caches in this process, unless the environment says how large they are."""
    for name in ONEDNN_CACHES:
        os.environ.setdefault(name, ONEDNN_CACHE_ENTRIES)


Devices = str | torch.device | Sequence[str | torch.device]


def check_device(device: Any) -> torch.device:
    """Returns a device, given as one or by its name; raises ValueError for a name that torch does not know."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is not one that torch knows: {str(error).splitlines()[0]}") from None


class SplitDevices(NamedTuple):
    """The devices of worker processes, if there are any, and that of the model in this process, if it is named."""

    workers: list[str]
    model: torch.device | None


def split_devices(device: Any) -> SplitDevices:
    """
    Reads the device, or the list of devices for worker processes, that somebody asks for.

    Raises:
        ValueError: the list is empty, or torch does not know a device.
    """
    if isinstance(device, str) or not isinstance(device, Iterable):
        return SplitDevices([], None if device is None else check_device(device))
    names = [str(check_device(each)) for each in device]
    if not names:
        raise ValueError("device must name at least one device, got an empty list")
    return SplitDevices(names, torch.device("cpu"))


def default_device() -> str:
    """Returns the first accelerator if there is one, else the CPU; under torchrun or accelerate, one per process."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "cpu"
    return f"{accelerator.type}:{local_rank()}" if local_rank() else accelerator.type


def local_rank() -> int:
    """Returns the number of this process on its machine under torchrun or accelerate, else 0."""
    return max(0, launch_number("LOCAL_RANK", 0))  # some launchers set -1 for a single process


def cpu_dtype(stored: torch.dtype) -> torch.dtype:
    """
    Returns the dtype to compute in on this CPU: bfloat16 if weights are stored in bfloat16 and this CPU multiplies it
    faster, else float32. Weights stored in another dtype would lose digits in bfloat16.
    """
    return torch.bfloat16 if stored == torch.bfloat16 and multiplies_bfloat16_faster() else torch.float32


def multiplies_bfloat16_faster() -> bool:
    """
    Whether this CPU computes in bfloat16 faster than in float32. It is a rule, because a measurement could differ in
    the next process. AMX and Arm's bfloat16 instructions are faster than float32. So is AVX-512 BF16 on AMD CPUs; on an
    Intel Xeon it took twice the time of float32.
    """
    names = ["amx_bf16", "bf16", "sve_bf16", *([] if is_intel() else ["avx512_bf16"])]
    return any(cpu_capabilities().get(name) for name in names)


def cpu_capabilities() -> Mapping[str, Any]:
    """Returns what torch knows about this CPU; empty if torch is too old to tell."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def is_intel() -> bool:
    """Whether this is an Intel CPU, as far as torch knows."""
    return "Intel" in str(cpu_capabilities().get("cpu_name"))

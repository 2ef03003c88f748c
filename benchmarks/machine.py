"""Describes the machine, and measures time, the speed of matrix products, and the memory of a process."""

import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import LlamaConfig

import llama_bidir

T = TypeVar("T")

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "sentence-transformers",
    "onnxruntime",
    "openvino",
    "vllm",
    "flash-attn",
    "nemo-automodel",
    "FlagEmbedding",
)
CPU_FLAGS = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"}
MATMUL_ROWS = 2048


def describe_machine(device: str) -> dict[str, Any]:
    """Returns versions, processor, GPU, threads and date. `hardware` is the name of the machine in a table."""
    cpuinfo = _read("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    cpu = fields.get("model name", platform.processor() or platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name(device) if is_cuda(device) else None
    return {
        "hardware": gpu or f"{cpu}, {cores} cores",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "cpu": cpu,
        "cpu_cores": cores,
        "cpu_flags": sorted(CPU_FLAGS & set(fields.get("flags", "").split())),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"llama-bidir": llama_bidir.__version__, **{name: _version(name) for name in PACKAGES}},
    }


class Deadline:
    """The end of a run that resumes later: `seconds` after this object was made, or never if they are 0."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + (seconds or float("inf"))
        self.seconds = seconds

    def is_over(self) -> bool:
        """Returns whether the time is over, and says so."""
        over = time.monotonic() > self.end
        if over:
            print(f"{self.seconds:.0f} seconds are over: run the same command again to measure the rest", flush=True)
        return over


def is_cuda(device: str) -> bool:
    """Returns whether a device is a CUDA device."""
    return torch.device(device).type == "cuda"


def timed(function: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Calls `function` and returns the seconds until the device has finished its work, and the result."""
    if is_cuda(device):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = function()
    if is_cuda(device):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


@torch.inference_mode()
def matmul_speed(config: LlamaConfig, dtype: str, device: str) -> float:
    """
    Returns the best speed of a linear layer over a few shapes, in FLOP/s: that of `torch.nn.functional.linear`, or on a
    CPU that of oneDNN if it is faster.

    The shapes are 2048 x 2048 x 2048 and those of the model's MLP with 2,048 rows. On CUDA there is also
    8192 x 8192 x 8192, because smaller products do not keep a GPU busy. Each shape is timed over two calls (20 on
    CUDA), after one call that is not counted.

    Args:
        config: configuration with the shape of the model.
        dtype: name of the dtype of the matrices.
        device: device of the matrices.
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    shapes = [(MATMUL_ROWS, 2048, 2048), (MATMUL_ROWS, hidden, intermediate), (MATMUL_ROWS, intermediate, hidden)]
    calls = 2
    if is_cuda(device):
        shapes.append((8192, 8192, 8192))
        calls = 20
    return max(_linear_speed(*shape, calls=calls, dtype=getattr(torch, dtype), device=device) for shape in shapes)


def _linear_speed(rows: int, inputs: int, outputs: int, *, calls: int, dtype: torch.dtype, device: str) -> float:
    states = torch.randn(rows, inputs, dtype=dtype, device=device)
    weight = torch.randn(outputs, inputs, dtype=dtype, device=device)

    products = [partial(torch.nn.functional.linear, states, weight)]
    onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    if onednn is not None and not is_cuda(device) and dtype == torch.float32:  # others take oneDNN without being told
        products.append(partial(onednn, states, weight, None, "none", [], ""))
    seconds = []
    for multiply in products:
        multiply()
        seconds.append(timed(partial(_repeat, multiply, calls), device)[0])
    return 2 * calls * rows * inputs * outputs / min(seconds)


def _repeat(function: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        function()


def peak_memory(device: str) -> int:
    """
    Returns the peak memory of this process in bytes.

    On CUDA this is the allocated GPU memory (`max_memory_allocated`). Elsewhere it is the resident memory, including
    code and mapped pages of files.
    """
    if is_cuda(device):
        return torch.cuda.max_memory_allocated(device)
    # On Linux, `ru_maxrss` of a new process starts at the peak of its parent, and the kernel's VmHWM starts at zero.
    if (peak := _status("VmHWM")) is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_above(function: Callable[[], T], device: str) -> tuple[int, T]:
    """
    Calls `function` and returns the peak memory during the call in bytes, above what was in use before, and the result.

    Where the peak of a CPU process cannot be reset, a peak before the call counts too.
    """
    if is_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM to the memory in use
        before = _status("VmRSS") or peak_memory(device)
    result = function()
    return peak_memory(device) - before, result


def _status(name: str) -> int | None:
    """Returns a size from Linux's description of this process in bytes, or None if there is none."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if os.path.exists(path) else ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

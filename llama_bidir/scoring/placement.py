"""Where a model is computed: in this process, or in worker processes on several devices."""

from collections.abc import Sequence
from typing import Any

import torch

from .device import Devices, split_devices
from .engine import Engine, LocalEngine
from .forks import Lock, leave_threads_of_parent
from .int8 import check_int8_devices, is_int8
from .workers import WorkerPool


class Placement:
    """
    The engine of a model, made anew when the model or its devices change.

    Args:
        model: the model in this process.
        worker_devices: one worker process each; none computes in this process.
    """

    def __init__(self, model: Any, worker_devices: Sequence[str]):
        self.worker_devices = _check_workers(model, worker_devices)
        self._local_engine = LocalEngine(model)
        self._pool: WorkerPool | None = None
        self._lock = Lock()

    def engine(self, model: Any) -> Engine:
        """Returns what computes the logits of `model`, with its worker processes started."""
        leave_threads_of_parent()
        with self._lock.hold():
            if self._local_engine.model is not model:  # replaced by the user, with a merged one for example
                self.close()
                self._local_engine = LocalEngine(model)
            if not self.worker_devices:
                return self._local_engine
            if self._pool is None or not self._pool.is_open:
                self._pool = WorkerPool(model, self.worker_devices)
            return self._pool

    def move(self, model: Any, device: Devices | None) -> None:
        """Moves the model, and stops the workers if others are asked for; None moves nothing."""
        if device is None:
            return
        workers, model_device = split_devices(device)
        if is_int8(model):
            check_int8_devices([*map(torch.device, workers)] or [model_device or model.device])
        _check_workers(model, workers)
        if workers != self.worker_devices:
            self.close()
            self._pool, self.worker_devices = None, workers
        model.to(model_device)

    def close(self) -> None:
        """Stops the worker processes, if there are any."""
        if self._pool is not None:
            self._pool.close()


def _check_workers(model: Any, worker_devices: Sequence[str]) -> list[str]:
    """Returns the devices; raises ValueError for an exported graph, which has no worker processes."""
    if worker_devices and not isinstance(model, torch.nn.Module):
        raise ValueError(f"backend 'onnx' computes on the CPU: leave device out, got {list(worker_devices)!r}")
    return list(worker_devices)

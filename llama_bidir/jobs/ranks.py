"""The processes that torchrun started, as a job sees them."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..scoring.distributed import is_shared

Result = TypeVar("Result")

# A process that is done may wait for days. A process that dies is noticed immediately, whatever the timeout.
LONGEST_WAIT = timedelta(days=365)


class Ranks:
    """The number of this process among those that were launched together: rank 0 of 1 if it is alone."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._group: Any = None
        if is_shared(torch.device("cpu")):
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)

    def first(self, function: Callable[[], Result]) -> Result:
        """
        Calls a function in the first process and returns its result in all of them.

        Raises:
            RuntimeError: in the other processes, if the function raises in the first one.
        """
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]
        error = None
        if self.rank == 0:
            try:
                answer[0] = function()
            except Exception as raised:
                error = raised
                answer[1] = f"process 0 failed: {type(error).__name__}: {error}"
        dist.broadcast_object_list(answer, src=0, group=self._group)
        if error is not None:
            raise error
        if answer[1] is not None:
            raise RuntimeError(answer[1])
        return answer[0]

    def wait(self) -> None:
        """
        Waits for all processes.

        Raises:
            RuntimeError: one of them ended.
        """
        if self.size > 1:
            dist.barrier(group=self._group)


def check_shared_file(path: os.PathLike[str], ranks: Ranks) -> None:
    """Raises FileNotFoundError in a process that does not see a file that the first one wrote."""
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"process {ranks.rank} does not see the file {os.fspath(path)!r}, which process 0 wrote: under torchrun, "
            "all machines must share the folder of the output"
        )

"""Memory that one forward pass on a CPU uses again in each layer."""

from math import prod

import torch


class Buffers:
    """
    Named pieces of memory. A new tensor of some megabytes costs the system as much time as a pass over it, because its
    pages must be mapped and cleared.
    """

    def __init__(self) -> None:
        self._memory: dict[str, torch.Tensor] = {}

    def take(self, name: str, like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """
        Returns an uninitialized tensor, which is valid until the same name is taken again.

        Args:
            name: of the piece of memory.
            like: has the device and, if `dtype` is None, the dtype of the result.
            shape: of the result; that of `like` if there is none.
        """
        dtype, shape = dtype or like.dtype, shape or tuple(like.shape)
        size = prod(shape) * dtype.itemsize
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size:
            memory = self._memory[name] = torch.empty(size, dtype=torch.uint8, device=like.device)
        return memory[:size].view(dtype).view(shape)

"""
Linear layers in int8: one scale per output channel of the weights, and one per token of the input.

A token's scale depends on that token alone, so a score does not depend on the other pairs of its batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from .buffers import Buffers
from .device import cpu_capabilities, multiplies_bfloat16_faster

LARGEST = 127
# A row is scaled as if it had a value of at least this magnitude: 127 divided by it must still be a float32.
SMALLEST = 1e-30
# Instructions that add products of int8 without rounding, by torch's names for them.
INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm")
# On CUDA, `torch._int_mm` needs at least this many rows.
SMALLEST_CUDA_ROWS = 17


class QuantizedRows(NamedTuple):
    """
    Rows of int8 values, each with its scale: `values * scales` are the rows.

    Args:
        values (`torch.Int8Tensor` of shape `(num_rows, num_columns)`): from -127 to 127.
        scales (`torch.FloatTensor` of shape `(num_rows, 1)`): positive.
    """

    values: torch.Tensor
    scales: torch.Tensor


def quantize_rows(rows: torch.Tensor, buffers: Buffers | None = None) -> QuantizedRows:
    """
    Rounds each row to int8. Its scale makes the largest magnitude of the row 127, unless that is below `SMALLEST`.

    Args:
        rows (`torch.Tensor` of shape `(num_rows, num_columns)`): any floating dtype.
        buffers: memory for the values, which are then valid until the next call.
    """
    buffers = buffers or Buffers()
    # Two reductions: `aminmax` and a norm of order infinity are each twenty times slower on a CPU (torch 2.13).
    largest = torch.maximum(rows.amax(dim=-1, keepdim=True), rows.amin(dim=-1, keepdim=True).neg_()).float()
    largest.clamp_(min=SMALLEST)
    scaled = torch.mul(rows, LARGEST / largest, out=buffers.take("scaled", rows, dtype=torch.float32))
    return QuantizedRows(buffers.take("values", rows, dtype=torch.int8).copy_(scaled.round_()), largest / LARGEST)


class Int8Linear(nn.Module):
    """
    A linear layer that multiplies in int8. Its output has the dtype of its input.

    Args:
        weight (`torch.Tensor` of shape `(out_features, in_features)`): any floating dtype.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*).
    """

    weight: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        values, scales = quantize_rows(weight.detach())
        self.register_buffer("weight", values)
        self.register_buffer("scales", scales[:, 0])
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product = self.multiply(quantize_rows(input.flatten(0, -2)))
        return product.to(input.dtype).unflatten(0, input.shape[:-1])

    def multiply(self, rows: QuantizedRows, out: torch.Tensor | None = None) -> torch.Tensor:
        """
        Computes the output for quantized rows.

        Args:
            rows: the input.
            out (`torch.FloatTensor` of shape `(num_rows, out_features)`, *optional*): memory for the output.

        Returns:
            `torch.FloatTensor` of shape `(num_rows, out_features)`.
        """
        if out is None:
            out = rows.scales.new_empty(len(rows.values), self.out_features)
        product = _integer_product(rows.values, self.weight, out.view(torch.int32))
        out.copy_(product).mul_(self.scales).mul_(rows.scales)
        return out if self.bias is None else out.add_(self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8Linear":
        """Moves the buffers. A cast to another floating dtype does not change the scales."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self


class SkippedLinear(nn.Module):
    """
    A linear layer that int8 skips: in bfloat16 where the device multiplies that faster, else in float32.

    Args:
        weight (`torch.Tensor` of shape `(out_features, in_features)`): any floating dtype.
        bias (`torch.Tensor` of shape `(out_features,)`, *optional*).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        dtype = torch.bfloat16 if weight.device.type != "cpu" or multiplies_bfloat16_faster() else torch.float32
        self.register_buffer("weight", weight.detach().to(dtype))
        self.register_buffer("bias", None if bias is None else bias.detach().to(dtype))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = linear(input.to(self.weight.dtype), self.weight, self.bias)
        return product.to(input.dtype)


def _integer_product(values: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`values @ weight.t()` in int32, in the memory of `out` where it can be."""
    if values.device.type != "cuda" or len(values) >= SMALLEST_CUDA_ROWS:
        return torch._int_mm(values, weight.t(), out=out)
    padding = values.new_zeros(SMALLEST_CUDA_ROWS - len(values), values.shape[1])
    return torch._int_mm(torch.cat([values, padding]), weight.t())[: len(values)]


def quantize_linears(model: Any, skip_modules: Sequence[str] = ()) -> None:
    """
    Replaces the linear layers of the decoder layers by int8 ones, one after the other, so that memory never holds the
    weights of more than one layer twice.

    Args:
        model: a [`LlamaBidirectionalForSequenceClassification`].
        skip_modules: names of layers that become a [`SkippedLinear`], within the body, such as
            `"layers.2.mlp.down_proj"`.

    Raises:
        ValueError: a linear layer is not a plain one, for example because it has an adapter.
    """
    kinds = {
        name: type(module)
        for name, module in model.model.layers.named_modules(prefix="layers")
        if name.endswith("_proj") or isinstance(module, nn.Linear)
    }
    for name, kind in kinds.items():
        if kind is not nn.Linear or not name.endswith("_proj"):
            raise ValueError(
                f"dtype 'int8' replaces plain linear layers, but {name} is a {kind.__name__} or belongs to one: merge "
                "the adapter first, or load the checkpoint without it"
            )
    for name in kinds:
        layer = model.model.get_submodule(name)
        replacement = SkippedLinear if name in skip_modules else Int8Linear
        model.model.set_submodule(name, replacement(layer.weight, layer.bias))


@contextmanager
def in_int8(body: Any, names: Sequence[str]) -> Iterator[None]:
    """Replaces linear layers by int8 ones until the context closes, by their names in the body of a model."""
    layers = {name: body.get_submodule(name) for name in names}
    try:
        for name, layer in layers.items():
            body.set_submodule(name, Int8Linear(layer.weight, layer.bias))
        yield
    finally:
        for name, layer in layers.items():
            body.set_submodule(name, layer)


def is_int8(model: Any) -> bool:
    """Whether a model is one that [`quantize_linears`] has changed."""
    kinds = (Int8Linear, SkippedLinear)
    return isinstance(model, nn.Module) and any(type(module) in kinds for module in model.modules())


def dtype_name(model: Any) -> str:
    """The name of the dtype that a model computes in: `"int8"` if it has int8 layers."""
    return "int8" if is_int8(model) else str(model.dtype).removeprefix("torch.")


def check_int8_devices(devices: Iterable[torch.device]) -> None:
    """Raises ValueError unless each device has instructions for products of int8. Without them, float32 is faster."""
    for device in devices:
        check_int8_device(device)


def check_int8_device(device: torch.device) -> None:
    """As [`check_int8_devices`], for one device."""
    if device.type == "cuda":
        # The rules of torch._int_mm: NVIDIA Ampere or newer.
        has_instructions = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        has_instructions = device.type == "cpu" and any(cpu_capabilities().get(name) for name in INT8_INSTRUCTIONS)
    if not has_instructions:
        raise ValueError(
            f"dtype 'int8' needs instructions for products of int8, and {device} has none: a CPU needs one of "
            f"{', '.join(INT8_INSTRUCTIONS)}, a GPU must be an NVIDIA Ampere or newer. Use bfloat16 or float32, which "
            "are faster there"
        )

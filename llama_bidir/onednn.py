"""Linear layers and MLPs of a Llama by oneDNN's kernels, for inference in float32 on a CPU."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP


def use_onednn(model: nn.Module) -> None:
    """
    Turns the plain linear layers and MLPs of a model into their oneDNN kind, in place; names and weights stay.

    They compute what they computed before, and where oneDNN does not apply (training, another dtype or device, hooks,
    quantized weights), they compute it as before. Layers of another type, such as those of adapters, are left alone.
    Nothing is turned where torch has Intel's MKL and the CPU is one of Intel's, for which it is tuned.
    """
    if not torch.backends.mkldnn.is_available() or (torch.backends.mkl.is_available() and is_intel()):
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
        elif type(module) is LlamaMLP and module.config.hidden_act == "silu":
            module.__class__ = OneDNNMLP


def cpu_capabilities() -> Mapping[str, Any]:
    """What torch knows of this CPU; nothing where it is too old to tell."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def is_intel() -> bool:
    """Whether this CPU is one of Intel's, as far as torch tells."""
    return "Intel" in str(cpu_capabilities().get("cpu_name"))


class OneDNNLinear(nn.Linear):
    """
    A linear layer whose float32 product is oneDNN's instead of that of the BLAS that torch was built with, which is not
    tuned for every CPU. In bfloat16 torch takes oneDNN by itself.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not _applies(input, self.weight):
            return super().forward(input)
        return _linear(input, self.weight, self.bias, "none", [], "")


class OneDNNMLP(LlamaMLP):
    """Llama's MLP whose activation and product are computed where the matrix products leave their results."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        if not all(_is_plain(projection) and _applies(x, projection.weight) for projection in projections):
            return super().forward(x)
        gate = _linear(x, self.gate_proj.weight, self.gate_proj.bias, "swish", [1.0], "")
        product = _linear.binary(x, gate, self.up_proj.weight, self.up_proj.bias, "mul")
        return self.down_proj(product)


# The operator of torch.compile's own CPU backend: it has no name in the public interface.
_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _applies(input: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        _linear is not None
        and input.dtype == weight.dtype == torch.float32
        and input.device.type == "cpu"
        and type(weight) is nn.Parameter  # not the tensor of a quantizer
        and weight.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer does no more than its forward: it has no hooks, of torch or of accelerate."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is OneDNNLinear and not hooks and "forward" not in vars(layer)

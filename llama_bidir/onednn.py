"""Linear layers and MLPs of a Llama by oneDNN's kernels, for inference in float32 on a CPU."""

from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP


def use_onednn(model: nn.Module) -> None:
    """
    Turns the plain linear layers and MLPs of a model into their oneDNN kind, in place; names, weights and hooks stay.

    They compute what they computed before, and where oneDNN does not apply (training, another dtype or device), they
    compute it as before. Layers of another type, such as those of adapters or quantized ones, are left alone.
    """
    if not torch.backends.mkldnn.is_available():
        return
    for module in model.modules():
        if type(module) is nn.Linear and type(module.weight.data) is torch.Tensor:  # not the packed one of a quantizer
            module.__class__ = OneDNNLinear
        elif type(module) is LlamaMLP and module.config.hidden_act == "silu":
            module.__class__ = OneDNNMLP


class OneDNNLinear(nn.Linear):
    """
    A linear layer whose float32 product is oneDNN's instead of the BLAS that torch was built with: 10 to 30% faster on
    CPUs for which that BLAS is not tuned (`benchmarks/`). In bfloat16 torch takes oneDNN by itself.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not _applies(input):
            return super().forward(input)
        return _linear(input, self.weight, self.bias, "none", [], "")


class OneDNNMLP(LlamaMLP):
    """Llama's MLP whose activation and product are computed where the matrix products leave their results."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projections = (self.gate_proj, self.up_proj, self.down_proj)
        if not _applies(x) or any(type(projection) is not OneDNNLinear for projection in projections):
            return super().forward(x)
        gate = _linear(x, self.gate_proj.weight, self.gate_proj.bias, "swish", [1.0], "")
        product = _linear.binary(x, gate, self.up_proj.weight, self.up_proj.bias, "mul")
        return self.down_proj(product)


# The operator of torch.compile's own CPU backend: it has no name in the public interface.
_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _applies(input: torch.Tensor) -> bool:
    return (
        _linear is not None
        and input.dtype == torch.float32
        and input.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )

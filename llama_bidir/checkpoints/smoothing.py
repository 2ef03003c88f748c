"""
Smoothing: moves large values of activations into weights, so that int8 rounds both less.

The method is SmoothQuant (Xiao et al., https://arxiv.org/abs/2211.10438), with two additions. It covers the inputs of
all linear layers of Llama, and each factor is a power of two. A product with a power of two rounds nothing. Therefore
the smoothed model computes the same scores, bit for bit, in every tool. In float16, very small weights lose digits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from ..scoring.int8 import quantize_rows

# How far a factor follows the activations (1) or the weights (0). No factor at all is tried too.
STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Rows of a linear layer's input that are kept to compare strengths, and the distance between two of them.
SAMPLE_ROWS, SAMPLE_STEP = 512, 16


class Site(NamedTuple):
    """
    Linear layers with the same input, and the weights that produce this input.

    Args:
        producers: parameters whose first dimension is the channels of the input: a norm's weight, or weight and bias of
            a linear layer.
        consumers: names of the linear layers that read the input, within the body of the model.
        shared: how many heads in a row read one head of the producer, if there are fewer producing than reading heads.
    """

    producers: Sequence[torch.Tensor]
    consumers: list[str]
    shared: int = 1


def find_sites(body: Any) -> Iterator[Site]:
    """Yields the four sites of each decoder layer, in the order of computation."""
    for number, layer in enumerate(body.layers):
        attention, mlp, name = layer.self_attn, layer.mlp, f"layers.{number}"
        yield Site([layer.input_layernorm.weight], [f"{name}.self_attn.{part}_proj" for part in ("q", "k", "v")])
        yield Site(_parameters(attention.v_proj), [f"{name}.self_attn.o_proj"], attention.num_key_value_groups)
        yield Site([layer.post_attention_layernorm.weight], [f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"])
        yield Site(_parameters(mlp.up_proj), [f"{name}.mlp.down_proj"])


def _parameters(layer: nn.Linear) -> list[torch.Tensor]:
    return [layer.weight] if layer.bias is None else [layer.weight, layer.bias]


class Inputs:
    """What calibration keeps of a linear layer: the largest magnitude per input channel, and some rows of its input."""

    def __init__(self) -> None:
        self.largest = torch.zeros((), dtype=torch.float32, device="cpu")
        self._rows: list[torch.Tensor] = []

    def add(self, states: torch.Tensor) -> None:
        """Reads the input of a forward pass, of shape `(..., in_features)`."""
        rows = states.detach().flatten(0, -2).float()
        self.largest = torch.maximum(self.largest, rows.abs().amax(dim=0))
        missing = SAMPLE_ROWS - sum(map(len, self._rows))
        self._rows.append(rows[::SAMPLE_STEP][:missing].clone())

    @property
    def rows(self) -> torch.Tensor:
        """`torch.FloatTensor` of shape `(at most 512, in_features)`."""
        return torch.cat(self._rows)


@contextmanager
def watching(body: Any, names: Iterable[str]) -> Iterator[dict[str, Inputs]]:
    """Yields what forward passes send into linear layers while the context is open, by the names of the layers."""
    found = {name: Inputs() for name in names}

    def reader(inputs: Inputs) -> Callable[[nn.Module, Any], None]:
        return lambda module, arguments: inputs.add(arguments[0])

    with ExitStack() as hooks:
        for name, inputs in found.items():
            hooks.callback(body.get_submodule(name).register_forward_pre_hook(reader(inputs)).remove)
        yield found


def smooth(body: Any, calibrate: Callable[[], Any]) -> None:
    """
    Smooths a model in place. Its outputs stay the same.

    Args:
        body: a [`LlamaBidirectionalModel`] in a floating-point dtype.
        calibrate: runs forward passes of typical pairs, each through all modules of the body.
    """
    sites = list(find_sites(body))
    with watching(body, [site.consumers[0] for site in sites]) as found:
        calibrate()
    for site in sites:
        inputs = found.pop(site.consumers[0])
        layers = [body.get_submodule(name) for name in site.consumers]
        weight = torch.cat([layer.weight.detach().float() for layer in layers])
        factors = best_factors(inputs, weight, shared=site.shared, head_dim=body.config.head_dim)
        _fold(site, layers, factors, body.config.head_dim)


def best_factors(inputs: Inputs, weight: torch.Tensor, *, shared: int, head_dim: int) -> torch.Tensor:
    """
    Chooses the factors with which int8 rounds the outputs least.

    Args:
        inputs: of the linear layers.
        weight (`torch.FloatTensor` of shape `(out_features, in_features)`): of all layers that read the input.
        shared, head_dim: each factor is the same for `shared` heads of `head_dim` channels in a row.

    Returns:
        `torch.FloatTensor` of shape `(in_features,)`: powers of two, which divide the input and multiply the weights.
    """
    rows, in_rows, in_weight = inputs.rows, inputs.largest, weight.abs().amax(dim=0)
    if shared > 1:
        in_rows, in_weight = (_over_heads(each, shared, head_dim) for each in (in_rows, in_weight))
    candidates = [torch.ones_like(in_rows)]
    for strength in STRENGTHS:
        ratio = in_rows.clamp(min=1e-5) ** strength / in_weight.clamp(min=1e-5) ** (1 - strength)
        candidates.append(torch.exp2((ratio / ratio.median()).log2().round().clamp(-15, 15)))
    return min(candidates, key=lambda factors: float(rounding(rows / factors, weight * factors).square().mean()))


def _over_heads(largest: torch.Tensor, shared: int, head_dim: int) -> torch.Tensor:
    """The largest value among the heads that share a producing head, for each of these heads."""
    heads = largest.view(-1, shared, head_dim)
    return heads.amax(dim=1, keepdim=True).expand_as(heads).reshape(-1)


def rounding(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The error of [`~scoring.int8.Int8Linear`], of shape `(num_rows, out_features)`, computed in float32."""
    (int_rows, row_scales), (int_weight, weight_scales) = quantize_rows(rows), quantize_rows(weight)
    return linear(int_rows.float(), int_weight.float()) * row_scales * weight_scales[:, 0] - linear(rows, weight)


@torch.no_grad()
def _fold(site: Site, consumers: Sequence[nn.Linear], factors: torch.Tensor, head_dim: int) -> None:
    for layer in consumers:
        layer.weight.mul_(factors)
    if site.shared > 1:
        factors = factors.view(-1, site.shared, head_dim)[:, 0].reshape(-1)
    for parameter in site.producers:
        parameter.div_(factors.view(-1, *[1] * (parameter.ndim - 1)))

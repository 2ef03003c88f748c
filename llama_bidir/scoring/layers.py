"""Llama's decoder layer for inference: what transformers' layer computes, in fewer passes over memory."""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    eager_attention_forward,
)

from .device import is_intel


def use_inference_layers(model: nn.Module) -> None:
    """
    Turns the decoder layers of a Llama into their inference kind, in place; names and weights stay.

    They compute what they computed before. Training, autocast and `torch.compile` go the way that they went before, and
    so does each part of a layer that is more than a plain weight (adapters, quantizers, hooks).
    """
    for module in model.modules():
        # accelerate has bound the forward of the class that the layer had when its hooks came.
        if type(module) is LlamaDecoderLayer and "forward" not in vars(module):
            module.__class__ = InferenceDecoderLayer


class InferenceDecoderLayer(LlamaDecoderLayer):
    """
    A decoder layer that overwrites what nobody needs again, adds the residual within the matrix product, normalizes in
    one kernel on a GPU, and activates within the matrix product where that is oneDNN's.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *args: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        has_cache = args or any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))
        if has_cache or position_embeddings is None or not self._applies(hidden_states):
            output: torch.Tensor = super().forward(
                hidden_states, attention_mask, position_ids, *args, position_embeddings=position_embeddings, **kwargs
            )
            return output
        attention, mlp = self.self_attn, self.mlp
        normed = normalize(hidden_states, self.input_layernorm)
        # (batch_size, sequence_length, hidden_size) -> (batch_size, sequence_length, heads, head_dim)
        query, key, value = (
            project(normed, projection).unflatten(-1, (-1, attention.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = (angles.unsqueeze(2) for angles in position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        attended, _ = attend(
            attention,
            rotate(query, cos, sin).transpose(1, 2),
            rotate(key, cos, sin).transpose(1, 2),
            value.transpose(1, 2),
            attention_mask,
            dropout=0.0,
            scaling=attention.scaling,
            position_ids=position_ids,
            **kwargs,
        )
        hidden_states = add_projected(hidden_states, attended.flatten(2), attention.o_proj)
        normed = normalize(hidden_states, self.post_attention_layernorm)
        overwrite = _is_plain(self.post_attention_layernorm, LlamaRMSNorm)  # a hook may have kept its input
        return add_projected(hidden_states, gate(normed, mlp), mlp.down_proj, overwrite=overwrite)

    def _applies(self, hidden_states: torch.Tensor) -> bool:
        device = hidden_states.device.type
        return not (
            self.training
            or torch.is_grad_enabled()
            or device == "meta"
            or torch.is_autocast_enabled(device)
            or torch.compiler.is_compiling()
            or torch.nn.modules.module._has_any_global_hook()
        ) and (_is_plain(self.self_attn, LlamaAttention) and _is_plain(self.mlp, LlamaMLP))


# FSDP and device maps find the layers of a model by this name.
InferenceDecoderLayer.__name__ = LlamaDecoderLayer.__name__


def _is_plain(module: nn.Module, kind: type[nn.Module], states: torch.Tensor | None = None) -> bool:
    """
    Whether calling a module does what its class says and no more: it has no hooks, no forward of its own, is not
    compiled, and its weight is an ordinary one that can be multiplied with `states`.
    """
    if type(module) is not kind or "forward" in vars(module) or module._compiled_call_impl is not None:
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module._parameters.get("weight")
    return states is None or (
        type(weight) is nn.Parameter and weight.dtype == states.dtype and weight.device == states.device
    )


def normalize(states: torch.Tensor, norm: LlamaRMSNorm) -> torch.Tensor:
    """`norm(states)`, of shape `(batch_size, sequence_length, hidden_size)`."""
    if _is_plain(norm, LlamaRMSNorm, states):
        weight, epsilon = norm.weight, norm.variance_epsilon
        if states.device.type == "cuda":
            return rms_norm(states, weight.shape, weight, epsilon)
        if states.dtype == torch.float32:
            variance = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square_() / states.shape[-1]
            return (states * (variance + epsilon).rsqrt_()).mul_(weight)
    normed: torch.Tensor = norm(states)
    return normed


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotary position embedding, as of `apply_rotary_pos_emb`.

    Args:
        states (`torch.Tensor` of shape `(batch_size, sequence_length, heads, head_dim)`): queries or keys.
        cos, sin (`torch.Tensor` of shape `(batch_size, sequence_length, 1, head_dim)`): whose halves are equal.
    """
    half = states.shape[-1] // 2
    rotated = states * cos
    rotated[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return rotated


def project(states: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """`layer(states)`, of shape `(batch_size, sequence_length, layer.out_features)`."""
    if _is_plain(layer, nn.Linear, states) and _is_for_onednn(states):
        product: torch.Tensor = _onednn_linear(states, layer.weight, layer.bias, "none", [], "")
    else:
        product = layer(states)
    return product


def add_projected(
    residual: torch.Tensor, states: torch.Tensor, layer: nn.Linear, *, overwrite: bool = False
) -> torch.Tensor:
    """`residual + layer(states)`, of the shape of `residual`, which may be overwritten where `overwrite` says so."""
    if not _is_plain(layer, nn.Linear, states):
        total: torch.Tensor = residual + layer(states)
    elif _is_for_onednn(states):
        total = _onednn_linear.binary(states, residual, layer.weight, layer.bias, "add")
    else:
        rows, inputs, weight = residual.flatten(0, 1), states.flatten(0, 1), layer.weight.t()
        total = rows.addmm_(inputs, weight) if overwrite else torch.addmm(rows, inputs, weight)
        total = total.view_as(residual)
        if layer.bias is not None:
            total += layer.bias
    return total


def gate(states: torch.Tensor, mlp: LlamaMLP) -> torch.Tensor:
    """`silu(gate_proj(states)) * up_proj(states)`, of shape `(batch_size, sequence_length, intermediate_size)`."""
    gate_proj, up_proj = mlp.gate_proj, mlp.up_proj
    if not _is_plain(mlp.act_fn, type(ACT2FN["silu"])):
        product: torch.Tensor = mlp.act_fn(gate_proj(states)) * up_proj(states)
    elif _is_for_onednn(states) and all(_is_plain(layer, nn.Linear, states) for layer in (gate_proj, up_proj)):
        activated = _onednn_linear(states, gate_proj.weight, gate_proj.bias, "swish", [1.0], "")
        product = _onednn_linear.binary(states, activated, up_proj.weight, up_proj.bias, "mul")
    else:
        inplace = _is_plain(gate_proj, nn.Linear)  # a hook may have kept its output
        product = silu(project(states, gate_proj), inplace=inplace).mul_(project(states, up_proj))
    return product


# The operator of torch.compile's own CPU backend: it has no name in the public interface.
_onednn_linear: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)


def _is_for_onednn(states: torch.Tensor) -> bool:
    """
    Whether to multiply by oneDNN instead of the BLAS that torch was built with, which is not tuned for every CPU. In
    bfloat16 torch takes oneDNN by itself.
    """
    return states.device.type == "cpu" and states.dtype == torch.float32 and _onednn_is_faster()


@cache
def _onednn_is_faster() -> bool:
    """Intel's CPUs are what Intel's MKL is tuned for."""
    return _onednn_linear is not None and not (torch.backends.mkl.is_available() and is_intel())

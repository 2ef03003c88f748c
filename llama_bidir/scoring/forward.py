"""
A forward pass for scoring: what a plain reranker computes, from its weights, in fewer passes over memory.

It adds residuals within the matrix product, overwrites what nobody reads again, normalizes in one kernel on a GPU, and
activates within the matrix product where oneDNN computes it. It changes nothing in the model.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, rms_norm, silu
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from ..fields_llama_bidir import check_length
from ..modeling_llama_bidir import (
    Float32Linear,
    LlamaBidirectionalForSequenceClassification,
    LlamaBidirectionalModel,
    packed_positions,
    pool_packed,
)
from .buffers import Buffers
from .device import is_intel, multiplies_bfloat16_faster
from .int8 import Int8Linear, SkippedLinear, quantize_rows
from .packing import PACKED_ATTENTION

Layer = nn.Linear | Int8Linear | SkippedLinear

PLAIN_PARTS = {
    LlamaBidirectionalForSequenceClassification,
    LlamaBidirectionalModel,
    LlamaDecoderLayer,
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    Float32Linear,
    Int8Linear,
    SkippedLinear,
    nn.Embedding,
    nn.Linear,
    nn.ModuleList,
    type(ACT2FN["silu"]),
}


def is_plain(model: Any) -> bool:
    """
    Whether a model computes what its classes say and no more, so that [`packed_logits`] gives its logits. Adapters,
    quantized or offloaded weights, hooks, compiled parts, other activations, autocast, and a configuration that was
    changed after the layers were made, each make it False.
    """
    if type(model) is not LlamaBidirectionalForSequenceClassification:
        return False
    weight, layers = model.model.embed_tokens.weight, model.model.layers
    return (
        len(layers) == model.config.num_hidden_layers
        and all(
            layer.self_attn.config is model.config and layer.self_attn.is_causal == model.config.is_causal
            for layer in layers
        )
        and weight.device.type != "meta"
        and not torch.is_autocast_enabled(weight.device.type)
        and not torch.nn.modules.module._has_any_global_hook()
        and all(_is_plain_part(module) for module in model.modules())
        and all(
            type(parameter) is nn.Parameter and parameter.dtype == weight.dtype and parameter.device == weight.device
            for parameter in model.model.parameters()
        )
    )


def _is_plain_part(module: nn.Module) -> bool:
    has_hooks = module._forward_hooks or module._forward_pre_hooks
    has_other_forward = "forward" in vars(module) or module._compiled_call_impl is not None
    return type(module) in PLAIN_PARTS and not has_hooks and not has_other_forward


def packed_logits(model: LlamaBidirectionalForSequenceClassification, batch: dict[str, Any]) -> torch.Tensor:
    """
    Computes the logits of a packed batch without gradients, as in evaluation mode.

    Args:
        model: a plain one (see [`is_plain`]).
        batch: what [`~packing.pack`] returns.

    Returns:
        `torch.FloatTensor` of shape `(num_sequences, num_labels)`.
    """
    body, cu_seq_lens = model.model, batch["cu_seq_lens_q"]
    check_length(model.config, batch["max_length_q"])
    hidden_states = body.embed_tokens(batch["input_ids"])
    _, position_ids = packed_positions(cu_seq_lens, hidden_states.shape[1])
    # (1, total_tokens, head_dim) -> (1, total_tokens, 1, head_dim)
    cos, sin = (angles.unsqueeze(2) for angles in body.rotary_emb(hidden_states, position_ids=position_ids))
    buffers = Buffers()
    attention_options = {name: value for name, value in batch.items() if name != "input_ids"} | {"buffers": buffers}
    for layer in body.layers:
        hidden_states = decode(hidden_states, layer, cos, sin, attention_options, buffers)
    pooled = pool_packed(normalize(hidden_states, body.norm, buffers)[0], cu_seq_lens, model.config.pooling)
    logits: torch.Tensor = model.score(pooled) / model.config.temperature
    return logits


def decode(
    hidden_states: torch.Tensor,
    layer: LlamaDecoderLayer,
    cos: torch.Tensor,
    sin: torch.Tensor,
    options: dict[str, Any],
    buffers: Buffers,
) -> torch.Tensor:
    """What a decoder layer makes of hidden states of shape `(1, total_tokens, hidden_size)`, which it may change."""
    attention, mlp = layer.self_attn, layer.mlp
    attended = attend(normalize(hidden_states, layer.input_layernorm, buffers), attention, cos, sin, options, buffers)
    hidden_states = add_projected(hidden_states, attended, attention.o_proj, buffers)
    gated = gate(normalize(hidden_states, layer.post_attention_layernorm, buffers), mlp, buffers)
    return add_projected(hidden_states, gated, mlp.down_proj, buffers)


def attend(
    states: torch.Tensor,
    attention: LlamaAttention,
    cos: torch.Tensor,
    sin: torch.Tensor,
    options: dict[str, Any],
    buffers: Buffers,
) -> torch.Tensor:
    """The heads' outputs, of shape `(1, total_tokens, num_heads * head_dim)`, before the output projection."""
    # (1, total_tokens, hidden_size) -> (1, total_tokens, heads, head_dim)
    query, key, value = (
        projected.unflatten(-1, (-1, attention.head_dim))
        for projected in project(states, [attention.q_proj, attention.k_proj, attention.v_proj], buffers)
    )
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    if isinstance(attention.v_proj, Int8Linear | SkippedLinear):  # its products need not have the dtype of the states
        dtype = torch.bfloat16 if states.device.type == "cpu" and _attends_in_bfloat16() else states.dtype
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    name = attention.config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS[PACKED_ATTENTION if name == "sdpa" else name]
    attended, _ = function(
        attention,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None,
        dropout=0.0,
        scaling=attention.scaling,
        **options,
    )
    return attended.flatten(2)


def normalize(states: torch.Tensor, norm: LlamaRMSNorm, buffers: Buffers) -> torch.Tensor:
    """`norm(states)`, of shape `(1, total_tokens, hidden_size)`; valid until the next call on a CPU."""
    if states.device.type == "cuda":
        return rms_norm(states, norm.weight.shape, norm.weight, norm.variance_epsilon)
    is_exact = states.dtype == torch.float32
    exact = states if is_exact else buffers.take("exact", states, dtype=torch.float32).copy_(states)
    variance = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_() / states.shape[-1]
    scales = (variance + norm.variance_epsilon).rsqrt_()
    normed = buffers.take("normed", states)
    if is_exact:
        torch.mul(states, scales, out=normed)
    else:  # `mul` would copy operands of two dtypes
        normed.copy_(exact.mul_(scales))
    return normed.mul_(norm.weight)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotary position embedding, as transformers' `apply_rotary_pos_emb` computes it.

    Args:
        states (`torch.Tensor` of shape `(1, total_tokens, heads, head_dim)`): queries or keys.
        cos, sin (`torch.Tensor` of shape `(1, total_tokens, 1, head_dim)`): the two halves of each are equal.
    """
    half = states.shape[-1] // 2
    rotated = states * cos
    rotated[..., :half].addcmul_(states[..., half:], sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(states[..., :half], sin[..., half:])
    return rotated


def project(states: torch.Tensor, layers: Sequence[Layer], buffers: Buffers) -> list[torch.Tensor]:
    """`layer(states)` for each layer, of shape `(1, total_tokens, layer.out_features)`; valid until the next call."""
    products, rows, exact = [], None, None
    for number, layer in enumerate(layers):
        if isinstance(layer, Int8Linear):
            rows = rows or quantize_rows(states[0], buffers)
            out = buffers.take(f"product {number}", rows.scales, states.shape[1], layer.out_features)
            products.append(layer.multiply(rows, out)[None])
        else:
            exact = states.to(layer.weight.dtype) if exact is None else exact  # another dtype for what int8 skips
            products.append(_multiply(exact, layer))
    return products


def add_projected(residual: torch.Tensor, states: torch.Tensor, layer: Layer, buffers: Buffers) -> torch.Tensor:
    """`residual + layer(states)`, of the shape of `residual`, in its memory where that is faster."""
    if isinstance(layer, Int8Linear | SkippedLinear):
        return residual.add_(project(states, [layer], buffers)[0])
    states = states.to(residual.dtype)  # another one where int8 layers attend in bfloat16
    if _use_onednn(states):
        total: torch.Tensor = _onednn_linear.binary(states, residual, layer.weight, layer.bias, "add")
        return total
    residual.flatten(0, 1).addmm_(states.flatten(0, 1), layer.weight.t())
    if layer.bias is not None:
        residual += layer.bias
    return residual


def gate(states: torch.Tensor, mlp: LlamaMLP, buffers: Buffers) -> torch.Tensor:
    """`silu(gate_proj(states)) * up_proj(states)`, of shape `(1, total_tokens, intermediate_size)`."""
    gate_proj, up_proj = mlp.gate_proj, mlp.up_proj
    if _use_onednn(states) and type(gate_proj) is type(up_proj) is nn.Linear:
        activated = _onednn_linear(states, gate_proj.weight, gate_proj.bias, "swish", [1.0], "")
        product: torch.Tensor = _onednn_linear.binary(states, activated, up_proj.weight, up_proj.bias, "mul")
        return product
    gates, ups = project(states, [gate_proj, up_proj], buffers)
    return silu(gates, inplace=True).mul_(ups)


def _multiply(states: torch.Tensor, layer: nn.Linear | SkippedLinear) -> torch.Tensor:
    if _use_onednn(states):
        product: torch.Tensor = _onednn_linear(states, layer.weight, layer.bias, "none", [], "")
        return product
    return linear(states, layer.weight, layer.bias)


# The operator of torch.compile's own CPU backend, which has no name in the public interface.
_onednn_linear: Any = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
)


def _use_onednn(states: torch.Tensor) -> bool:
    """
    Whether oneDNN multiplies, instead of the BLAS that torch was built with, which is not tuned for every CPU. In
    bfloat16 torch takes oneDNN without being told.
    """
    return states.device.type == "cpu" and states.dtype == torch.float32 and _onednn_is_faster()


@cache
def _onednn_is_faster() -> bool:
    """Intel's MKL is tuned for Intel's CPUs."""
    return _onednn_linear is not None and not (torch.backends.mkl.is_available() and is_intel())


@cache
def _attends_in_bfloat16() -> bool:
    """int8 rounds the other products of a layer more than bfloat16 rounds those of attention."""
    return multiplies_bfloat16_faster()

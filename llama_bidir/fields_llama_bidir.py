# Copyright 2026 The llama-bidir authors. Licensed under the Apache License, Version 2.0.
"""What the fields of a configuration may hold."""

import math
import operator
import re
import string
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

POOLINGS = ("avg", "cls", "last")
DEFAULT_PROMPT_TEMPLATE = "question:{query} \n \n passage:{passage}"
DEFAULT_RERANK_MAX_LENGTH = 512
MIN_RERANK_MAX_LENGTH = 8
MAX_NUM_LABELS = 65_536  # transformers creates a name for each label, which takes gigabytes for absurd numbers
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
# For each type of rotary embedding, the fields without a default.
ROPE_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
OPTIONAL_ROPE_FIELDS = (
    "attention_factor", "beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim",
    "original_max_position_embeddings", "partial_rotary_factor", "rope_theta",
)  # fmt: skip
# The types whose frequencies depend on the longest sequence of a batch if it exceeds [`longest_sequence`].
ROPE_OF_A_BATCH = ("dynamic", "longrope")
_LINEAR_LAYER = re.compile(r"layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj")


def check_pooling(pooling: Any) -> str:
    """Returns `pooling`, with `mean` read as `avg`. Raises ValueError unless it is `avg`, `cls` or `last`."""
    pooling = "avg" if pooling == "mean" else pooling
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of 'avg', 'cls' or 'last', got {pooling!r}")
    return pooling


def check_temperature(temperature: Any) -> float:
    """Returns `temperature` as a float. Raises ValueError unless it is a finite number above 0."""
    is_number = isinstance(temperature, Real) and not isinstance(temperature, bool)
    if not (is_number and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number above 0 (logits are divided by it), got {temperature!r}")
    return float(temperature)


def check_is_causal(is_causal: Any) -> bool:
    """Returns `is_causal`. Raises ValueError unless it is a bool."""
    if not isinstance(is_causal, bool):
        raise ValueError(f"is_causal must be False (bidirectional) or True (keeps the causal mask), got {is_causal!r}")
    return is_causal


def check_prompt_template(prompt_template: Any) -> str:
    """
    Returns `prompt_template`. Raises ValueError unless it is a string with one `{query}`, one `{passage}` and at most
    one `{instruction}`.
    """
    rule = (
        "prompt_template must be a string with exactly one {query} and one {passage}, at most one {instruction}, and "
        "no other field"
    )
    if not isinstance(prompt_template, str):
        raise ValueError(f"{rule}, got {prompt_template!r}")
    try:
        parts = [part for part in string.Formatter().parse(prompt_template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"{rule} (write {{{{ and }}}} for literal braces): {error} in {prompt_template!r}") from None
    decorated = any(format_spec or conversion for _, _, format_spec, conversion in parts)
    fields = sorted(name for _, name, _, _ in parts if name is not None)
    if decorated or fields not in (["passage", "query"], ["instruction", "passage", "query"]):
        raise ValueError(f"{rule} (write {{{{ and }}}} for literal braces), got {prompt_template!r}")
    return prompt_template


def takes_instruction(prompt_template: str) -> bool:
    """Returns whether a prompt template has the field `{instruction}`."""
    return "instruction" in (field for _, field, _, _ in string.Formatter().parse(prompt_template))


def check_instruction(instruction: Any, prompt_template: str) -> str | None:
    """Returns `instruction`. Raises ValueError unless it is None, empty, or a text and the template has its field."""
    if instruction is not None and not isinstance(instruction, str):
        raise ValueError(f"instruction must be a string or None, got {instruction!r}")
    if instruction and not takes_instruction(prompt_template):
        raise ValueError(
            f"instruction {instruction!r} has no place in the prompt_template {prompt_template!r}: add the field "
            "{instruction} to the template, or give an empty instruction"
        )
    try:
        (instruction or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"instruction must be Unicode text without lone surrogates: {error}") from None
    return instruction


def check_calibration(calibration: Any) -> dict[str, float] | None:
    """Returns `calibration`. Raises ValueError unless it is None, or a finite `slope` above 0 and a finite `offset`."""
    if calibration is None:
        return None
    is_map = isinstance(calibration, Mapping) and calibration.keys() == {"slope", "offset"}
    if not is_map or not all(map(_is_number, calibration.values())) or calibration["slope"] <= 0:
        rule = "calibration must be None, or map slope to a finite number above 0 and offset to a finite number"
        raise ValueError(f"{rule}, got {calibration!r}")
    return {name: float(calibration[name]) for name in ("slope", "offset")}


def as_dtype(dtype: Any) -> torch.dtype | None:
    """Returns the `torch.dtype` that is given or named. Returns None unless weights can be computed in it."""
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    is_usable = isinstance(named, torch.dtype) and named.is_floating_point and named.itemsize >= 2
    return named if is_usable else None


def check_dtype(dtype: Any) -> Any:
    """Returns `dtype`. Raises ValueError unless it is None, or a floating-point `torch.dtype` or its name."""
    if dtype is not None and as_dtype(dtype) is None:
        raise ValueError(f"dtype must be 'float32', 'bfloat16', 'float16' or None, got {dtype!r}")
    return dtype


def check_hidden_act(hidden_act: Any) -> str:
    """Returns `hidden_act`. Raises ValueError unless it names an activation of transformers."""
    if not isinstance(hidden_act, str) or hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act must name an activation of transformers, such as 'silu', got {hidden_act!r}")
    return hidden_act


def check_rope_parameters(rope_parameters: Any) -> Any:
    """Returns `rope_parameters`. Raises ValueError unless it is None, or a complete type that transformers knows."""
    rope = {} if rope_parameters is None else rope_parameters
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters must be a mapping with a rope_type, got {rope!r}")
    rope_type, known = rope.get("rope_type", rope.get("type", "default")), ("default", *ROPE_INIT_FUNCTIONS)
    if rope_type not in known:
        raise ValueError(f"rope_parameters: rope_type must be one of {', '.join(known)}, got {rope_type!r}")
    optional = [
        name for name in OPTIONAL_ROPE_FIELDS if name in rope and (rope[name] is not None or name == "rope_theta")
    ]
    for name in (*ROPE_FIELDS.get(rope_type, ()), *optional):
        value = rope.get(name)
        numbers: Any = value if name in ("short_factor", "long_factor") else [value]
        # A rope_theta of 0 gives scores that are NaN, which scoring reports.
        if not isinstance(numbers, list | tuple) or not all(
            _is_number(each) and (each > 0 or name == "rope_theta") for each in numbers
        ):
            raise ValueError(f"rope_parameters: rope_type {rope_type!r} needs {name} to be above 0, got {value!r}")
    return rope_parameters


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def longest_sequence(config: Any) -> int:
    """
    Returns the maximum number of tokens of a sequence: `max_position_embeddings`, or `original_max_position_embeddings`
    with `longrope`, because a longer sequence would change the frequencies of its whole batch.
    """
    rope, longest = config.rope_parameters or {}, int(config.max_position_embeddings)
    if rope.get("rope_type") != "longrope":
        return longest
    original = rope.get("original_max_position_embeddings", longest)
    return min(longest, getattr(config, "original_max_position_embeddings", original))


def check_length(config: Any, length: int) -> None:
    """Raises ValueError for a sequence that is long enough to change the rotary embedding of its whole batch."""
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type in ROPE_OF_A_BATCH and length > longest_sequence(config):
        raise ValueError(
            f"rope_type {rope_type!r} changes the scores of a whole batch when one pair has more than "
            f"{longest_sequence(config)} tokens, and one has {length}: pass shorter pairs"
        )


def as_int(value: Any) -> int | None:
    """Returns a number of any integer type, such as numpy's, as an int. Returns None for a bool and anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_rerank_max_length(rerank_max_length: Any, config: Any) -> int:
    """Returns `rerank_max_length`. Raises ValueError unless it is an int from 8 to [`longest_sequence`]."""
    longest, limit, why = longest_sequence(config), "max_position_embeddings", ""
    if longest != config.max_position_embeddings:
        limit = "original_max_position_embeddings"
        why = "; beyond it, rope_type 'longrope' changes the scores of the whole batch"
    length, lowest = as_int(rerank_max_length), min(MIN_RERANK_MAX_LENGTH, longest)
    if length is None or not lowest <= length <= longest:
        raise ValueError(
            "rerank_max_length is the maximum number of tokens of a rendered pair and must be an int from "
            f"{lowest} to {limit} ({longest}{why}), got {rerank_max_length!r}"
        )
    return length


def check_int8_skip_modules(names: Any) -> list[str] | None:
    """Returns `names`. Raises ValueError unless it is None or a list of linear layers, by their names in the body."""
    if names is None:
        return None
    is_list = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if wrong := [name for name in names if not _LINEAR_LAYER.fullmatch(name)] if is_list else [names]:
        rule = "int8_skip_modules must be None or a list of linear layers, such as 'layers.2.mlp.down_proj'"
        raise ValueError(f"{rule}, got {wrong[0]!r}")
    return list(names)


def check_num_labels(num_labels: Any) -> int | None:
    """Returns `num_labels`. Raises ValueError unless it is None or an int from 1 to 65,536."""
    number = as_int(num_labels)
    if num_labels is not None and (number is None or number < 1):
        raise ValueError(f"num_labels must be an int above 0 (the outputs of the score head), got {num_labels!r}")
    if number is not None and number > MAX_NUM_LABELS:
        raise ValueError(
            f"num_labels must be at most {MAX_NUM_LABELS} (the outputs of the score head), got {num_labels}"
        )
    return number


def check_size(field: str, size: Any) -> Any:
    """
    Returns `size`. Raises ValueError unless it is an int above 0. There are two exceptions: a model may have 0 layers,
    and `head_dim` and `num_key_value_heads` may be None.
    """
    lowest = 0 if field == "num_hidden_layers" else 1
    if size is None and field in ("head_dim", "num_key_value_heads"):
        return size
    if not isinstance(size, int) or isinstance(size, bool) or size < lowest:
        raise ValueError(f"{field} must be an int of at least {lowest}, got {size!r}")
    return size


def check_heads(config: LlamaConfig) -> None:
    """Raises ValueError unless the sizes are multiples of the numbers of heads, and `head_dim` is even (for RoPE)."""
    heads, shared, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if config.hidden_size % heads:
        raise ValueError(f"hidden_size ({config.hidden_size}) must be a multiple of num_attention_heads ({heads})")
    if shared is not None and heads % shared:
        raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({shared})")
    if head_dim is not None and head_dim % 2:
        raise ValueError(f"head_dim must be even, because RoPE rotates pairs, got {head_dim}")

# Copyright 2026 The llama-bidir authors. Licensed under the Apache License, Version 2.0.
"""Compares the weights of a checkpoint with those that its configuration requires."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from safetensors import safe_open
from transformers import LlamaConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

_LAYER = re.compile(r"^layers\.(\d+)\.")


class Weight(NamedTuple):
    """A weight in a safetensors file: the path of the file, the shape, and the dtype (such as `"BF16"`)."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def find_weights(name_or_path: str | os.PathLike[str], **source: Any) -> list[str]:
    """
    Returns the paths of a checkpoint's safetensors files. Returns none if its weights are in files of another kind.

    Args:
        name_or_path: a folder or the id of a Hub repository.
        source: arguments for the Hub.
    """
    may_be_missing = {"_raise_exceptions_for_missing_entries": False, **source}
    if file := cached_file(name_or_path, "model.safetensors", **may_be_missing):
        return [file]
    index = cached_file(name_or_path, "model.safetensors.index.json", **may_be_missing)
    return [] if index is None else list(get_checkpoint_shard_files(name_or_path, index, **source)[0])


def read_weights(files: Iterable[str]) -> dict[str, Weight]:
    """Reads the headers of safetensors files and returns their weights by name."""
    weights = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict
                header = opened.get_slice(name)
                weights[name] = Weight(file, tuple(header.get_shape()), header.get_dtype())
    return weights


def weight_sizes(config: LlamaConfig) -> dict[str, tuple[tuple[str, int], ...]]:
    """
    Returns the shape of each weight of a Llama with a score head. Each dimension is a pair: the field that decides its
    size, and the size. Names do not start with `model.`, and `layers.N` stands for each layer.
    """
    hidden, inner = ("hidden_size", config.hidden_size), ("intermediate_size", config.intermediate_size)
    heads, shared, head_dim = config.num_attention_heads, config.num_key_value_heads or 0, config.head_dim or 0
    queries = ("num_attention_heads x head_dim", heads * head_dim)
    keys = (f"num_key_value_heads x head_dim (with num_attention_heads {heads})", shared * head_dim)
    attention = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    sizes: dict[str, tuple[tuple[str, int], ...]] = {"embed_tokens.weight": (("vocab_size", config.vocab_size), hidden)}
    for block, linears, has_bias in (("self_attn", attention, config.attention_bias), ("mlp", mlp, config.mlp_bias)):
        for name, shape in linears.items():
            sizes[f"layers.N.{block}.{name}.weight"] = shape
            if has_bias:
                sizes[f"layers.N.{block}.{name}.bias"] = shape[:1]
    sizes |= {f"layers.N.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return {**sizes, "norm.weight": (hidden,), "score.weight": (("num_labels", config.num_labels or 1), hidden)}


def check_weights(
    config: LlamaConfig,
    weights: Mapping[str, Weight],
    *,
    has_head: bool,
    is_quantized: bool = False,
    drops_layers: bool = False,
    replaces_head: bool = False,
) -> None:
    """
    Compares a configuration with the weights of a checkpoint. Only `score.weight` may be missing.

    Args:
        config: the configuration of the model to be created.
        weights: what [`read_weights`] returned.
        has_head: whether the model has a score head.
        is_quantized: whether the weights are quantized. Names, shapes and dtypes of linear layers then depend on the
            method, so only the other weights are compared.
        drops_layers: whether the caller asks for fewer layers than the checkpoint has.
        replaces_head: whether a new head replaces a head of another shape.

    Raises:
        ValueError: a weight is missing, has another shape or an integer dtype, or would be ignored although it changes
            the scores. The message names the field of the configuration, the file and both shapes.
    """
    sizes = weight_sizes(config)
    if replaces_head or not has_head:
        del sizes["score.weight"]
    held = {name.removeprefix("model."): name for name in weights}
    files = {weight.file for weight in weights.values()}
    place = next(iter(files)) if len(files) == 1 else os.path.dirname(next(iter(files), "")) or "the checkpoint"
    kinds = {name: _LAYER.sub("layers.N.", name) for name in held}
    if not any(kind in sizes for kind in kinds.values()):
        raise ValueError(
            f"{place} holds no weights of a Llama: their names should be like 'model.layers.0.…', but the first "
            f"is {next(iter(weights), None)!r}. Rename them, or pass the checkpoint that they were made from"
        )
    if is_quantized:
        plain = {kind for name, kind in kinds.items() if weights[held[name]].dtype in ("BF16", "F16", "F32", "F64")}
        sizes = {kind: size for kind, size in sizes.items() if "norm" in kind or (kind in plain and "proj" not in kind)}
    num_layers = max((int(match[1]) + 1 for match in map(_LAYER.match, held) if match), default=0)
    if num_layers > config.num_hidden_layers and not drops_layers:
        raise ValueError(
            f"num_hidden_layers is {config.num_hidden_layers} in the configuration, but {place} holds {num_layers} "
            f"layers: correct the field, or pass num_hidden_layers={config.num_hidden_layers} to leave out the others"
        )
    if missing := list(itertools.islice(_missing_weights(sizes, held, config.num_hidden_layers), 4)):
        names = f"{', '.join(missing[:3])}{' and others' if missing[3:] else ''}"
        fix = ": get the whole checkpoint again"
        if num_layers < config.num_hidden_layers:
            layers = f"num_hidden_layers is {config.num_hidden_layers}, but the checkpoint holds {num_layers} layers"
            fix = f". In the configuration, {layers}: correct the field, or get the whole checkpoint again"
        raise ValueError(f"{place} lacks {names}, and only score.weight may be new{fix}")
    for name, kind in kinds.items():
        match = _LAYER.match(name)
        if match and int(match[1]) >= config.num_hidden_layers:
            continue
        weight = weights[held[name]]
        if kind in sizes:
            _check_weight(held[name], weight, sizes[kind])
        elif not is_quantized and _changes_scores(name, has_head=has_head):
            raise ValueError(
                f"{weight.file} holds {held[name]}, which this model does not have (attention_bias is "
                f"{config.attention_bias}, mlp_bias is {config.mlp_bias}). Without it, the scores would be wrong"
            )


def _changes_scores(name: str, *, has_head: bool) -> bool:
    is_in_body = _LAYER.match(name) is not None and not name.endswith(".inv_freq")
    return is_in_body or (has_head and name.startswith("score.") and name != "score.weight")


def _missing_weights(sizes: Mapping[str, Any], held: Mapping[str, str], num_layers: int) -> Iterator[str]:
    # Evaluated lazily, because a broken configuration may ask for any number of layers.
    for kind in sizes:
        if "layers.N." not in kind and kind != "score.weight" and kind not in held:
            yield f"model.{kind}"
    for layer in range(num_layers):
        for kind in sizes:
            name = kind.replace("layers.N.", f"layers.{layer}.")
            if name != kind and name not in held:
                yield f"model.{name}"


def _check_weight(name: str, weight: Weight, sizes: tuple[tuple[str, int], ...]) -> None:
    expected = tuple(size for _, size in sizes)
    if weight.shape != expected:
        pairs = itertools.zip_longest(sizes, weight.shape, fillvalue=("", 0))
        wrong = [size[0] for size, held in pairs if size[0] and size[1] != held]
        fields = ", ".join(f"{field} {size}" for field, size in sizes if field in wrong)
        raise ValueError(
            f"the configuration has {fields or 'another shape'}, so {name} should have shape {list(expected)}, but it "
            f"has {list(weight.shape)} in {weight.file}: correct the configuration, or leave the argument out"
        )
    if not weight.dtype.startswith(("F", "BF")):
        raise ValueError(
            f"{name} in {weight.file} has dtype {weight.dtype}, but weights are floating-point numbers unless "
            "quantization_config in config.json says how they are quantized"
        )


def check_score(num_labels: int, weights: Mapping[str, Weight]) -> None:
    """Raises ValueError unless the number of labels is that of the checkpoint's score head."""
    if (score := weights.get("score.weight")) is not None:
        _check_weight("score.weight", score, (("num_labels", num_labels), ("hidden_size", score.shape[-1])))

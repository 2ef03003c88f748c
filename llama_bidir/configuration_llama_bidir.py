# Copyright 2026 The llama-bidir authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the bidirectional Llama reranker.

This file, `modeling_llama_bidir.py` and `weights_llama_bidir.py` can be saved beside a checkpoint. They therefore
import nothing else from this package.
"""

import math
import os
import re
import string
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any

from transformers import LlamaConfig

from .weights_llama_bidir import check_score, find_weights, read_weights

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
POOLINGS = ("avg", "cls", "last")
DEFAULT_PROMPT_TEMPLATE = "question:{query} \n \n passage:{passage}"
DEFAULT_RERANK_MAX_LENGTH = 512
MIN_RERANK_MAX_LENGTH = 8
MAX_NUM_LABELS = 65_536  # transformers names each label, which takes gigabytes for absurd numbers
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip


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
    """Returns `prompt_template`. Raises ValueError unless it is a string with one `{query}` and one `{passage}`."""
    rule = "prompt_template must be a string with exactly one {query} and one {passage} and no other field"
    if not isinstance(prompt_template, str):
        raise ValueError(f"{rule}, got {prompt_template!r}")
    try:
        parts = [part for part in string.Formatter().parse(prompt_template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"{rule} (write {{{{ and }}}} for literal braces): {error} in {prompt_template!r}") from None
    decorated = any(format_spec or conversion for _, _, format_spec, conversion in parts)
    if decorated or sorted(name for _, name, _, _ in parts if name is not None) != ["passage", "query"]:
        raise ValueError(f"{rule} (write {{{{ and }}}} for literal braces), got {prompt_template!r}")
    return prompt_template


def check_rerank_max_length(rerank_max_length: Any, max_position_embeddings: int) -> int:
    """Returns `rerank_max_length`. Raises ValueError unless it is an int from 8 to `max_position_embeddings`."""
    is_int = isinstance(rerank_max_length, int) and not isinstance(rerank_max_length, bool)
    lowest = min(MIN_RERANK_MAX_LENGTH, max_position_embeddings)
    if not (is_int and lowest <= rerank_max_length <= max_position_embeddings):
        raise ValueError(
            "rerank_max_length is the maximum number of tokens of a rendered pair and must be an int from "
            f"{lowest} to max_position_embeddings ({max_position_embeddings}), got {rerank_max_length!r}"
        )
    return rerank_max_length


def check_num_labels(num_labels: Any) -> Any:
    """Returns `num_labels`. Raises ValueError unless it is None or an int from 1 to 65,536."""
    if num_labels is not None and (not isinstance(num_labels, int) or isinstance(num_labels, bool) or num_labels < 1):
        raise ValueError(f"num_labels must be an int above 0 (the outputs of the score head), got {num_labels!r}")
    if num_labels is not None and num_labels > MAX_NUM_LABELS:
        raise ValueError(
            f"num_labels must be at most {MAX_NUM_LABELS} (the outputs of the score head), got {num_labels}"
        )
    return num_labels


def check_size(field: str, size: Any) -> Any:
    """
    Returns `size`. Raises ValueError unless it is an int above 0. A model may have 0 layers, and `head_dim` and
    `num_key_value_heads` may be None.
    """
    lowest = 0 if field == "num_hidden_layers" else 1
    if size is None and field in ("head_dim", "num_key_value_heads"):
        return size
    if not isinstance(size, int) or isinstance(size, bool) or size < lowest:
        raise ValueError(f"{field} must be an int of at least {lowest}, got {size!r}")
    return size


def check_heads(config: LlamaConfig) -> None:
    """Raises ValueError unless the attention heads divide what they share, and RoPE can rotate pairs of their sizes."""
    heads, shared, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if config.hidden_size % heads:
        raise ValueError(f"hidden_size ({config.hidden_size}) must be a multiple of num_attention_heads ({heads})")
    if shared is not None and heads % shared:
        raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({shared})")
    if head_dim is not None and head_dim % 2:
        raise ValueError(f"head_dim must be even, because RoPE rotates pairs, got {head_dim}")


def check_model_type(model_type: Any, source: str = "the configuration") -> None:
    """Raises ValueError unless `model_type` is `llama` or `llama_bidirec`."""
    if model_type not in ("llama", LlamaBidirectionalConfig.model_type):
        raise ValueError(
            f"{source} has model_type {model_type!r}, but only Llama checkpoints can be made bidirectional: pass one "
            f"with model_type 'llama' or '{LlamaBidirectionalConfig.model_type}'"
        )


def check_checkpoint_path(name_or_path: str | os.PathLike[str]) -> None:
    """Raises OSError for a local path without a checkpoint. Otherwise transformers would look for it on the Hub."""
    name = os.fspath(name_or_path)
    looks_like_path = os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1
    if os.path.isfile(name) and not name.endswith(".json"):
        raise NotADirectoryError(
            f"{name!r} is not a checkpoint: it is a file. Pass the folder that holds a config.json"
        )
    if looks_like_path and not os.path.exists(name):
        raise FileNotFoundError(
            f"{name!r} is not a checkpoint: there is no such folder. Pass a folder that holds a config.json, or the id "
            "of a Hub repository such as 'meta-llama/Llama-3.2-1B'"
        )


def is_stock(config_dict: Mapping[str, Any]) -> bool:
    """Returns whether a `config.json` is of a plain Llama, not of a reranker or of one of its exports."""
    return config_dict.get("model_type") == "llama" and "pooling" not in config_dict


def check_stock_head(
    config_dict: Mapping[str, Any], given: Mapping[str, Any], source: str, *, has_score: bool = False
) -> None:
    """
    Raises ValueError for a plain Llama with a trained head, unless the caller says how to use it.

    Args:
        config_dict: the content of `config.json`.
        given: what the caller passes. `is_causal` or `pooling` says how to use the head.
        source: the name of the checkpoint.
        has_score: its weights include `score.weight`.
    """
    if not is_stock(config_dict) or given.keys() & {"is_causal", "pooling"}:
        return
    names = [name for name in map(str, config_dict.get("architectures") or ()) if _HEADS.search(name)]
    if names or has_score:
        raise ValueError(
            f"{source} holds a {names[0] if names else 'score.weight of a plain Llama'}, whose head was trained under "
            "a causal mask. To score as transformers' LlamaForSequenceClassification does, pass is_causal=True and "
            "pooling='last'. To train the head further in a bidirectional model, pass is_causal=False and "
            "pooling='avg'. CrossEncoder takes both in model_kwargs"
        )


class LlamaBidirectionalConfig(LlamaConfig):
    r"""
    A [`LlamaConfig`] with the fields of a reranker. It checks every field when the field is set: a wrong value raises
    ValueError. `from_pretrained` reads checkpoints of type `llama` and `llama_bidirec` and refuses all others.

    Args:
        pooling (`str`, *optional*, defaults to `"avg"`):
            How the hidden states of a sequence become one vector: `"avg"` (the mean of its tokens, also spelled
            `"mean"`), `"cls"` (its first token) or `"last"` (its last token).
        temperature (`float`, *optional*, defaults to 1.0):
            Logits are divided by it. It must be finite and above 0.
        is_causal (`bool`, *optional*, defaults to `False`):
            Whether to keep Llama's causal mask, for ablations.
        prompt_template (`str`, *optional*):
            The text that the model reads, with one `{query}` and one `{passage}`. `{{` and `}}` are literal braces. The
            default is that of NVIDIA's rerankers, `"question:{query} \n \n passage:{passage}"`.
        rerank_max_length (`int`, *optional*, defaults to 512, or `max_position_embeddings` where that is smaller):
            The maximum number of tokens of a rendered pair, including special tokens: from 8 to
            `max_position_embeddings`.
        num_labels (`int`, *optional*, defaults to 1):
            The number of outputs of the score head.

    Example:

    ```python
    >>> from llama_bidir import LlamaBidirectionalConfig

    >>> config = LlamaBidirectionalConfig(hidden_size=64, num_attention_heads=4, temperature=0.5)
    >>> config.pooling, config.temperature, config.rerank_max_length, config.num_labels
    ('avg', 0.5, 512, 1)
    ```
    """

    model_type = "llama_bidirec"

    pooling: str = "avg"
    temperature: float = 1.0
    is_causal: bool = False
    prompt_template: str = DEFAULT_PROMPT_TEMPLATE
    rerank_max_length: int = None  # type: ignore[assignment]  # set to the default
    # sentence-transformers and vLLM read this field. Without it they apply a sigmoid to the logits.
    sentence_transformers: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        source_type = kwargs.pop("model_type", self.model_type)
        check_model_type(source_type)
        if source_type == "llama" and self.id2label == {0: "LABEL_0", 1: "LABEL_1"}:
            self.id2label = None  # LlamaConfig().to_dict() holds this map even if nobody asked for two labels
        if self._auto_class is None:
            # An `auto_map` names code files, which this class neither runs nor saves. Only a class registered by
            # `register_for_auto_class` writes an `auto_map` of its own.
            kwargs.pop("auto_map", None)
        check_num_labels(kwargs.get("num_labels"))
        if self.id2label is None:
            kwargs.setdefault("num_labels", 1)
        if self.sentence_transformers is None:
            self.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
        super().__post_init__(**kwargs)
        self.validate()

    def validate(self) -> None:
        """Checks fields that depend on each other. transformers calls it when a config is built and before a save."""
        check_heads(self)
        super().validate()  # type: ignore[misc]  # added by `@strict`
        check_rerank_max_length(self.rerank_max_length, self.max_position_embeddings)

    def __setattr__(self, name: str, value: Any) -> None:
        # The validators of `@strict` would raise a StrictDataclassError, not a ValueError.
        if check := _FIELD_CHECKS.get(name):
            value = check(value)
        elif name == "rerank_max_length":
            # `max_position_embeddings` is already set: the fields of LlamaConfig come first.
            default = min(DEFAULT_RERANK_MAX_LENGTH, self.max_position_embeddings)
            value = default if value is None else check_rerank_max_length(value, self.max_position_embeddings)
        super().__setattr__(name, value)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        check_checkpoint_path(pretrained_model_name_or_path)
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:
            raise FileNotFoundError(
                f"{os.fspath(pretrained_model_name_or_path)!r} is not a checkpoint: it has no config.json. Pass the "
                "folder that `save_pretrained` wrote, or the id of a Hub repository such as 'meta-llama/Llama-3.2-1B'"
            )
        source = repr(os.fspath(pretrained_model_name_or_path))
        check_model_type(config_dict.get("model_type"), source=source)
        check_stock_head(config_dict, kwargs, source)
        labels = {"num_labels", "id2label"} & (config_dict.keys() | kwargs.keys())
        if config_dict.get("architectures") == ["LlamaForSequenceClassification"] and not labels:
            config_dict["num_labels"] = 2  # the default of transformers, which it does not store
        # Changed here because `from_pretrained` compares the two types and warns about a difference.
        config_dict["model_type"] = cls.model_type
        return config_dict, {**kwargs, "name_or_path": os.fspath(pretrained_model_name_or_path)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "LlamaBidirectionalConfig":
        # Pass keyword fields to the constructor, which validates all fields together, not to setattr afterwards.
        given = {name: kwargs.pop(name) for name in cls.__dataclass_fields__ if name in kwargs and name != "dtype"}
        num_labels, folder = kwargs.get("num_labels", config_dict.get("num_labels")), kwargs.get("name_or_path")
        if isinstance(num_labels, int) and num_labels > MAX_NUM_LABELS and folder is not None and os.path.isdir(folder):
            check_score(num_labels, read_weights(find_weights(folder)))
        return super().from_dict({**config_dict, **given}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        # transformers leaves out its own default, a map of two labels. Read back, its absence would mean one label.
        labels = {name: value for name, value in self.to_dict().items() if name in ("id2label", "label2id")}
        return {**super().to_diff_dict(), **labels}


# Architectures with a trained head. Those of this package, which vLLM's layout names too, say how they pool.
_HEADS = re.compile(r"^(?!LlamaBidirectional).*(Classification|QuestionAnswering|Reward|Score|Regress|ValueHead)")

_FIELD_CHECKS: dict[str, Callable[[Any], Any]] = {
    "pooling": check_pooling,
    "temperature": check_temperature,
    "is_causal": check_is_causal,
    "prompt_template": check_prompt_template,
    "num_labels": check_num_labels,
    **{field: partial(check_size, field) for field in SIZES},
}

__all__ = ["LlamaBidirectionalConfig"]

# Copyright 2026 The llama-bidir authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the bidirectional Llama reranker.

This file and `modeling_llama_bidir.py` may be saved beside a checkpoint, so they import nothing else of the package.
"""

import math
import os
import string
from collections.abc import Callable
from numbers import Real
from typing import Any

from transformers import LlamaConfig

POOLINGS = ("avg", "cls", "last")
DEFAULT_PROMPT_TEMPLATE = "question:{query} \n \n passage:{passage}"
DEFAULT_RERANK_MAX_LENGTH = 512
MIN_RERANK_MAX_LENGTH = 8


def check_pooling(pooling: Any) -> str:
    """Returns `pooling`, with `mean` read as `avg`; anything but `avg`, `cls` and `last` raises ValueError."""
    pooling = "avg" if pooling == "mean" else pooling
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of 'avg', 'cls' or 'last', got {pooling!r}")
    return pooling


def check_temperature(temperature: Any) -> float:
    """Returns `temperature` as a float; anything but a finite number above 0 raises ValueError."""
    is_number = isinstance(temperature, Real) and not isinstance(temperature, bool)
    if not (is_number and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number above 0 (logits are divided by it), got {temperature!r}")
    return float(temperature)


def check_is_causal(is_causal: Any) -> bool:
    """Returns `is_causal`; anything but a bool raises ValueError."""
    if not isinstance(is_causal, bool):
        raise ValueError(f"is_causal must be False (bidirectional) or True (causal mask kept), got {is_causal!r}")
    return is_causal


def check_prompt_template(prompt_template: Any) -> str:
    """Returns `prompt_template`; anything but text with one `{query}` and one `{passage}` raises ValueError."""
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
    """Returns `rerank_max_length`; anything but an int from 8 to `max_position_embeddings` raises ValueError."""
    is_int = isinstance(rerank_max_length, int) and not isinstance(rerank_max_length, bool)
    lowest = min(MIN_RERANK_MAX_LENGTH, max_position_embeddings)
    if not (is_int and lowest <= rerank_max_length <= max_position_embeddings):
        raise ValueError(
            f"rerank_max_length counts the tokens of a rendered pair and must be an int from {lowest} to "
            f"max_position_embeddings ({max_position_embeddings}), got {rerank_max_length!r}"
        )
    return rerank_max_length


def check_num_labels(num_labels: Any) -> None:
    """Raises ValueError unless `num_labels` is None or an int above 0."""
    if num_labels is not None and (not isinstance(num_labels, int) or isinstance(num_labels, bool) or num_labels < 1):
        raise ValueError(f"num_labels must be an int above 0 (outputs of the score head), got {num_labels!r}")


def check_model_type(model_type: Any, source: str = "the configuration") -> None:
    """Raises ValueError unless `model_type` is one that a bidirectional Llama can be made from."""
    if model_type not in ("llama", LlamaBidirectionalConfig.model_type):
        raise ValueError(
            f"{source} has model_type {model_type!r}, but only Llama checkpoints can be made bidirectional: pass one "
            f"with model_type 'llama' or '{LlamaBidirectionalConfig.model_type}'"
        )


def check_checkpoint_path(name_or_path: str | os.PathLike[str]) -> None:
    """Raises OSError for what can only be a path and is no checkpoint, before a hub is asked for it."""
    name = os.fspath(name_or_path)
    looks_like_path = os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1
    if os.path.isfile(name) and not name.endswith(".json"):
        raise NotADirectoryError(f"{name!r} is no checkpoint: it is a file. Pass the folder that holds a config.json")
    if looks_like_path and not os.path.exists(name):
        raise FileNotFoundError(
            f"{name!r} is no checkpoint: there is no such folder. Pass a folder that holds a config.json, or the id of "
            "a Hub repository such as 'meta-llama/Llama-3.2-1B'"
        )


class LlamaBidirectionalConfig(LlamaConfig):
    r"""
    A [`LlamaConfig`] with the fields of a reranker. Every field is checked when it is set, and a wrong value raises
    ValueError. A checkpoint of type `llama` can be read as one of this type; any other type is refused.

    Args:
        pooling (`str`, *optional*, defaults to `"avg"`):
            How the hidden states of a sequence become one vector: `"avg"` (mean over its tokens; `"mean"` is the same),
            `"cls"` (its first token) or `"last"` (its last token).
        temperature (`float`, *optional*, defaults to 1.0):
            Logits are divided by it. Finite and above 0.
        is_causal (`bool`, *optional*, defaults to `False`):
            `True` keeps Llama's causal mask, for ablations.
        prompt_template (`str`, *optional*, defaults to `"question:{query} \n \n passage:{passage}"`):
            The text that is scored, with one `{query}` and one `{passage}`; `{{` and `}}` are literal braces.
        rerank_max_length (`int`, *optional*, defaults to 512, or `max_position_embeddings` where that is smaller):
            Most tokens of a rendered pair, special tokens included: from 8 to `max_position_embeddings`.
        num_labels (`int`, *optional*, defaults to 1):
            Outputs of the score head.

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
    # Read by sentence-transformers and vLLM, which would otherwise put a sigmoid on the logits.
    sentence_transformers: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        source_type = kwargs.pop("model_type", self.model_type)
        check_model_type(source_type)
        if source_type == "llama" and self.id2label == {0: "LABEL_0", 1: "LABEL_1"}:
            self.id2label = None  # what LlamaConfig().to_dict() holds when nobody asked for labels
        if self._auto_class is None:
            # An `auto_map` names code files that this class neither runs nor saves; only a class that was registered
            # for an Auto class writes its own again.
            kwargs.pop("auto_map", None)
        check_num_labels(kwargs.get("num_labels"))
        if self.id2label is None:
            kwargs.setdefault("num_labels", 1)
        if self.sentence_transformers is None:
            self.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
        super().__post_init__(**kwargs)
        self.validate()

    def validate(self) -> None:
        """Checks the fields together, as transformers does when a configuration is built and before it is saved."""
        super().validate()  # type: ignore[misc]  # put there by `@strict`
        check_rerank_max_length(self.rerank_max_length, self.max_position_embeddings)

    def __setattr__(self, name: str, value: Any) -> None:
        # ValueError at every assignment, where the validators of `@strict` would raise a StrictDataclassError.
        if check := _FIELD_CHECKS.get(name):
            value = check(value)
        elif name == "rerank_max_length":
            # The fields of LlamaConfig are set before those of this class.
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
                f"{os.fspath(pretrained_model_name_or_path)!r} is no checkpoint: it has no config.json. Pass the "
                "folder that `save_pretrained` wrote, or the id of a Hub repository such as 'meta-llama/Llama-3.2-1B'"
            )
        check_model_type(config_dict.get("model_type"), source=repr(os.fspath(pretrained_model_name_or_path)))
        # Said here, before `from_pretrained` compares the two types and warns.
        config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "LlamaBidirectionalConfig":
        # Fields given as keywords are validated together with the others instead of being set on a finished config.
        given = {name: kwargs.pop(name) for name in cls.__dataclass_fields__ if name in kwargs and name != "dtype"}
        return super().from_dict({**config_dict, **given}, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        # transformers does not write a map of two labels, its own default, which would be read as one label here.
        labels = {name: value for name, value in self.to_dict().items() if name in ("id2label", "label2id")}
        return {**super().to_diff_dict(), **labels}


_FIELD_CHECKS: dict[str, Callable[[Any], Any]] = {
    "pooling": check_pooling,
    "temperature": check_temperature,
    "is_causal": check_is_causal,
    "prompt_template": check_prompt_template,
}

__all__ = ["LlamaBidirectionalConfig"]

# Copyright 2026 The llama-bidir authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the bidirectional Llama reranker.

The files `*_llama_bidir.py` can be saved beside a checkpoint. They therefore import nothing else from this package.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from .fields_llama_bidir import (
    DEFAULT_PROMPT_TEMPLATE,
    DEFAULT_RERANK_MAX_LENGTH,
    MAX_NUM_LABELS,
    SIZES,
    check_calibration,
    check_dtype,
    check_heads,
    check_hidden_act,
    check_instruction,
    check_int8_skip_modules,
    check_is_causal,
    check_num_labels,
    check_pooling,
    check_prompt_template,
    check_rerank_max_length,
    check_rope_parameters,
    check_size,
    check_temperature,
    longest_sequence,
)
from .files_llama_bidir import HUB_ARGUMENTS, check_checkpoint_path, check_depth, find_file, read_json
from .weights_llama_bidir import check_score, find_weights, read_weights

logger = logging.getLogger(__name__)

# The attention implementations that a config.json may choose. transformers may fetch others from the Hub and run them.
ATTENTION_FIELDS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
ATTENTION_OF_A_FILE = (None, "eager", "sdpa", "flex_attention")
# Fields that make transformers replace layers or read weights from other files.
REFUSED_IN_A_FILE = ("fusion_config", "per_layer_config", "transformers_weights")


def check_model_type(model_type: Any, source: str = "the configuration") -> None:
    """Raises ValueError unless `model_type` is `llama` or `llama_bidirec`."""
    if model_type not in ("llama", LlamaBidirectionalConfig.model_type):
        raise ValueError(
            f"{source} has model_type {model_type!r}, but only Llama checkpoints can be made bidirectional: pass one "
            f"with model_type 'llama' or '{LlamaBidirectionalConfig.model_type}'"
        )


def is_stock(config_dict: Mapping[str, Any]) -> bool:
    """Returns whether a `config.json` belongs to a plain Llama, and not to a reranker or to one of its exports."""
    return config_dict.get("model_type") == "llama" and "pooling" not in config_dict


def check_stock_head(
    config_dict: Mapping[str, Any], given: Mapping[str, Any], source: str, *, has_score: bool = False
) -> None:
    """
    Raises ValueError for a plain Llama with a trained head, unless the caller says how to use it.

    Args:
        config_dict: the content of `config.json`.
        given: the arguments of the caller. `is_causal` or `pooling` says how to use the head.
        source: the name of the checkpoint.
        has_score: whether the weights include `score.weight`.
    """
    if not is_stock(config_dict) or given.keys() & {"is_causal", "pooling"}:
        return
    architectures = config_dict.get("architectures") or []
    if not isinstance(architectures, list):
        raise ValueError(f"{source}: architectures must be a list of names, got {architectures!r}")
    names = [name for name in map(str, architectures) if _HEADS.search(name)]
    if names or has_score:
        raise ValueError(
            f"{source} holds a {names[0] if names else 'score.weight of a plain Llama'}, whose head was trained under "
            "a causal mask. To score as transformers' LlamaForSequenceClassification does, pass is_causal=True and "
            "pooling='last'. To train the head further in a bidirectional model, pass is_causal=False and "
            "pooling='avg'. CrossEncoder takes both in model_kwargs"
        )


def check_fields_of_file(fields: Mapping[str, Any]) -> None:
    """Raises ValueError for a field that a config.json must not decide, because it runs code or reads other files."""
    for name in ATTENTION_FIELDS:
        if fields.get(name) not in ATTENTION_OF_A_FILE:
            raise ValueError(
                f"{name} {fields[name]!r} is refused in a checkpoint, because transformers may fetch the code of an "
                f"attention and run it: pass {name.removeprefix('_')}='sdpa' or the one that you trust"
            )
    if not isinstance(quantization := fields.get("quantization_config"), Mapping | None):
        raise ValueError(f"quantization_config must be a mapping, got {quantization!r}")
    for name, value in fields.items():
        if name in REFUSED_IN_A_FILE and value is not None:
            raise ValueError(f"{name} is refused in a checkpoint, because it replaces layers or files: remove it")
        if name.startswith("__") or callable(getattr(LlamaBidirectionalConfig, name, None)):
            raise ValueError(f"{name} is not a field of a configuration, and would replace a method: remove it")


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
            The text that the model reads, with one `{query}`, one `{passage}` and at most one `{instruction}`. `{{` and
            `}}` are literal braces. The default is that of NVIDIA's rerankers,
            `"question:{query} \n \n passage:{passage}"`.
        instruction (`str`, *optional*):
            The text for `{instruction}` where a call or a row gives none. Unless it is empty, the template must have
            this field.
        rerank_max_length (`int`, *optional*, defaults to 512, or `max_position_embeddings` where that is smaller):
            The maximum number of tokens of a rendered pair, including special tokens: from 8 to
            `max_position_embeddings`, or to `original_max_position_embeddings` with the rope_type `longrope`.
        int8_skip_modules (`list[str]`, *optional*):
            The linear layers that `dtype="int8"` skips, by their names in the body, such as `"layers.2.mlp.down_proj"`.
            `llama-bidir quantize` sets it. `None` means that the weights were not made for int8.
        calibration (`dict[str, float]`, *optional*):
            `slope` and `offset`, which make a score a probability of relevance: `sigmoid(slope * score + offset)`.
            `llama-bidir calibrate` sets it.
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
    instruction: str | None = None
    rerank_max_length: int = None  # type: ignore[assignment]  # set to the default
    int8_skip_modules: list[str] | None = None
    calibration: dict[str, float] | None = None
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
        if "num_labels" in kwargs:
            kwargs["num_labels"] = check_num_labels(kwargs["num_labels"])
        if self.id2label is None:
            kwargs.setdefault("num_labels", 1)
        if self.sentence_transformers is None:
            self.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
        length = self.rerank_max_length
        is_early = length == min(DEFAULT_RERANK_MAX_LENGTH, self.max_position_embeddings) and "rope_scaling" in kwargs
        super().__post_init__(**kwargs)
        if is_early:  # the default was chosen before `rope_scaling`, the older name of `rope_parameters`, was read
            self.rerank_max_length = min(length, longest_sequence(self))
        self.validate()

    def validate(self) -> None:
        """Checks fields that depend on each other. transformers calls it when a config is built and before a save."""
        check_heads(self)
        rope = check_rope_parameters(self.rope_parameters) or {}
        rotated = int(self.head_dim * rope.get("partial_rotary_factor", 1.0))
        for name in ("short_factor", "long_factor") if rope.get("rope_type") == "longrope" else ():
            if len(rope[name]) != rotated // 2:
                raise ValueError(f"rope_parameters: {name} must hold {rotated // 2} numbers, got {len(rope[name])}")
        try:
            super().validate()  # type: ignore[misc]  # added by `@strict`
        except StrictDataclassError as error:
            raise ValueError(str(error)) from None
        check_rerank_max_length(self.rerank_max_length, self)
        check_num_labels(self.num_labels)  # the length of id2label, which may be empty
        if not -self.vocab_size <= (self.pad_token_id or 0) < self.vocab_size:
            raise ValueError(f"pad_token_id must be below vocab_size ({self.vocab_size}), got {self.pad_token_id}")

    def __setattr__(self, name: str, value: Any) -> None:
        # The validators of `@strict` would raise a StrictDataclassError, not a ValueError.
        if check := _FIELD_CHECKS.get(name):
            value = check(value)
            if name == "prompt_template":
                check_instruction(vars(self).get("instruction"), value)
        elif name == "instruction":
            value = check_instruction(value, self.prompt_template)
        elif name == "rerank_max_length":
            # The fields that limit it are already set: those of LlamaConfig come first.
            default = min(DEFAULT_RERANK_MAX_LENGTH, longest_sequence(self))
            value = default if value is None else check_rerank_max_length(value, self)
        try:
            super().__setattr__(name, value)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from None

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        check_checkpoint_path(pretrained_model_name_or_path)
        name = os.fspath(pretrained_model_name_or_path)
        source = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        try:
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except Exception as error:
            _read_config_again(name, source)  # if the file is the cause, this raises an error that names it
            if isinstance(error, (ValueError, OSError)):
                raise
            raise ValueError(f"{name}: config.json cannot be used: {type(error).__name__}: {error}") from error
        if not config_dict:
            _read_config_again(name, source)
            raise FileNotFoundError(
                f"{name!r} is not a checkpoint: it has no config.json. Pass the "
                "folder that `save_pretrained` wrote, or the id of a Hub repository such as 'meta-llama/Llama-3.2-1B'"
            )
        if not isinstance(config_dict, dict):
            _read_config_again(name, source)
        check_model_type(config_dict.get("model_type"), source=repr(name))
        check_stock_head(config_dict, kwargs, repr(name))
        labels = {"num_labels", "id2label"} & (config_dict.keys() | kwargs.keys())
        if config_dict.get("architectures") == ["LlamaForSequenceClassification"] and not labels:
            config_dict["num_labels"] = 2  # the default of transformers, which it does not store
        # Changed here because `from_pretrained` compares the two types and warns about a difference.
        config_dict["model_type"] = cls.model_type
        return config_dict, {**kwargs, "name_or_path": name}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "LlamaBidirectionalConfig":
        # Pass keyword fields to the constructor, which validates all fields together, not to setattr afterwards.
        given = {name: kwargs.pop(name) for name in cls.__dataclass_fields__ if name in kwargs and name != "dtype"}
        num_labels, folder = kwargs.get("num_labels", config_dict.get("num_labels")), kwargs.get("name_or_path")
        if isinstance(num_labels, int) and num_labels > MAX_NUM_LABELS and folder is not None and os.path.isdir(folder):
            check_score(num_labels, read_weights(find_weights(folder)))
        chosen = [name for name in ATTENTION_FIELDS if kwargs.get(name.removeprefix("_")) is not None]
        stored = {name: value for name, value in config_dict.items() if name not in {*given, *chosen}}
        file = f"{kwargs.get('name_or_path') or 'the checkpoint'}: config.json"
        for name in ATTENTION_FIELDS:
            if str(stored.get(name)).startswith("flash_attention_"):
                # transformers would download a flash attention that is not installed.
                logger.warning(f"{file}: {name} {stored.pop(name)!r} is ignored: pass it as an argument to use it")
        try:
            check_depth(stored, file)
            check_fields_of_file(stored)
            return super().from_dict({**stored, **given}, **kwargs)
        except Exception as error:
            field = cls._wrong_field(stored, given)
            is_named = any(name in str(error) for name in (*stored, *given))
            if field is None and is_named and isinstance(error, (ValueError, OSError)):
                raise
            named = f"{file}: {field or 'a field'} cannot be used: {type(error).__name__}: {error}"
            raise ValueError(named if field is None or field not in str(error) else f"{file}: {error}") from None

    @classmethod
    def _wrong_field(cls, stored: dict[str, Any], given: dict[str, Any]) -> str | None:
        """Returns the name of a stored field whose removal makes the configuration valid, or None."""

        def can_be_built(fields: dict[str, Any]) -> bool:
            try:
                check_fields_of_file(fields)
                cls(**fields, **given)
            except Exception:
                return False
            return True

        if can_be_built(stored):
            return None
        others = ({other: stored[other] for other in stored if other != name} for name in stored)
        return next((name for name, fields in zip(stored, others, strict=True) if can_be_built(fields)), None)

    def to_diff_dict(self) -> dict[str, Any]:
        # transformers leaves out its own default, a map of two labels. Read back, its absence would mean one label.
        labels = {name: value for name, value in self.to_dict().items() if name in ("id2label", "label2id")}
        return {**super().to_diff_dict(), **labels}


def _read_config_again(name: str, source: Mapping[str, Any]) -> None:
    path = name if os.path.isfile(name) else find_file(name, "config.json", source)
    if path is not None:
        read_json(path)


# Architectures with a trained head. Those of this package are excluded, because their configuration says how they pool.
_HEADS = re.compile(r"^(?!LlamaBidirectional).*(Classification|QuestionAnswering|Reward|Score|Regress|ValueHead)")

_FIELD_CHECKS: dict[str, Callable[[Any], Any]] = {
    "dtype": check_dtype,
    "hidden_act": check_hidden_act,
    "rope_parameters": check_rope_parameters,
    "pooling": check_pooling,
    "temperature": check_temperature,
    "is_causal": check_is_causal,
    "prompt_template": check_prompt_template,
    "num_labels": check_num_labels,
    "int8_skip_modules": check_int8_skip_modules,
    "calibration": check_calibration,
    **{field: partial(check_size, field) for field in SIZES},
}

__all__ = ["LlamaBidirectionalConfig"]

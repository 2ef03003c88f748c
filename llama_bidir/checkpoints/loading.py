"""Where a CrossEncoder's model comes from: a checkpoint, an adapter on its base model, or the caller."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from ..configuration_llama_bidir import LlamaBidirectionalConfig, check_checkpoint_path
from ..modeling_llama_bidir import LlamaBidirectionalForSequenceClassification
from ..prompts import ensure_pad_token
from ..utils.extras import require
from .chat_template import find_prompt_template
from .onnx import MODEL_FILE, OnnxReranker
from .sentence_transformers import read_head

HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


def check_reranker(model: Any, num_labels: int | None) -> Any:
    """Returns a loaded reranker; raises TypeError for another model, ValueError for another number of labels."""
    if not isinstance(getattr(model, "config", None), LlamaBidirectionalConfig) or not hasattr(model, "score"):
        raise TypeError(
            "model_name_or_path_or_model must be a path, a Hub id or a LlamaBidirectionalForSequenceClassification, "
            f"got {type(model).__name__}"
        )
    if num_labels is not None and num_labels != model.config.num_labels:
        raise ValueError(f"num_labels is {num_labels}, but the loaded model has {model.config.num_labels}")
    return model


def load_reranker(name_or_path: str, model_kwargs: dict[str, Any], *, dequantize: bool = False) -> Any:
    """
    Loads a checkpoint, or an adapter (PEFT) on its base model with the configuration that was saved beside the adapter.

    Args:
        name_or_path: a folder or the id of a Hub repository.
        model_kwargs: for `from_pretrained`, those of the Hub included.
        dequantize: under an adapter that was trained on quantized weights (QLoRA), give the same weights in full.
    """
    check_checkpoint_path(name_or_path)
    source = {name: model_kwargs[name] for name in HUB_ARGUMENTS if name in model_kwargs}
    if find_adapter_config_file(name_or_path, **source) is None:
        head = read_head(name_or_path, source)
        if head is None:
            return LlamaBidirectionalForSequenceClassification.from_pretrained(name_or_path, **model_kwargs)
        pooling, weight = head
        if model_kwargs.get("num_labels") not in (None, len(weight)):
            raise ValueError(
                f"num_labels is {model_kwargs['num_labels']}, but the head of {name_or_path!r} has {len(weight)}: "
                "leave num_labels out"
            )
        with _without_warnings(LlamaBidirectionalForSequenceClassification.__module__):  # the head is in a file beside
            model = LlamaBidirectionalForSequenceClassification.from_pretrained(
                name_or_path, **{"pooling": pooling, "num_labels": len(weight), **model_kwargs}
            )
        model.score.weight.data = weight.to(model.score.weight.device)
        return model
    peft = require("peft", "train")
    adapter = peft.PeftConfig.from_pretrained(name_or_path, **source)
    base_source = {name: value for name, value in source.items() if name not in ("revision", "subfolder")}
    if adapter.revision is not None:
        base_source["revision"] = adapter.revision
    base = adapter.base_model_name_or_path
    fields = {name: value for name, value in model_kwargs.items() if name not in source}
    dtype = fields.pop("dtype", "auto")
    if cached_file(name_or_path, "config.json", _raise_exceptions_for_missing_entries=False, **source):
        config, fields = LlamaBidirectionalConfig.from_pretrained(
            name_or_path, return_unused_kwargs=True, **source, **fields
        )
        fields["config"] = config
        stored, _ = LlamaBidirectionalConfig.get_config_dict(base, **base_source)
        quantization = config.to_dict().get("quantization_config")
        if quantization is not None and "quantization_config" not in stored:
            # It says how the base was loaded, not how its files are stored.
            del config.quantization_config
            fields.setdefault("quantization_config", AutoQuantizationConfig.from_dict(quantization))
    with _without_warnings(LlamaBidirectionalForSequenceClassification.__module__):  # the adapter brings the head
        model = LlamaBidirectionalForSequenceClassification.from_pretrained(base, dtype=dtype, **base_source, **fields)
    if getattr(model, "is_quantized", False):
        # As in training, where what is not quantized is held in float32.
        model = model.dequantize() if dequantize else peft.prepare_model_for_kbit_training(model, False)
    model.score.float()  # the saved head, which a base in half precision would round
    return peft.PeftModel.from_pretrained(model, name_or_path, **source)


def load_onnx(name_or_path: Any, model_kwargs: dict[str, Any], *, device: Any, dtype: Any) -> OnnxReranker:
    """
    Loads an exported reranker.

    Args:
        name_or_path: a folder or the id of a Hub repository.
        model_kwargs: `file_name`, and arguments of the Hub.
        device, dtype: None, or the only ones that there are: `"cpu"` and float32.

    Raises:
        TypeError, ValueError: an argument is for another backend.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"backend 'onnx' loads an exported folder, got {type(name_or_path).__name__}")
    if device is not None and str(device) != "cpu":
        raise ValueError(f"backend 'onnx' computes on the CPU: leave device out, got {device!r}")
    if dtype not in (None, "auto", "float32", torch.float32):
        raise ValueError(f"backend 'onnx' has the dtype of its graph: leave dtype out, got {dtype!r}")
    source = {name: value for name, value in model_kwargs.items() if name in HUB_ARGUMENTS}
    if unknown := model_kwargs.keys() - source.keys() - {"file_name"}:
        raise ValueError(f"backend 'onnx' takes no {', '.join(sorted(unknown))}: it is for backend 'torch'")
    check_checkpoint_path(name_or_path)
    return OnnxReranker(name_or_path, model_kwargs.get("file_name", MODEL_FILE), source)


def load_merged(
    name_or_path: str, dtype: str = "auto", *, revision: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """
    Loads a checkpoint, or an adapter merged into its base model, which are float32 weights then, with its prompt.

    Args:
        name_or_path: a folder or the id of a Hub repository.
        dtype: of a checkpoint's weights; `"auto"` is its own.
        revision: branch, tag or commit of the repository.

    Returns:
        the model and its tokenizer.

    Raises:
        ValueError: the weights of the checkpoint are quantized.
    """
    source: dict[str, Any] = {} if revision is None else {"revision": revision}
    if find_adapter_config_file(name_or_path, **source) is None:
        model = load_reranker(name_or_path, {"dtype": dtype, **source})
        if getattr(model, "is_quantized", False):
            raise ValueError(f"{name_or_path!r} holds quantized weights: give the checkpoint that they were made from")
    else:
        adapted = load_reranker(name_or_path, {"dtype": "float32", **source}, dequantize=True)
        model = adapted.merge_and_unload(safe_merge=True)
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **source)
    model.config.prompt_template = find_prompt_template(tokenizer, model.config)
    ensure_pad_token(tokenizer, model.config.vocab_size)
    return model.eval(), tokenizer


@contextmanager
def _without_warnings(logger_name: str) -> Iterator[None]:
    other = logging.getLogger(logger_name)
    level = other.level
    other.setLevel(logging.ERROR)
    try:
        yield
    finally:
        other.setLevel(level)


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype, *, only_trained: bool = False) -> None:
    """Not `model.to(dtype)`, which would round the frequencies of the rotary embedding as well."""
    for parameter in model.parameters():
        if parameter.requires_grad or not only_trained:
            parameter.data = parameter.data.to(dtype)

"""Where a CrossEncoder's model comes from: a checkpoint, an adapter on its base model, or the caller."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from .configuration_llama_bidir import LlamaBidirectionalConfig, check_checkpoint_path
from .extras import require
from .modeling_llama_bidir import LlamaBidirectionalForSequenceClassification

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


def load_reranker(name_or_path: str, model_kwargs: dict[str, Any]) -> Any:
    """
    Loads a checkpoint, or an adapter (PEFT) on its base model with the configuration that was saved beside the adapter.

    Args:
        name_or_path: a folder or the id of a Hub repository.
        model_kwargs: for `from_pretrained`, those of the Hub included.
    """
    check_checkpoint_path(name_or_path)
    source = {name: model_kwargs[name] for name in HUB_ARGUMENTS if name in model_kwargs}
    if find_adapter_config_file(name_or_path, **source) is None:
        return LlamaBidirectionalForSequenceClassification.from_pretrained(name_or_path, **model_kwargs)
    peft = require("peft", "train")
    adapter = peft.PeftConfig.from_pretrained(name_or_path, **source)
    base_source = {name: value for name, value in source.items() if name not in ("revision", "subfolder")}
    if adapter.revision is not None:
        base_source["revision"] = adapter.revision
    base = adapter.base_model_name_or_path
    fields = {name: value for name, value in model_kwargs.items() if name not in source}
    if cached_file(name_or_path, "config.json", _raise_exceptions_for_missing_entries=False, **source):
        config, fields = LlamaBidirectionalConfig.from_pretrained(
            name_or_path, return_unused_kwargs=True, **source, **fields
        )
        fields["config"] = config
    with _without_warnings(LlamaBidirectionalForSequenceClassification.__module__):  # the adapter brings the head
        model = LlamaBidirectionalForSequenceClassification.from_pretrained(base, **base_source, **fields)
    return peft.PeftModel.from_pretrained(model, name_or_path, **source)


@contextmanager
def _without_warnings(logger_name: str) -> Iterator[None]:
    other = logging.getLogger(logger_name)
    level = other.level
    other.setLevel(logging.ERROR)
    try:
        yield
    finally:
        other.setLevel(level)


def default_device() -> str:
    """The first accelerator when there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type

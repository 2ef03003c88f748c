"""Bidirectional Llama rerankers for Hugging Face transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register, register_lazily

if TYPE_CHECKING:
    from .configuration_llama_bidir import LlamaBidirectionalConfig as LlamaBidirectionalConfig
    from .modeling_llama_bidir import (
        LlamaBidirectionalForSequenceClassification as LlamaBidirectionalForSequenceClassification,
    )
    from .modeling_llama_bidir import LlamaBidirectionalModel as LlamaBidirectionalModel

__version__ = "0.1.0"

_MODULE_OF = {
    "LlamaBidirectionalConfig": "configuration_llama_bidir",
    "LlamaBidirectionalModel": "modeling_llama_bidir",
    "LlamaBidirectionalForSequenceClassification": "modeling_llama_bidir",
    "CrossEncoder": "cross_encoder",
    "CrossEncoderTrainer": "training",
    "CrossEncoderTrainingArguments": "training",
}

__all__ = [*_MODULE_OF, "__version__"]

register_lazily()


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `import llama_bidir` does not import torch.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    value = globals()[name] = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value

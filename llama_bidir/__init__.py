"""Bidirectional Llama rerankers for Hugging Face transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register_lazily

if TYPE_CHECKING:
    from .configuration_llama_bidir import LlamaBidirectionalConfig
    from .cross_encoder import CrossEncoder
    from .modeling_llama_bidir import LlamaBidirectionalForSequenceClassification, LlamaBidirectionalModel
    from .training import CrossEncoderTrainer as CrossEncoderTrainer
    from .training import CrossEncoderTrainingArguments as CrossEncoderTrainingArguments

__version__ = "0.1.0"

# What a star import brings; the training names need an extra.
__all__ = [
    "CrossEncoder",
    "LlamaBidirectionalConfig",
    "LlamaBidirectionalForSequenceClassification",
    "LlamaBidirectionalModel",
]

_MODULE_OF = {
    "CrossEncoder": "cross_encoder",
    "CrossEncoderTrainer": "training",
    "CrossEncoderTrainingArguments": "training",
    "LlamaBidirectionalConfig": "configuration_llama_bidir",
    "LlamaBidirectionalForSequenceClassification": "modeling_llama_bidir",
    "LlamaBidirectionalModel": "modeling_llama_bidir",
}

register_lazily()


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `import llama_bidir` does not import torch.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})

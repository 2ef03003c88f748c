"""Bidirectional Llama rerankers for Hugging Face transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .utils.launch import is_command, wait_passively

# torch loads OpenMP, which reads the environment only then. The modules of the command line are imported later.
if is_command():
    wait_passively()

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .configuration_llama_bidir import LlamaBidirectionalConfig
from .modeling_llama_bidir import LlamaBidirectionalForSequenceClassification, LlamaBidirectionalModel

if TYPE_CHECKING:
    from .cross_encoder import CrossEncoder
    from .training import CrossEncoderTrainer as CrossEncoderTrainer
    from .training import CrossEncoderTrainingArguments as CrossEncoderTrainingArguments

__version__ = "0.2.0"

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
}

AutoConfig.register(LlamaBidirectionalConfig.model_type, LlamaBidirectionalConfig, exist_ok=True)
AutoModel.register(LlamaBidirectionalConfig, LlamaBidirectionalModel, exist_ok=True)
AutoModelForSequenceClassification.register(
    LlamaBidirectionalConfig, LlamaBidirectionalForSequenceClassification, exist_ok=True
)


def __getattr__(name: str) -> Any:
    # Loaded on first use: the two training names need an extra.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})

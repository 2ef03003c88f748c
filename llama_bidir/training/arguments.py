"""What a training run is told: the model, the data, and the Trainer's arguments."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass(kw_only=True)
class ModelArguments:
    """
    The checkpoint to train and the fields of its configuration; None keeps the checkpoint's value or the default.

    Args:
        model_name_or_path: a folder or a Hub id, a plain Llama or a reranker.
        pooling, temperature: see [`LlamaBidirectionalConfig`].
        dtype: of the weights while training; float32 unless told otherwise, because small updates vanish in bfloat16.
        attn_implementation: such as `sdpa` or `flash_attention_2`.
    """

    model_name_or_path: str
    pooling: str | None = None
    temperature: float | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None


@dataclass(kw_only=True)
class DataArguments:
    """
    The rows to train on and how they become groups.

    Args:
        train, eval: files of rows.
        group_size: passages a query, the positive first.
        prompt_template, rerank_max_length: see [`LlamaBidirectionalConfig`]; None keeps the checkpoint's.
    """

    train: list[str] = field(default_factory=list)
    eval: list[str] = field(default_factory=list)
    group_size: int = 5
    prompt_template: str | None = None
    rerank_max_length: int | None = None


@dataclass
class CrossEncoderTrainingArguments(TrainingArguments):
    """
    [`TrainingArguments`] with the defaults that rerankers are trained with; a batch counts queries (groups).

    The defaults that differ: `learning_rate` 3e-6, `weight_decay` 0.01 and `warmup_steps` 100 (those of NeMo
    AutoModel's Llama 3.2 1B recipe), `per_device_train_batch_size` 4, `logging_steps` 10, and `dataloader_pin_memory`
    where there is an accelerator to pin it for.
    """

    learning_rate: float = 3e-6
    weight_decay: float = 0.01
    warmup_steps: float = 100
    per_device_train_batch_size: int = 4
    logging_steps: float = 10
    dataloader_pin_memory: bool = field(default_factory=torch.accelerator.is_available)

"""One training run, from arguments to a saved reranker."""

import logging

from transformers import AutoTokenizer

from ..data import load_rows
from ..extras import require
from ..modeling_llama_bidir import LlamaBidirectionalForSequenceClassification
from .arguments import CrossEncoderTrainingArguments, DataArguments, ModelArguments
from .trainer import CrossEncoderTrainer

logger = logging.getLogger(__name__)


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: CrossEncoderTrainingArguments
) -> CrossEncoderTrainer:
    """
    Trains a reranker and saves it, with tokenizer and model card, into `training_args.output_dir`.

    Returns:
        the trainer, whose `model` is the trained one and whose `state.log_history` holds the losses.

    Raises:
        ValueError: an argument, a row or the checkpoint breaks its rule.
        OSError: a file or the checkpoint is not there.
    """
    if not data_args.train:
        raise ValueError("data.train must name at least one file of training rows")
    concatenate = require("datasets", "train").concatenate_datasets
    train_dataset = concatenate([load_rows(source) for source in data_args.train])
    eval_dataset = concatenate([load_rows(source) for source in data_args.eval]) if data_args.eval else None

    config_fields = {
        "pooling": model_args.pooling,
        "temperature": model_args.temperature,
        "prompt_template": data_args.prompt_template,
        "rerank_max_length": data_args.rerank_max_length,
        "attn_implementation": model_args.attn_implementation,
    }
    model = LlamaBidirectionalForSequenceClassification.from_pretrained(
        model_args.model_name_or_path,
        dtype=model_args.dtype,
        **{name: value for name, value in config_fields.items() if value is not None},
    )
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    trainer = CrossEncoderTrainer(
        model,
        training_args,
        train_dataset,
        eval_dataset,
        tokenizer,
        group_size=data_args.group_size,
    )
    trainer.train()
    trainer.save_model()
    return trainer

"""LoRA adapters: adding one whose score head is trained and saved, and merging one into a plain checkpoint."""

import copy
import os
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from ..checkpoints.adapters import absolute_base
from ..checkpoints.chat_template import save_tokenizer
from ..checkpoints.files import replaced_by_checkpoint
from ..checkpoints.loading import cast_parameters, load_merged
from ..checkpoints.model_card import has_other_card, write_model_card
from ..checkpoints.source import check_source
from ..utils.extras import require
from ..utils.outputs import whole_folder

HEAD = "score"


def add_adapter(model: PreTrainedModel, peft_config: Any) -> Any:
    """
    Puts a new adapter on a reranker. The score head is trained in full and saved with the adapter. All trained weights
    are in float32.

    Args:
        model: a [`LlamaBidirectionalForSequenceClassification`]. Quantized weights are prepared for training.
        peft_config: a `peft.LoraConfig` or another configuration of PEFT, which is not changed. If it names no
            `target_modules`, they are all linear layers of the body.

    Raises:
        ValueError: the task type is not `SEQ_CLS`, the configuration adds tokens, or the model already has an adapter.
    """
    peft = require("peft", "train")
    if isinstance(model, peft.PeftModel):
        raise ValueError("the model already has an adapter: pass it without peft_config to train that adapter")
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"{type(peft_config).__name__} adds tokens to the input, which rerankers do not support: use LoRA"
        )
    if peft_config.task_type not in (None, peft.TaskType.SEQ_CLS):
        raise ValueError(f"the task_type of a reranker's peft_config must be SEQ_CLS, got {peft_config.task_type!r}")
    peft_config = copy.deepcopy(peft_config)
    peft_config.task_type = peft.TaskType.SEQ_CLS
    peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), HEAD})
    if peft_config.target_modules is None:
        peft_config.target_modules = "all-linear"
    if getattr(model, "is_quantized", False):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    base = absolute_base(model.name_or_path)
    model = peft.get_peft_model(model, peft_config)
    model.peft_config["default"].base_model_name_or_path = base  # the working folder may change before a save
    cast_parameters(model, torch.float32, only_trained=True)
    return model


def check_head(model: Any) -> None:
    """Raises ValueError for an adapter that does not train the head, because it would not save the head either."""
    if not any(weight.requires_grad and f".{HEAD}." in name for name, weight in model.named_parameters()):
        raise ValueError(
            "the adapter does not train the score head: make it with modules_to_save=['score'], or pass the model and "
            "a peft_config"
        )


def merge_adapter(
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """
    Merges an adapter into its base model and writes a plain checkpoint with equal scores.

    Args:
        adapter: the folder or Hub id of an adapter, as [`CrossEncoderTrainer`] saves it.
        output: the folder to write. It appears only when it is complete.
        dtype: of the checkpoint. Half precision takes half the space and rounds the weights.
        overwrite: replace the checkpoint in `output` if there is one. Other files in the folder stay.

    Raises:
        FileExistsError: `output` exists, and `overwrite` is not set or `output` is not a checkpoint.
        ValueError: `adapter` is not an adapter, or it lies inside `output`.
    """
    name = os.fspath(adapter)
    check_source(name)
    if find_adapter_config_file(name) is None:
        raise ValueError(f"{name!r} has no adapter_config.json: it is a whole checkpoint already")
    with whole_folder(
        output, overwrite=overwrite, keep=name, marker="config.json", replaces=replaced_by_checkpoint(output)
    ) as folder:
        merged, tokenizer = load_merged(name)
        cast_parameters(merged, getattr(torch, dtype))
        merged.save_pretrained(folder)
        save_tokenizer(tokenizer, folder, merged.config)
        if not has_other_card(output):
            write_model_card(folder, merged.config, os.fspath(output))

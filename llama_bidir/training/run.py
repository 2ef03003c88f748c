"""One training run, from arguments to a saved reranker."""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import upload_folder
from transformers import PreTrainedModel, set_seed

from ..checkpoints.source import check_source
from ..checkpoints.tokenizer import load_tokenizer
from ..data import GroupDataset, Grouping, Source, check_teacher_scores, load_rows, parse_source, with_negatives
from ..losses import check_group_size, needs_teacher
from ..modeling_llama_bidir import LlamaBidirectionalForSequenceClassification
from .arguments import (
    CrossEncoderTrainingArguments,
    DataArguments,
    ModelArguments,
    check_temperatures,
    config_fields,
    lora_config,
    read_config,
)
from .checkpoints import (
    check_complete,
    check_removable,
    check_same_run,
    describe_groups,
    is_finished,
    last_whole_checkpoint,
    remove_run,
    run_arguments,
    write_run,
)
from .history import HISTORY_NAME, PLOT_NAME
from .lora import HEAD
from .reranking import check_entries, load_rerank_sets
from .trainer import CrossEncoderTrainer

logger = logging.getLogger(__name__)


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: CrossEncoderTrainingArguments,
    lora: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> CrossEncoderTrainer:
    """
    Trains a reranker and saves it, with tokenizer and model card, into `training_args.output_dir`.

    A stopped run resumes from its last complete checkpoint when it is started again with the same arguments.

    Args:
        model_args, data_args, training_args: see their classes.
        lora: fields of [`peft.LoraConfig`]. If given, an adapter and the head are trained and saved.
        overwrite: start over, and replace the files of a former run in the output folder.

    Returns:
        the trainer. Its `model` is the trained model, and its `state.log_history` holds the losses.

    Raises:
        FileExistsError: the output folder holds a finished reranker and `overwrite` is not set, or it holds something
            that is not a run.
        ValueError: an argument, a row or the checkpoint breaks its rule, or a stopped run had different arguments.
        OSError: a file or the checkpoint does not exist.
    """
    check_recipe(model_args, data_args, training_args, lora)
    output = Path(str(training_args.output_dir))
    tokenizer = load_tokenizer(model_args.model_name_or_path, revision=model_args.revision)
    if overwrite:
        sources = [parse_source(entry).path for entry in data_args.train + data_args.eval]
        sources += [str(entry["path"]) for entry in data_args.eval_rerank]
        check_removable(output, keep=[model_args.model_name_or_path, *sources])
    elif is_finished(output):
        raise FileExistsError(
            f"{os.fspath(output)!r} holds a finished reranker: pass overwrite (--overwrite) to replace it, or "
            "choose another training.output_dir"
        )
    grouping = data_args.grouping(training_args.draw_seed)
    train_dataset = _load_groups(data_args.train, data_args, grouping, training_args.loss)
    eval_dataset = None
    if data_args.eval:
        eval_dataset = _load_groups(data_args.eval, data_args, data_args.eval_grouping(), training_args.loss)
    prompt_template = read_config(model_args, data_args, tokenizer).prompt_template
    for dataset in filter(None, (train_dataset, eval_dataset)):
        dataset.check_instructions(prompt_template)
    rerank_sets = load_rerank_sets(data_args.eval_rerank)
    set_seed(training_args.seed)  # a new head is drawn at random
    model = load_model(model_args, data_args, has_adapter=lora is not None)
    trainer = CrossEncoderTrainer(
        model,
        training_args,
        train_dataset,
        eval_dataset,
        tokenizer,
        group_size=data_args.group_size,
        prompt_template=data_args.prompt_template,
        rerank_sets=rerank_sets,
        peft_config=None if lora is None else lora_config(lora),
    )
    prompt = {name: getattr(model.config, name) for name in ("prompt_template", "instruction")}
    data_args = replace(data_args, **prompt)
    arguments = run_arguments(model_args, data_args, training_args, lora, describe_groups(train_dataset))
    trainer.accelerator.wait_for_everyone()
    if overwrite:  # only now, because nothing else can be wrong with the run that replaces it
        if trainer.is_world_process_zero():
            remove_run(output)
        trainer.accelerator.wait_for_everyone()
    checkpoint = last_whole_checkpoint(output)
    if checkpoint is not None:
        check_same_run(output, arguments)
        if not trainer.is_fsdp_enabled:
            check_complete(checkpoint, trainer.model)
        logger.warning(f"resuming from {checkpoint}")
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        write_run(output, arguments)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else os.fspath(checkpoint))

    if model_args.dtype != "float32" and lora is None:
        trainer.save_dtype = getattr(torch, model_args.dtype)
    files = _save_whole(trainer, output)
    if trainer.is_world_process_zero():
        write_run(output, arguments, files=files)
        if training_args.push_to_hub:
            _push(trainer, output, [*files, HISTORY_NAME, PLOT_NAME])
    return trainer


def check_recipe(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: CrossEncoderTrainingArguments,
    lora: Mapping[str, Any] | None,
) -> None:
    """Raises ValueError for arguments that contradict each other, before anything is read."""
    if not data_args.train:
        raise ValueError("data.train must name at least one source of training rows")
    if model_args.load_in_4bit and lora is None:
        raise ValueError("model.load_in_4bit freezes the weights: add a lora block to train an adapter on them")
    check_group_size(training_args.loss, data_args.group_size, "data.group_size")
    check_temperatures(training_args.loss_temperature, model_args.temperature)
    check_entries(data_args.eval_rerank)
    if training_args.resume_from_checkpoint:
        raise ValueError(
            "training.resume_from_checkpoint: a stopped run always resumes from its last checkpoint; leave it out"
        )


def _push(trainer: CrossEncoderTrainer, output: Path, files: list[str]) -> None:
    """Uploads the saved reranker. The Trainer's own upload would save it once more."""
    if trainer.hub_model_id is None:
        trainer.init_hf_repo()
    trainer._finish_current_push()
    upload_folder(
        repo_id=str(trainer.hub_model_id),
        folder_path=output,
        allow_patterns=files,
        commit_message="End of training",
        token=trainer.args.hub_token,
        revision=trainer.args.hub_revision,
    )


def _load_groups(entries: list[Any], data_args: DataArguments, grouping: Grouping, loss: Any) -> GroupDataset:
    sources = [parse_source(entry) for entry in entries]
    weighted = [(load_usable_rows(source, data_args, grouping, loss), source.weight) for source in sources]
    return GroupDataset(weighted, grouping, names=[source.path for source in sources])


def load_usable_rows(source: Source, data_args: DataArguments, grouping: Grouping, loss: Any) -> Any:
    """
    Loads the rows of a source that can be made into groups.

    Raises:
        ValueError: another row is there, and `data_args.skip_bad_rows` is not set; or the loss needs teacher scores,
            and a row has none.
    """
    rows = load_rows(source, skip_bad_rows=data_args.skip_bad_rows)
    if grouping.needs_negatives:
        rows = with_negatives(rows, source.path, skip_others=data_args.skip_bad_rows)
    if needs_teacher(loss):
        check_teacher_scores(rows, source.path)
    return rows


def load_model(model_args: ModelArguments, data_args: DataArguments, *, has_adapter: bool) -> PreTrainedModel:
    """
    Loads the checkpoint to train: in float32, or in `model_args.dtype` if it stays frozen under an adapter.

    Raises:
        ImportError: `load_in_4bit` is set, but bitsandbytes is not installed.
    """
    name = model_args.model_name_or_path
    fields = {**config_fields(model_args, data_args), **check_source(name, {"revision": model_args.revision})}
    if model_args.attn_implementation is not None:
        fields["attn_implementation"] = model_args.attn_implementation
    if model_args.load_in_4bit:
        fields["quantization_config"] = _four_bits(model_args.dtype)
    return LlamaBidirectionalForSequenceClassification.from_pretrained(
        name,
        dtype=model_args.dtype if has_adapter else "float32",
        **fields,
    )


def _four_bits(dtype: str) -> Any:
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ImportError("model.load_in_4bit needs bitsandbytes: pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=[HEAD],
    )


def _save_whole(trainer: CrossEncoderTrainer, output: Path) -> list[str]:
    """
    Saves the reranker into the output folder, with a model card if there is none yet. Saves all files or none.

    Returns:
        the names of the files; empty in all processes but the first.
    """
    trainer.save_model(os.fspath(output), _internal_call=True)
    trainer.accelerator.wait_for_everyone()
    return trainer.saved_files if trainer.is_world_process_zero() else []

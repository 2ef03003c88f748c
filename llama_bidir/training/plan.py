"""A dry run: what training would read, how many steps it would take, and how much memory it would need."""

import math
import os
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..checkpoints.tokenizer import load_tokenizer
from ..configuration_llama_bidir import LlamaBidirectionalConfig
from ..data import GroupDataset, parse_source, read_rows
from ..data.groups import pairs_of
from ..modeling_llama_bidir import LlamaBidirectionalForSequenceClassification
from ..prompts import PromptEncoder
from ..utils.tables import format_table
from ..weights_llama_bidir import check_weights, find_weights, read_weights
from .arguments import CrossEncoderTrainingArguments, DataArguments, ModelArguments, lora_config, read_config
from .checkpoints import is_finished, last_whole_checkpoint
from .lora import HEAD, add_adapter
from .reranking import load_rerank_sets
from .run import check_recipe, load_usable_rows
from .steps import Steps

T = TypeVar("T")

SAMPLE_GROUPS = 200
# Bytes of optimizer state per trained weight, where it is not AdamW's two float32 moments.
OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 0, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2}
# NF4 with nested quantization: half a byte per weight, one per block of 64 weights, and four per 256 blocks.
BYTES_OF_4_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)


class Memory(NamedTuple):
    """Bytes that one process needs."""

    weights: int
    gradients_and_optimizer: int
    activations: int


def plan(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: CrossEncoderTrainingArguments,
    lora: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> str:
    """
    Describes what [`train`] would do with the same arguments: data, lengths, the first prompt, steps, memory, output.

    All groups of the first epoch are made once. Of the checkpoint, the configuration and the tokenizer are read, but
    not the weights.

    Raises:
        FileNotFoundError: the checkpoint or a source cannot be read. The message names all of them, each with its key.
        ValueError: an argument, a row or the checkpoint breaks its rule.
    """
    check_recipe(model_args, data_args, training_args, lora)
    problems: list[str] = []

    def reach(key: str, name: str, read: Callable[[], T]) -> T | None:
        """Returns what `read` returns. If `read` raises OSError, adds it to the problems and returns None."""
        try:
            return read()
        except OSError as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            named = reason if name in reason else f"{name!r} cannot be read: {reason}"
            problems.append(f"{key}: {named} (--{key} names another)")
            return None

    read_checkpoint = partial(_read_checkpoint, model_args, data_args)
    checkpoint = reach("model.model_name_or_path", model_args.model_name_or_path, read_checkpoint)
    # Short groups are masked here, because passages that they repeat do not count.
    grouping = replace(data_args.grouping(training_args.draw_seed), short_groups="mask")
    table, weighted = [("", "source", "rows", "bad rows", "weight", "groups")], []
    for use, how in (("train", grouping), ("eval", data_args.eval_grouping())):
        for index, entry in enumerate(getattr(data_args, use)):
            source = parse_source(entry, f"data.{use}[{index}]")
            load = partial(load_usable_rows, source, data_args, how, training_args.loss)
            if (rows := reach(f"data.{use}", source.path, load)) is None:
                continue
            groups = GroupDataset([(rows, source.weight)], how, names=[source.path])
            if checkpoint is not None:
                groups.check_instructions(checkpoint[0].prompt_template)
            numbers = (len(rows), len(read_rows(entry)[1]), len(groups))
            num_rows, num_bad, num_groups = (f"{number:,}" for number in numbers)
            table.append((use, source.path, num_rows, num_bad, f"{source.weight:g}", num_groups))
            weighted += [(rows, source.weight)] if use == "train" else []
    for entry in data_args.eval_rerank:
        load = partial(load_rerank_sets, [entry])
        if (sets := reach("data.eval_rerank", str(entry["path"]), load)) is not None:
            queries = f"{len(sets[0].groups):,}"
            table.append(("eval_rerank", str(entry["path"]), queries, "", "", queries))
    if checkpoint is None or problems:
        raise FileNotFoundError("; ".join(problems))

    config, encoder = checkpoint
    groups = GroupDataset(weighted, grouping)
    counts = [len(groups[index]["passages"]) for index in range(len(groups))]
    fate = "are smaller" if data_args.short_groups == "mask" else "repeat negatives"
    indices = random.Random(training_args.seed).sample(range(len(groups)), min(SAMPLE_GROUPS, len(groups)))
    pairs = [pair for group in map(groups.__getitem__, indices) for pair in pairs_of(group)]
    num_cut = encoder.encode(pairs).num_truncated
    lengths = [len(ids) for ids in encoder.tokenize(pairs)]
    first = encoder.encode(pairs_of(groups[0])[:1])
    at_once, accumulated = training_args.train_batch_size, training_args.gradient_accumulation_steps
    step = training_args.world_size * at_once * accumulated
    steps_per_epoch, steps = count_steps(len(groups), training_args)
    model = _make_model(config, model_args, lora)
    num_trained = _count(weight for weight in model.parameters() if weight.requires_grad)
    num_tokens = at_once * data_args.group_size * min(max(lengths), encoder.max_length)
    memory = estimate_memory(model, training_args, num_tokens=num_tokens, is_4bit=model_args.load_in_4bit)
    sections = {
        "data": [
            *format_table(table, "<<>>>>"),
            f"{len(groups):,} groups per epoch with {min(counts)} to {max(counts)} passages, "
            f"{statistics.fmean(counts):.2f} on average",
            f"{sum(count < data_args.group_size for count in counts):,} groups have fewer than {data_args.group_size} "
            f"passages and {fate}",
        ],
        f"tokens per pair (a sample: {len(indices):,} of {len(groups):,} groups, {len(pairs):,} pairs)": [
            f"median {statistics.median_low(lengths):,}, longest {max(lengths):,}",
            f"{num_cut:,} of {len(pairs):,} pairs ({num_cut / len(pairs):.1%}) are longer than {encoder.max_length} "
            "and are cut",
        ],
        "first prompt": [repr(encoder.tokenizer.decode(first.input_ids[0]))],
        "steps": [
            f"{step:,} groups per step = {training_args.world_size} (processes) x {at_once} (groups at once) x "
            f"{accumulated} (accumulated); at most {step * data_args.group_size:,} pairs",
            f"{steps_per_epoch:,} per epoch, {steps:,} in total",
        ],
        "memory per process (an estimate)": [
            f"{_size(sum(memory))} = weights {_size(memory.weights)} + gradients and optimizer "
            f"{_size(memory.gradients_and_optimizer)} + activations {_size(memory.activations)}",
            f"{num_trained:,} of {_count(model.parameters()):,} weights are trained; activations are those of "
            f"{num_tokens:,} tokens, if all pairs are as long as the longest",
        ],
        "output": [_describe_output(Path(training_args.output_dir or "trainer_output"), overwrite)],
    }
    return "\n".join("\n  ".join([title, *lines]) for title, lines in sections.items())


def count_steps(num_groups: int, args: CrossEncoderTrainingArguments) -> tuple[int, int]:
    """
    Returns the optimizer steps per epoch and in total.

    Raises:
        ValueError: `dataloader_drop_last` would leave out all groups.
    """
    per_epoch = Steps(
        batch_size=args.train_batch_size,
        processes=args.world_size,
        accumulation=args.gradient_accumulation_steps,
        drop_last=args.dataloader_drop_last,
    ).count(num_groups)
    return per_epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def estimate_memory(
    model: torch.nn.Module, args: CrossEncoderTrainingArguments, *, num_tokens: int, is_4bit: bool = False
) -> Memory:
    """
    Estimates the memory of one process.

    Args:
        model: the model to train, of which only shapes, dtypes and `requires_grad` are read.
        args: decide on sharding, computing in half precision, the optimizer and checkpointing.
        num_tokens: of one batch, if all its pairs are as long as the longest.
        is_4bit: the frozen linear layers except the head are in 4 bits, and all other weights in float32.
    """
    shards = args.world_size if args.fsdp else 1
    is_half = args.bf16 or args.fp16
    linear = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    trained = _count(weight for weight in model.parameters() if weight.requires_grad)

    def num_bytes(weight: torch.nn.Parameter) -> float:
        if is_4bit and not weight.requires_grad and HEAD not in linear.get(id(weight), HEAD):
            return BYTES_OF_4_BITS * weight.numel()
        return (4 if is_4bit else weight.element_size()) * weight.numel()

    weights = int(sum(map(num_bytes, model.parameters()))) // shards
    gradients = 4 * trained // shards
    optimizer = OPTIMIZER_BYTES.get(getattr(args.optim, "value", args.optim), 8) * trained // shards
    if shards > 1:  # FSDP gathers the embeddings and two layers at a time.
        layers: Any = next(module for name, module in model.named_modules() if name.endswith(".layers"))
        in_layers = _count(layers.parameters())
        gathered = _count(model.parameters()) - in_layers + 2 * in_layers // len(layers)
        weights += (2 if is_half else 4) * gathered
    elif args.world_size > 1:  # DDP sums the gradients in buckets of its own.
        gradients += 4 * trained
    if shards == 1 and is_half:  # Autocast copies the float32 weights of linear layers.
        copied = (weight for weight in model.parameters() if id(weight) in linear and weight.dtype == torch.float32)
        weights += 2 * _count(copied)
    return Memory(weights, gradients + optimizer, num_tokens * bytes_per_token(model.config, args))


def bytes_per_token(config: Any, args: CrossEncoderTrainingArguments) -> int:
    """
    Estimates the bytes of activations per token that the layers keep for the backward pass.

    A layer keeps the inputs and the results of both norms in float32. In the dtype of computing it keeps the queries,
    keys and values, the result of attention, four tensors of the feed-forward layer, and the inputs of the linear
    layers. Autocast copies such an input once for each linear layer that reads it.
    """
    size, num_hidden = (2, 7) if args.bf16 or args.fp16 else (4, 4)
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim
    layer = 4 * 4 * config.hidden_size
    layer += size * (num_hidden * config.hidden_size + keys_and_values + 4 * config.intermediate_size)
    is_sharded_checkpointing = isinstance(args.fsdp_config, dict) and args.fsdp_config.get("activation_checkpointing")
    if args.gradient_checkpointing or (args.fsdp and is_sharded_checkpointing):
        # Only the input of each layer is kept. The rest is computed again, one layer at a time.
        return int(config.num_hidden_layers * 4 * config.hidden_size + layer)
    return int(config.num_hidden_layers * layer)


def _read_checkpoint(
    model_args: ModelArguments, data_args: DataArguments
) -> tuple[LlamaBidirectionalConfig, PromptEncoder]:
    name = model_args.model_name_or_path
    tokenizer = load_tokenizer(name, revision=model_args.revision)
    config = read_config(model_args, data_args, tokenizer)
    if os.path.isdir(name) and (files := find_weights(name)):
        is_quantized = getattr(config, "quantization_config", None) is not None
        check_weights(config, read_weights(files), has_head=True, is_quantized=is_quantized)
    return config, PromptEncoder.from_config(tokenizer, config)


def _make_model(
    config: LlamaBidirectionalConfig, model_args: ModelArguments, lora: Mapping[str, Any] | None
) -> torch.nn.Module:
    """Returns the model that is trained, with shapes and dtypes but without memory for its weights."""
    with torch.device("meta"):
        model = LlamaBidirectionalForSequenceClassification(config)
        if lora is None:
            return model
        return add_adapter(model.to(getattr(torch, model_args.dtype)), lora_config(lora))


def _describe_output(output: Path, overwrite: bool) -> str:
    name = os.fspath(output)
    if overwrite:
        is_used = output.exists() and any(output.iterdir())
        return f"{name}, after its former run is removed" if is_used else name
    if is_finished(output):
        return f"{name} holds a finished reranker, which only --overwrite replaces"
    checkpoint = last_whole_checkpoint(output)
    return name if checkpoint is None else f"{name}, resuming from {checkpoint.name}"


def _count(weights: Any) -> int:
    return sum(weight.numel() for weight in weights)


def _size(num_bytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes} B"

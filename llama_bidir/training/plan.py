"""What a training run would do, found out without training: its data, its steps and its memory."""

import math
import os
import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import AutoTokenizer

from ..checkpoints.chat_template import find_prompt_template
from ..configuration_llama_bidir import LlamaBidirectionalConfig
from ..data import GroupDataset, Grouping, Source, parse_source, read_rows
from ..modeling_llama_bidir import LlamaBidirectionalForSequenceClassification
from ..prompts import PromptEncoder
from ..utils.tables import format_table
from .arguments import CrossEncoderTrainingArguments, DataArguments, ModelArguments, lora_config
from .checkpoints import is_finished, last_whole_checkpoint
from .lora import HEAD, add_adapter
from .run import check_recipe, load_usable_rows, training_grouping

T = TypeVar("T")

SAMPLE_GROUPS = 200
NUM_BUCKETS = 8
BAR_WIDTH = 40
# Bytes of optimizer state a trained weight; AdamW's two float32 moments for those that are not listed.
OPTIMIZER_BYTES = {"sgd": 0, "adafactor": 0, "adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2}
# NF4 with nested quantization: half a byte a weight, one a block of 64, and four for every 256 blocks.
BYTES_OF_4_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)


class SourcePlan(NamedTuple):
    """An entry of `data.train` or `data.eval`: its good and bad rows, and the groups that it gives an epoch."""

    use: str
    path: str
    rows: int
    bad_rows: int
    weight: float
    groups: int


class PassagePlan(NamedTuple):
    """Passages of the training groups of an epoch, and how many groups have fewer than they should."""

    smallest: int
    largest: int
    mean: float
    num_short: int


class LengthPlan(NamedTuple):
    """Tokens of the whole pairs of some training groups, and how many of the pairs are cut to `max_length`."""

    num_groups: int
    lengths: list[int]
    num_truncated: int
    max_length: int

    def buckets(self) -> list[tuple[str, int]]:
        """Names and counts of equal ranges of lengths, the last one for those above `max_length`."""
        width = math.ceil(self.max_length / NUM_BUCKETS)
        ranges = [(low, min(low + width - 1, self.max_length)) for low in range(1, self.max_length + 1, width)]
        counted = [(f"{low} to {high}", sum(low <= length <= high for length in self.lengths)) for low, high in ranges]
        return [*counted, (f"over {self.max_length}", sum(length > self.max_length for length in self.lengths))]


class StepPlan(NamedTuple):
    """Optimizer steps, of `processes * local * accumulation` groups each."""

    processes: int
    local: int
    accumulation: int
    an_epoch: int
    total: int

    @property
    def groups(self) -> int:
        return self.processes * self.local * self.accumulation


class MemoryPart(NamedTuple):
    """Bytes that one process needs for something, and how they are counted."""

    name: str
    num_bytes: int
    arithmetic: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    What a training run would do.

    Args:
        sources: of training and evaluation.
        group_size: passages that a training group should have.
        short_groups: what becomes of one with fewer (see [`DataArguments`]).
        passages: that the training groups have, before any is shown again.
        lengths: of a sample of the training pairs.
        first_prompt: the first pair of the first group, decoded from its token ids.
        steps: of the optimizer.
        num_weights, num_trained: of the model.
        memory: of one process, an estimate.
        output: the folder that would be written, and what is there already.
    """

    sources: list[SourcePlan]
    group_size: int
    short_groups: str
    passages: PassagePlan
    lengths: LengthPlan
    first_prompt: str
    steps: StepPlan
    num_weights: int
    num_trained: int
    memory: list[MemoryPart]
    output: str

    @property
    def groups(self) -> int:
        """Training groups an epoch."""
        return sum(source.groups for source in self.sources if source.use == "train")

    def format(self) -> str:
        """The plan as text."""
        steps, lengths = self.steps, self.lengths
        shown = f"a sample: {lengths.num_groups:,} of {self.groups:,} groups, {len(lengths.lengths):,} pairs"
        trained = f"{self.num_trained:,} of {self.num_weights:,} weights are trained"
        sections = {
            "data": self._format_data(),
            f"tokens of a pair ({shown})": self._format_lengths(),
            "first prompt": [repr(self.first_prompt)],
            "steps": [
                f"{steps.groups:,} groups a step = {steps.processes} (processes) x {steps.local} (groups at once) x "
                f"{steps.accumulation} (accumulated); at most {steps.groups * self.group_size:,} pairs",
                f"{steps.an_epoch:,} an epoch, {steps.total:,} in all",
            ],
            f"memory of a process (an estimate; {trained})": self._format_memory(),
            "output": [self.output],
        }
        return "\n".join("\n  ".join([title, *lines]) for title, lines in sections.items())

    def _format_data(self) -> list[str]:
        smallest, largest, mean, num_short = self.passages
        rows = [
            (use, path, f"{rows:,}", f"{bad_rows:,}", f"{weight:g}", f"{groups:,}")
            for use, path, rows, bad_rows, weight, groups in self.sources
        ]
        fate = "are smaller" if self.short_groups == "mask" else "show negatives again"
        return [
            *format_table([("", "source", "rows", "bad rows", "weight", "groups"), *rows], "<<>>>>"),
            f"{self.groups:,} groups an epoch with {smallest} to {largest} passages, {mean:.2f} on average",
            f"{num_short:,} groups have fewer than {self.group_size} passages and {fate}",
        ]

    def _format_lengths(self) -> list[str]:
        _, lengths, num_truncated, max_length = self.lengths
        buckets = self.lengths.buckets()
        highest = max(count for _, count in buckets)
        bars = [(name, f"{count:,}", "#" * math.ceil(BAR_WIDTH * count / highest)) for name, count in buckets]
        return [
            *format_table(bars, ">><"),
            f"median {statistics.median_low(lengths):,}, longest {max(lengths):,}; {num_truncated:,} of "
            f"{len(lengths):,} pairs ({num_truncated / len(lengths):.1%}) are longer than {max_length} and are cut",
        ]

    def _format_memory(self) -> list[str]:
        total = MemoryPart("total", sum(part.num_bytes for part in self.memory), "")
        return format_table(
            [(name, _size(num_bytes), arithmetic) for name, num_bytes, arithmetic in [*self.memory, total]], "<><"
        )


def plan(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: CrossEncoderTrainingArguments,
    lora: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Plan:
    """
    Finds out what [`train`] would do with the same arguments. All groups of the first epoch are made once; of the
    checkpoint, the configuration and the tokenizer are read, but not the weights.

    Raises:
        FileNotFoundError: the checkpoint or sources cannot be read; all of these are named, each with its argument.
        ValueError: an argument, a row or the checkpoint breaks its rule.
    """
    check_recipe(model_args, data_args, training_args, lora)
    name, problems = model_args.model_name_or_path, list[str]()
    checkpoint = _reach(lambda: _read_checkpoint(model_args, data_args), "model.model_name_or_path", name, problems)
    grouping = training_grouping(data_args, training_args)
    train = _read_sources(data_args, "train", grouping, training_args.loss, problems)
    evaluation = _read_sources(
        data_args,
        "eval",
        Grouping(group_size=data_args.eval_group_size, negatives="first"),
        training_args.loss,
        problems,
    )
    if checkpoint is None or problems:
        raise FileNotFoundError("; ".join(problems))

    config, encoder = checkpoint
    # Masked, so that what a short group shows again does not count.
    groups = GroupDataset([(rows, source.weight) for source, rows in train], replace(grouping, short_groups="mask"))
    passages = _count_passages(groups, data_args.group_size)
    lengths = _measure_lengths(groups, encoder, training_args.seed)
    first = encoder.encode([(groups[0]["query"], groups[0]["passages"][0])])
    model = _make_model(config, model_args, lora)
    longest_pair = min(max(lengths.lengths), lengths.max_length)
    return Plan(
        sources=[source for source, _ in train + evaluation],
        group_size=data_args.group_size,
        short_groups=data_args.short_groups,
        passages=passages,
        lengths=lengths,
        first_prompt=str(encoder.tokenizer.decode(first.input_ids[0])),
        steps=_count_steps(len(groups), training_args),
        num_weights=_count(model.parameters()),
        num_trained=_count(weight for weight in model.parameters() if weight.requires_grad),
        memory=_estimate_memory(
            model,
            model_args,
            training_args,
            num_tokens=training_args.train_batch_size * data_args.group_size * longest_pair,
        ),
        output=_describe_output(Path(training_args.output_dir or "trainer_output"), overwrite),
    )


def _reach(read: Callable[[], T], key: str, name: str, problems: list[str]) -> T | None:
    """Calls a function; what it cannot reach becomes one of the problems, with the option that names another."""
    try:
        return read()
    except OSError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        named = reason if name in reason else f"{name!r} cannot be read: {reason}"
        problems.append(f"{key}: {named} (--{key} names another)")
        return None


def _read_checkpoint(
    model_args: ModelArguments, data_args: DataArguments
) -> tuple[LlamaBidirectionalConfig, PromptEncoder]:
    fields: dict[str, Any] = {
        "pooling": model_args.pooling,
        "temperature": model_args.temperature,
        "prompt_template": data_args.prompt_template,
        "rerank_max_length": data_args.rerank_max_length,
        "revision": model_args.revision,
    }
    name = model_args.model_name_or_path
    given = {field: value for field, value in fields.items() if value is not None}
    config = LlamaBidirectionalConfig.from_pretrained(name, **given)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=model_args.revision)
    if data_args.prompt_template is None:
        config.prompt_template = find_prompt_template(tokenizer, config)
    return config, PromptEncoder.from_config(tokenizer, config)


def _read_sources(
    data_args: DataArguments, use: str, grouping: Grouping, loss: str, problems: list[str]
) -> list[tuple[SourcePlan, Any]]:
    read = []
    for index, entry in enumerate(getattr(data_args, use)):
        source = parse_source(entry, f"data.{use}[{index}]")

        def load(source: Source = source) -> Any:
            return load_usable_rows(source, data_args, grouping, loss)

        rows = _reach(load, f"data.{use}", source.path, problems)
        if rows is not None:
            num_bad = len(read_rows(entry)[1])
            num_groups = len(GroupDataset([(rows, source.weight)], grouping))
            read.append((SourcePlan(use, source.path, len(rows), num_bad, source.weight, num_groups), rows))
    return read


def _count_passages(groups: GroupDataset, group_size: int) -> PassagePlan:
    counts = [len(groups[index]["passages"]) for index in range(len(groups))]
    return PassagePlan(min(counts), max(counts), statistics.fmean(counts), sum(count < group_size for count in counts))


def _measure_lengths(groups: GroupDataset, encoder: PromptEncoder, seed: int) -> LengthPlan:
    indices = random.Random(seed).sample(range(len(groups)), min(SAMPLE_GROUPS, len(groups)))
    sample = [groups[index] for index in indices]
    pairs = [(group["query"], passage) for group in sample for passage in group["passages"]]
    whole = encoder.tokenizer([encoder.render(*pair) for pair in pairs], verbose=False)["input_ids"]
    return LengthPlan(len(sample), [len(ids) for ids in whole], encoder.encode(pairs).num_truncated, encoder.max_length)


def _count_steps(num_groups: int, args: CrossEncoderTrainingArguments) -> StepPlan:
    """As the Trainer counts: each process has as many batches as the others, and those left over make a step."""
    divide = math.floor if args.dataloader_drop_last else math.ceil
    batches = divide(divide(num_groups / args.train_batch_size) / args.world_size)
    an_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)
    return StepPlan(args.world_size, args.train_batch_size, args.gradient_accumulation_steps, an_epoch, total)


def _make_model(
    config: LlamaBidirectionalConfig, model_args: ModelArguments, lora: Mapping[str, Any] | None
) -> torch.nn.Module:
    """The model that is trained, with shapes and dtypes but without memory for its weights."""
    with torch.device("meta"):
        model = LlamaBidirectionalForSequenceClassification(config)
        if lora is None:
            return model
        return add_adapter(model.to(getattr(torch, model_args.dtype)), lora_config(lora))


def _estimate_memory(
    model: torch.nn.Module, model_args: ModelArguments, args: CrossEncoderTrainingArguments, *, num_tokens: int
) -> list[MemoryPart]:
    shards = args.world_size if args.fsdp else 1
    divided = f" / {shards} shards (FSDP)" if shards > 1 else ""
    is_half = args.bf16 or args.fp16
    trained = _count(weight for weight in model.parameters() if weight.requires_grad)
    optim = getattr(args.optim, "value", args.optim)
    num_bytes = OPTIMIZER_BYTES.get(optim, 8)
    parts = [
        _weights(model, shards, divided, is_4bit=model_args.load_in_4bit),
        MemoryPart("gradients", 4 * trained // shards, f"{trained:,} x 4 bytes{divided}"),
        MemoryPart(f"optimizer ({optim})", num_bytes * trained // shards, f"{trained:,} x {num_bytes} bytes{divided}"),
    ]
    if shards > 1:
        layers: Any = next(module for name, module in model.named_modules() if name.endswith(".layers"))
        in_layers, size = _count(layers.parameters()), 2 if is_half else 4
        gathered = _count(model.parameters()) - in_layers + 2 * in_layers // len(layers)
        arithmetic = f"{gathered:,} x {size} bytes, of the embeddings and of two layers at a time"
        parts.append(MemoryPart("gathered weights", size * gathered, arithmetic))
    elif args.world_size > 1:
        arithmetic = f"{trained:,} x 4 bytes, in which the processes sum them"
        parts.append(MemoryPart("gradient buckets", 4 * trained, arithmetic))
    if shards == 1 and is_half:
        linear = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
        copied = _count(weight for weight in linear if weight.dtype == torch.float32)
        parts.append(MemoryPart("half-precision copies", 2 * copied, f"{copied:,} x 2 bytes, of linear layers"))
    return [*parts, _activations(model.config, args, num_tokens, is_half=is_half)]


def _weights(model: torch.nn.Module, shards: int, divided: str, *, is_4bit: bool) -> MemoryPart:
    """In 4 bits are the frozen linear layers but the head; the other weights are then in float32."""
    in_4bit = {
        id(module.weight)
        for name, module in model.named_modules()
        if is_4bit and isinstance(module, torch.nn.Linear) and not module.weight.requires_grad and HEAD not in name
    }
    counts: dict[float, int] = {}
    for weight in model.parameters():
        size = BYTES_OF_4_BITS if id(weight) in in_4bit else 4 if is_4bit else weight.element_size()
        counts[size] = counts.get(size, 0) + weight.numel()
    arithmetic = " + ".join(f"{count:,} x {size:.4g} bytes" for size, count in sorted(counts.items(), reverse=True))
    return MemoryPart("weights", int(sum(size * n for size, n in counts.items())) // shards, arithmetic + divided)


def _activations(config: Any, args: CrossEncoderTrainingArguments, num_tokens: int, *, is_half: bool) -> MemoryPart:
    """
    What the layers keep for the backward pass, a token: in float32 the input of both norms and what they make of it;
    in the dtype of computing the queries, the keys, the values, the results of attention, the four tensors of the
    feed-forward layer, and the inputs of the linear layers, of which autocast makes one copy for each that reads it.
    """
    size, num_hidden = (2, 7) if is_half else (4, 4)
    keys_and_values = 2 * config.num_key_value_heads * config.head_dim
    layer = 4 * 4 * config.hidden_size
    layer += size * (num_hidden * config.hidden_size + keys_and_values + 4 * config.intermediate_size)
    # Checkpointing keeps the input of each layer, and computes the rest anew for one layer at a time.
    is_sharded_checkpointing = isinstance(args.fsdp_config, dict) and args.fsdp_config.get("activation_checkpointing")
    is_checkpointed = args.gradient_checkpointing or (args.fsdp and is_sharded_checkpointing)
    kept = config.num_hidden_layers * 4 * config.hidden_size + layer
    token = kept if is_checkpointed else config.num_hidden_layers * layer
    arithmetic = f"{num_tokens:,} tokens x {token:,} bytes, if all pairs are as long as the longest"
    return MemoryPart("activations", num_tokens * token, arithmetic)


def _describe_output(output: Path, overwrite: bool) -> str:
    if overwrite:
        is_used = output.exists() and any(output.iterdir())
        return f"{os.fspath(output)}" + ", whose former run is removed" * is_used
    if is_finished(output):
        return f"{os.fspath(output)} holds a finished reranker, which only --overwrite replaces"
    checkpoint = last_whole_checkpoint(output)
    return os.fspath(output) if checkpoint is None else f"{os.fspath(output)}, going on from {checkpoint.name}"


def _count(weights: Any) -> int:
    return sum(weight.numel() for weight in weights)


def _size(num_bytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes} B"

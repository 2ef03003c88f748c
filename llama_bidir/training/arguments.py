"""The arguments of a training run: the model, the data, and those of the Trainer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from ..checkpoints.chat_template import find_prompt_template
from ..checkpoints.source import check_source
from ..configuration_llama_bidir import LlamaBidirectionalConfig
from ..data import Grouping
from ..losses import get_loss
from ..scoring.packing import PACKED_IMPLEMENTATIONS
from ..utils.extras import require
from ..utils.launch import check_launch
from ..utils.validation import check_positive_int

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(kw_only=True)
class ModelArguments:
    """
    The checkpoint to train, and the fields of its configuration. None keeps the checkpoint's value or the default.

    Args:
        model_name_or_path: a folder or a Hub id of a plain Llama or of a reranker.
        revision: branch, tag or commit of the Hub repository.
        is_causal, pooling, temperature: see [`LlamaBidirectionalConfig`].
        dtype: of the saved checkpoint, and of the frozen weights under an adapter. Trained weights are always held in
            float32, because small updates vanish in bfloat16. `training.bf16` computes in bfloat16.
        attn_implementation: such as `sdpa` or `flash_attention_2`.
        load_in_4bit: quantize the frozen weights under an adapter (QLoRA). This needs bitsandbytes and a `lora` block.
    """

    model_name_or_path: str
    revision: str | None = None
    is_causal: bool | None = None
    pooling: str | None = None
    temperature: float | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(kw_only=True)
class DataArguments:
    """
    The rows to train on and how they become groups.

    Args:
        train, eval: sources of rows (see [`~data.load_rows`]), each a name or a mapping with `path` and `weight`. A
            weight of 2 shows each row twice per epoch. A weight of 0.5 shows a different half of the rows each epoch.
        eval_rerank: collections to rerank at each evaluation (see [`~training.reranking.load_rerank_sets`]).
        group_size: passages per query, the positives first.
        eval_group_size: the same in evaluation. None evaluates on all passages of each row.
        positives: for a row with several positives: `cycle` takes the next one each epoch, `expand` makes a group of
            each, `all` takes all of them, or draws as many as leave room for one negative.
        negatives: for a row with more negatives than a group needs: `sample` draws new ones each epoch, `first` takes
            the first ones.
        short_groups: for a row with too few negatives: `mask` makes a smaller group, `repeat` shows negatives again.
        skip_bad_rows: leave out malformed rows and list them, instead of stopping.
        prompt_template, instruction, rerank_max_length: see [`LlamaBidirectionalConfig`]. None keeps the checkpoint's
            value. A row with an `instruction` keeps its own.
    """

    train: list[str | dict[str, Any]] = field(default_factory=list)
    eval: list[str | dict[str, Any]] = field(default_factory=list)
    eval_rerank: list[dict[str, Any]] = field(default_factory=list)
    group_size: int = 5
    eval_group_size: int | None = None
    positives: str = "cycle"
    negatives: str = "sample"
    short_groups: str = "mask"
    skip_bad_rows: bool = False
    prompt_template: str | None = None
    instruction: str | None = None
    rerank_max_length: int | None = None

    def grouping(self, seed: int) -> Grouping:
        """How rows become training groups; `seed` decides what is drawn."""
        return Grouping(
            group_size=self.group_size,
            positives=self.positives,
            negatives=self.negatives,
            short_groups=self.short_groups,
            seed=seed,
        )

    def eval_grouping(self) -> Grouping:
        """How rows become groups in evaluation."""
        return Grouping.for_evaluation(self.eval_group_size)


@dataclass
class CrossEncoderTrainingArguments(TrainingArguments):
    """
    [`TrainingArguments`] with defaults for rerankers. Batch sizes count queries (groups).

    These defaults differ: `learning_rate` 3e-6, `weight_decay` 0.01 and `warmup_steps` 100 (the values of NeMo
    AutoModel's Llama 3.2 1B recipe), `per_device_train_batch_size` 4, `logging_steps` 10, `ddp_find_unused_parameters`
    False (every weight is used), and `dataloader_pin_memory` (True only where there is an accelerator). The passages of
    one query are never split between processes or batches.

    Args:
        loss: a name in [`~losses.LOSSES`], or a mapping from such names to weights, whose sum is trained.
        loss_temperature: divides the scores that the loss reads, and the teacher's. A value below 1 sharpens the
            softmax of a group. None is 1. `model.temperature` divides the scores of the trained reranker too.
        global_batch_size: groups per optimizer step over all processes. It sets `gradient_accumulation_steps`.
        max_pairs_per_forward: the largest number of pairs in one forward pass. A batch with more pairs, such as one
            group of 256 passages, is computed in pieces with the exact gradient (see [`~training.pieces`]).
        packing: lay the passages of a batch end to end, without padding. None packs wherever that is possible.

    Raises:
        ValueError: the loss or its temperature breaks its rule, or the batch sizes contradict each other.
    """

    learning_rate: float = 3e-6
    weight_decay: float = 0.01
    warmup_steps: float = 100
    per_device_train_batch_size: int = 4
    logging_steps: float = 10
    ddp_find_unused_parameters: bool | None = False
    dataloader_pin_memory: bool = field(default_factory=torch.accelerator.is_available)
    # In this order HfArgumentParser takes text.
    loss: dict[str, float] | str | None = "listwise_cross_entropy"
    loss_temperature: float | None = None
    global_batch_size: int | None = None
    max_pairs_per_forward: int | None = None
    packing: bool | None = None

    def __post_init__(self) -> None:
        check_launch()
        super().__post_init__()
        get_loss(self.loss)
        check_temperatures(self.loss_temperature, None)
        check_positive_int("training.max_pairs_per_forward", self.max_pairs_per_forward)
        if self.max_pairs_per_forward is not None and (self.deepspeed or self.n_gpu > 1):
            other = "deepspeed" if self.deepspeed else "several GPUs in one process"
            raise ValueError(
                f"training.max_pairs_per_forward computes several backward passes per batch, which {other} does not "
                "support: use DDP or FSDP (torchrun), or leave it out"
            )
        # accelerate would dispatch a batch by cutting its rows, but a packed batch is one row. Each process thus reads
        # its own groups.
        config: Any = self.accelerator_config
        for name in ("dispatch_batches", "split_batches"):
            if getattr(config, name):
                raise ValueError(
                    f"accelerator_config.{name} would split a batch between processes, but each process reads its own "
                    "groups: leave it out"
                )
        config.dispatch_batches = False
        if self.global_batch_size is None:
            return
        if self.deepspeed or self.auto_find_batch_size:
            other = "deepspeed" if self.deepspeed else "auto_find_batch_size"
            raise ValueError(
                f"global_batch_size does not go with {other}, which sets the size of a batch on its own: set "
                "gradient_accumulation_steps instead"
            )
        local = self.per_device_train_batch_size * max(1, self.n_gpu) * self.world_size
        if self.global_batch_size < local or self.global_batch_size % local:
            raise ValueError(
                f"global_batch_size must be a multiple of per_device_train_batch_size x devices = {local}, got "
                f"{self.global_batch_size}: change one of them"
            )
        steps = self.global_batch_size // local
        if self.gradient_accumulation_steps not in (1, steps):
            raise ValueError(
                f"global_batch_size {self.global_batch_size} makes gradient_accumulation_steps {steps}, got "
                f"{self.gradient_accumulation_steps}: give one of the two"
            )
        self.gradient_accumulation_steps = steps

    @property
    def draw_seed(self) -> int:
        """The seed of the order of the groups and of the negatives that are drawn for them."""
        return self.seed if self.data_seed is None else self.data_seed


def check_temperatures(loss_temperature: float | None, temperature: float | None) -> None:
    """Raises ValueError unless a loss temperature is a finite number above 0, and at most one of the two is not 1."""
    if loss_temperature is None:
        return
    is_number = isinstance(loss_temperature, int | float) and not isinstance(loss_temperature, bool)
    if not (is_number and 0 < loss_temperature < math.inf):
        raise ValueError(f"training.loss_temperature must be a finite number above 0, got {loss_temperature!r}")
    if loss_temperature != 1 and temperature not in (None, 1):
        raise ValueError(
            f"training.loss_temperature {loss_temperature!r} and model.temperature {temperature!r} would both divide "
            "the scores that the loss reads: leave one of them at 1"
        )


def use_packing(model: PreTrainedModel, args: CrossEncoderTrainingArguments) -> bool:
    """Returns whether to pack batches. Raises ValueError if packing is asked for but impossible."""
    attention = model.config._attn_implementation
    reasons = {
        f"attn_implementation={attention!r} cannot pack": attention not in ("sdpa", *PACKED_IMPLEMENTATIONS),
        "neftune_noise_alpha scales its noise by the length of a padded batch": args.neftune_noise_alpha is not None,
        "torch_compile would compile again for each batch": args.torch_compile,
        "several GPUs in one process split padded batches only; start one process per GPU": args.n_gpu > 1,
    }
    hindrances = [reason for reason, holds in reasons.items() if holds]
    if args.packing and hindrances:
        raise ValueError(f"packing=True is not possible: {'; '.join(hindrances)}")
    return not hindrances if args.packing is None else args.packing


def check_trainer_arguments(args: CrossEncoderTrainingArguments, kwargs: dict[str, Any]) -> None:
    """Refuses arguments of the Trainer that have no effect or a wrong one here."""
    for name in ("model_init", "compute_loss_func"):
        if kwargs.get(name) is not None:
            raise TypeError(f"{name} is not supported: pass a model, and a function as loss")
    if args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor is for classes, and passages are not classes: set it to 0")
    if args.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy 'batch_rebalance' is not supported: use 'group_by_length' or 'random'"
        )


def config_fields(model_args: ModelArguments, data_args: DataArguments) -> dict[str, Any]:
    """Returns the arguments that a configuration's `from_pretrained` takes, without those that are None."""
    fields = {
        "revision": model_args.revision,
        "is_causal": model_args.is_causal,
        "pooling": model_args.pooling,
        "temperature": model_args.temperature,
        "prompt_template": data_args.prompt_template,
        "instruction": data_args.instruction,
        "rerank_max_length": data_args.rerank_max_length,
    }
    return {name: value for name, value in fields.items() if value is not None}


def read_config(
    model_args: ModelArguments, data_args: DataArguments, tokenizer: PreTrainedTokenizerBase
) -> LlamaBidirectionalConfig:
    """Returns the configuration of the checkpoint to train, with the prompt template that training renders."""
    name = model_args.model_name_or_path
    source = check_source(name, {"revision": model_args.revision})
    config = LlamaBidirectionalConfig.from_pretrained(name, **{**config_fields(model_args, data_args), **source})
    if data_args.prompt_template is None:
        config.prompt_template = find_prompt_template(tokenizer, config)
    return config


def lora_config(fields: Mapping[str, Any]) -> Any:
    """
    Builds the [`peft.LoraConfig`] of a recipe's `lora` block.

    The fields are those of `LoraConfig`. These defaults differ: `r` 16, `lora_alpha` 32 and `target_modules`
    `all-linear` (every linear layer of the body). The score head is always trained and saved.
    """
    config_class = require("peft", "train").LoraConfig
    return config_class(**{"r": 16, "lora_alpha": 32, "target_modules": "all-linear", **fields, "task_type": "SEQ_CLS"})

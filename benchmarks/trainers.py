"""The trainers that `benchmarks.training` compares: this package's, packed and padded, and sentence-transformers'."""

import logging
import tempfile
import time
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
import transformers
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainerCallback

from llama_bidir import CrossEncoderTrainer, CrossEncoderTrainingArguments, LlamaBidirectionalForSequenceClassification
from llama_bidir.losses import ranknet

from .machine import peak_memory
from .models import SEED
from .peers import SENTENCE_TRANSFORMERS, prompt_halves

PACKED, PADDED = "llama-bidir", "llama-bidir, padded"
# sentence-transformers with mini_batch_size=-1.
WHOLE_BATCH = "ST, whole batch"
PEERS = (SENTENCE_TRANSFORMERS, WHOLE_BATCH)


class Group(NamedTuple):
    """A query, its passages with the positive first, and the number of tokens of each rendered pair."""

    query: str
    passages: list[str]
    lengths: list[int]


class Task(NamedTuple):
    """What every implementation trains: a checkpoint on `steps + 1` batches. The first batch is not timed."""

    folder: str
    batches: list[list[Group]]
    steps: int
    max_length: int
    dtype: str


class Run(NamedTuple):
    """
    One run of an implementation.

    Attributes:
        seconds: time of the timed steps.
        losses: loss of each step, including the first, which is not timed.
        loaded_bytes, peak_bytes: peak memory of the process before and after training.
    """

    seconds: float
    losses: list[float]
    loaded_bytes: int
    peak_bytes: int


def train(name: str, task: Task) -> Run:
    """Trains with one implementation, in this process."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    clock = Clock()
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as output:
        arguments = {
            "output_dir": output,
            # The optimizer is the Trainer's default, AdamW.
            "learning_rate": 2e-5,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "max_steps": task.steps + 1,
            "per_device_train_batch_size": len(task.batches[0]),
            "bf16": task.dtype == "bfloat16",
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": SEED,
        }
        trainer = TRAINERS[name](task, arguments, losses)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        loaded_bytes = peak_memory("cpu")
        trainer.train()
    return Run(clock.ends[-1] - clock.ends[0], losses, loaded_bytes, peak_memory("cpu"))


class Clock(TrainerCallback):
    """Records the time at which each step ended, in seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def make_trainer(task: Task, arguments: dict[str, Any], losses: list[float], *, packing: bool) -> Trainer:
    """Returns this package's trainer. It appends the loss of each step to `losses`."""

    @wraps(ranknet)
    def recorded(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = ranknet(*args, **kwargs)
        losses.append(loss.item())
        return loss

    rows = [
        {"query": group.query, "pos_doc": group.passages[:1], "neg_doc": group.passages[1:]}
        for batch in task.batches
        for group in batch
    ]
    return CrossEncoderTrainer(
        LlamaBidirectionalForSequenceClassification.from_pretrained(task.folder, dtype=torch.float32),
        CrossEncoderTrainingArguments(**arguments, packing=packing, train_sampling_strategy="sequential"),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(task.folder),
        loss=recorded,
        group_size=len(rows[0]["neg_doc"]) + 1,
        negatives="first",
    )


def make_peer(
    task: Task, arguments: dict[str, Any], losses: list[float], *, mini_batch_size: int | None = None
) -> Trainer:
    """Returns the trainer of sentence-transformers. It appends the loss of each step to `losses`."""
    import sentence_transformers
    from datasets import Dataset
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.cross_encoder import losses as peer_losses

    model = sentence_transformers.CrossEncoder(
        task.folder,
        device="cpu",
        max_length=task.max_length,
        model_kwargs={"dtype": "float32"},
        activation_fn=torch.nn.Identity(),
    )
    columns: dict[str, list[Any]] = {"query": [], "docs": [], "labels": []}
    for batch in task.batches:
        for group in batch:
            halves = prompt_halves([(group.query, passage) for passage in group.passages])
            columns["query"].append(halves[0][0])
            columns["docs"].append([passage for _, passage in halves])
            columns["labels"].append([1.0] + [0.0] * (len(halves) - 1))
    loss = peer_losses.RankNetLoss(model, mini_batch_size=mini_batch_size)
    loss.register_forward_hook(lambda module, inputs, output: losses.append(output.item()))

    def in_order(dataset: Any, **kwargs: Any) -> DefaultBatchSampler:
        return DefaultBatchSampler(SequentialSampler(dataset), **kwargs)

    return sentence_transformers.CrossEncoderTrainer(
        model=model,
        args=sentence_transformers.CrossEncoderTrainingArguments(**arguments, batch_sampler=in_order),
        train_dataset=Dataset.from_dict(columns),
        loss=loss,
    )


TRAINERS: dict[str, Callable[[Task, dict[str, Any], list[float]], Trainer]] = {
    PACKED: partial(make_trainer, packing=True),
    PADDED: partial(make_trainer, packing=False),
    SENTENCE_TRANSFORMERS: make_peer,
    WHOLE_BATCH: partial(make_peer, mini_batch_size=-1),
}

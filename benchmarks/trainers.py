"""What `benchmarks.training` compares: the trainers of this package and of sentence-transformers, and a plain loop."""

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

from .flash import flash_implementation, kernel_name
from .machine import is_cuda, peak_memory
from .models import SEED
from .peers import REFERENCE, SENTENCE_TRANSFORMERS, export_for_unpadding, import_alone, prompt_halves, render

PACKED, PADDED = "llama-bidir", "llama-bidir, padded"
# sentence-transformers with mini_batch_size=-1, and the same without padding, by flash attention.
WHOLE_BATCH, UNPADDED = "ST, whole batch", "ST, unpadded"
PLAIN_LOOP = "reference, plain loop"
PEERS = (SENTENCE_TRANSFORMERS, WHOLE_BATCH, UNPADDED, PLAIN_LOOP)
LEARNING_RATE = 2e-5
SETTINGS = {
    PACKED: "packed, defaults",
    PADDED: "padded, the whole batch per forward pass",
    SENTENCE_TRANSFORMERS: "defaults: padded, {groups} pairs per forward pass",
    WHOLE_BATCH: "padded, mini_batch_size=-1: the whole batch per forward pass",
    UNPADDED: "unpadded, {kernel}, mini_batch_size=-1",
    PLAIN_LOOP: "padded, the whole batch per forward pass",
}


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
    device: str = "cpu"


class Run(NamedTuple):
    """
    One run of an implementation.

    Attributes:
        seconds: time of the timed steps.
        losses: loss of each step, including the first, which is not timed.
        loaded_bytes, peak_bytes: peak memory before and after training. On a CPU it is that of the process, and on CUDA
            that of the run.
    """

    seconds: float
    losses: list[float]
    loaded_bytes: int
    peak_bytes: int


def describe(name: str, task: Task) -> str:
    """Returns the setting of an implementation, in words."""
    return SETTINGS[name].format(kernel=kernel_name(task.device), groups=len(task.batches[0]))


def train(name: str, task: Task) -> Run:
    """Trains with one implementation, in this process."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    if is_cuda(task.device):
        torch.cuda.reset_peak_memory_stats(task.device)
    clock = Clock(task.device)
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as output:
        run = IMPLEMENTATIONS[name](task, output, losses, clock)
        loaded_bytes = peak_memory(task.device)
        run()
    return Run(clock.ends[-1] - clock.ends[0], losses, loaded_bytes, peak_memory(task.device))


class Clock(TrainerCallback):
    """Records the time at which the device has finished each step, in seconds."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if is_cuda(self.device):
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())


def prepare_trainer(
    task: Task, output: str, losses: list[float], clock: Clock, *, make: Callable[..., Trainer]
) -> Callable[[], Any]:
    """Returns the function that trains with a Trainer. It appends the loss of each step to `losses`."""
    arguments = {
        "output_dir": output,
        # The optimizer is the Trainer's default, AdamW.
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "max_steps": task.steps + 1,
        "per_device_train_batch_size": len(task.batches[0]),
        "bf16": task.dtype == "bfloat16",
        "use_cpu": not is_cuda(task.device),
        "dataloader_pin_memory": is_cuda(task.device),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }
    trainer = make(task, arguments, losses)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    return trainer.train


def prepare_loop(task: Task, output: str, losses: list[float], clock: Clock) -> Callable[[], None]:
    """Returns the function that trains NeMo AutoModel's class in a plain loop over padded batches, by AdamW."""
    module = import_alone(REFERENCE)
    model = module.LlamaBidirectionalForSequenceClassification.from_pretrained(task.folder, dtype=torch.float32)
    model.to(task.device).train()
    tokenizer = AutoTokenizer.from_pretrained(task.folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    autocast = partial(torch.autocast, torch.device(task.device).type, torch.bfloat16, enabled=task.dtype == "bfloat16")

    def run() -> None:
        for batch in task.batches[: task.steps + 1]:
            texts = [render(group.query, passage) for group in batch for passage in group.passages]
            inputs = tokenizer(texts, padding=True, return_tensors="pt").to(task.device)
            with autocast():
                logits = model(**inputs, return_dict=True).logits
            scores = logits.float().view(len(batch), -1)
            labels = torch.zeros_like(scores)
            labels[:, 0] = 1
            loss = ranknet(scores, labels)
            losses.append(loss.item())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clock.on_step_end()

    return run


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
    task: Task,
    arguments: dict[str, Any],
    losses: list[float],
    *,
    mini_batch_size: int | None = None,
    unpadded: bool = False,
) -> Trainer:
    """Returns the trainer of sentence-transformers. It appends the loss of each step to `losses`."""
    import sentence_transformers
    from datasets import Dataset
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.cross_encoder import losses as peer_losses

    attention = {"attn_implementation": flash_implementation(task.device)} if unpadded else {}
    model = sentence_transformers.CrossEncoder(
        export_for_unpadding(task.folder) if unpadded else task.folder,
        device=task.device,
        max_length=task.max_length,
        model_kwargs={"dtype": "float32", **attention},
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


IMPLEMENTATIONS: dict[str, Callable[[Task, str, list[float], Clock], Callable[[], Any]]] = {
    PACKED: partial(prepare_trainer, make=partial(make_trainer, packing=True)),
    PADDED: partial(prepare_trainer, make=partial(make_trainer, packing=False)),
    SENTENCE_TRANSFORMERS: partial(prepare_trainer, make=make_peer),
    WHOLE_BATCH: partial(prepare_trainer, make=partial(make_peer, mini_batch_size=-1)),
    UNPADDED: partial(prepare_trainer, make=partial(make_peer, mini_batch_size=-1, unpadded=True)),
    PLAIN_LOOP: prepare_loop,
}

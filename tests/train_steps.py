"""Trains a tiny reranker for an epoch whose last step is not full, and records what each step trains on.

Tests call `train_case`, and start this file with torchrun. Usage: train_steps.py CASES.json OUTPUT
"""

import gc
import json
import sys
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import ROWS, arguments, make_model, make_tokenizer
from safetensors.torch import save_file

from llama_bidir import CrossEncoderTrainer, CrossEncoderTrainingArguments
from llama_bidir.losses import listwise_cross_entropy
from llama_bidir.training.history import HistoryCallback
from llama_bidir.utils.launch import leave_process_group


def make_rows(count):
    """Rows of different lengths with one to three negatives. A row's teacher score is its number."""
    return [
        {
            **row,
            "pos_doc": [row["pos_doc"][0] + " clover" * (7 * number % 5)],
            "neg_doc": row["neg_doc"][: 1 + number % 3],
            "pos_score": [float(number)],
            "neg_score": [float(number)] * (1 + number % 3),
        }
        for number, row in enumerate(ROWS[:count])
    ]


class Stream:
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def train_case(case, output):
    """
    Trains for two epochs, or `max_steps`.

    Args:
        case: `rows` (their number), `stream`, and fields of CrossEncoderTrainingArguments.

    Returns:
        the sorted numbers of the rows of each step, the losses, and the weights.
    """
    fields = dict(case)
    rows, is_stream = make_rows(fields.pop("rows")), fields.pop("stream", False)
    steps = {}

    def loss(scores, labels, mask, teacher_scores):
        steps.setdefault(trainer.state.global_step, []).extend(teacher_scores[:, 0].int().tolist())
        return listwise_cross_entropy(scores, labels, mask)

    defaults = {"max_steps": -1, "num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0}
    trainer = CrossEncoderTrainer(
        make_model(),
        arguments(CrossEncoderTrainingArguments, output, **{**defaults, **fields}),
        Stream(rows) if is_stream else rows,
        processing_class=make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"),
        loss=loss,
        group_size=4,
    )
    trainer.remove_callback(HistoryCallback)  # drawing its plot takes longer than training
    trainer.train()
    found = [steps]
    if dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, steps)
    merged = [sorted(chain(*(each.get(step, []) for each in found))) for step in range(trainer.state.global_step)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return merged, losses, trainer.model.state_dict()


def main():
    cases, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    gc.freeze()  # the Trainer collects garbage after each run
    for name, case in cases.items():
        steps, losses, state = train_case(case, output / name)
        if not dist.is_initialized() or dist.get_rank() == 0:
            (output / f"{name}.json").write_text(json.dumps([steps, losses]))
            save_file(state, output / f"{name}.safetensors")
    if dist.is_initialized():
        dist.barrier()  # the others may still read from this process
    leave_process_group()


if __name__ == "__main__":
    main()

"""Trains a tiny reranker. Tests start it as a separate process, directly or with torchrun.

Usage: train_tiny.py BASE TRAIN EVAL OUTPUT [KEY=JSON ...], with fields of CrossEncoderTrainingArguments.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from helpers import arguments
from transformers import Trainer, TrainerCallback

from llama_bidir.training import CrossEncoderTrainingArguments, DataArguments, ModelArguments, train
from llama_bidir.training import run as training_run
from llama_bidir.utils.launch import leave_process_group


class SlowSteps(TrainerCallback):
    """Makes steps so slow that a kill can hit any of them."""

    def on_step_end(self, *args, **kwargs):
        time.sleep(float(os.environ.get("STEP_SECONDS", 0)))


class SlowTrainer(training_run.CrossEncoderTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(SlowSteps())


def allow_fsdp_on_cpus():
    """Makes the Trainer shard between processes on CPUs. torch can do that, but accelerate asks for accelerators."""
    create = Trainer.create_accelerator_and_postprocess

    def create_with_fsdp(self):
        create(self)
        state = self.accelerator.state
        if self.args.fsdp_plugin_args is not None and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    Trainer.create_accelerator_and_postprocess = create_with_fsdp


def main():
    base, train_rows, eval_rows, output, *fields = sys.argv[1:]
    torch.set_num_threads(1)
    allow_fsdp_on_cpus()
    torch.manual_seed(0)
    training_run.CrossEncoderTrainer = SlowTrainer
    given = {name: json.loads(value) for name, value in (field.split("=", 1) for field in fields)}
    given = {"global_batch_size": 4, "per_device_train_batch_size": 2, "max_steps": 8, **given}
    trainer = train(
        ModelArguments(model_name_or_path=base),
        DataArguments(
            train=[train_rows],
            eval=[eval_rows],
            group_size=3,
            eval_rerank=[{"name": "tiny", "path": os.environ["COLLECTION"]}] if "COLLECTION" in os.environ else [],
        ),
        arguments(CrossEncoderTrainingArguments, output, eval_strategy="steps", eval_steps=4, **given),
    )
    if trainer.is_world_process_zero():
        Path(output, "log_history.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main()
    leave_process_group()

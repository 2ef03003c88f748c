"""Training on a CUDA device: Liger, QLoRA, DeepSpeed ZeRO-3 and FSDP2, each against a plain run on the same device."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from helpers import ROWS, write

from llama_bidir import CrossEncoder
from llama_bidir.training import read_history

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ZERO_3 = {
    "zero_optimization": {"stage": 3, "overlap_comm": True, "stage3_gather_16bit_weights_on_model_save": True},
    "bf16": {"enabled": "auto"},
    "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
}
# Two processes share one device, which NCCL refuses.
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture
def train(base_checkpoint, tmp_path, monkeypatch):
    """Trains 4 steps in a process of its own. Returns the losses and the scores of the trained reranker."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))

    def train(output, *, launcher=(), dtype="float32", lora=None, model=None, **training):
        recipe = {
            "model": {"model_name_or_path": str(base_checkpoint), "dtype": dtype, **(model or {})},
            "data": {"train": ["rows.jsonl"], "group_size": 3},
            "training": {"output_dir": output, "max_steps": 4, "learning_rate": 1e-3, "warmup_steps": 0}
            | {"logging_steps": 1, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 2}
            | training,
            **({} if lora is None else {"lora": lora}),
        }
        write(tmp_path / f"{output}.yaml", yaml.safe_dump(recipe))
        command = [sys.executable, *launcher, "-m", "llama_bidir", "train", f"{output}.yaml"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        losses = [entry["loss"] for entry in read_history(tmp_path / output / "history.jsonl") if "loss" in entry]
        assert len(losses) == 4
        scores = CrossEncoder(tmp_path / output, device="cuda", dtype="float32").predict(
            [(row["query"], text) for row in ROWS[:4] for text in row["neg_doc"]]
        )
        assert np.isfinite(scores).all()
        return losses, scores

    return train


def test_liger_trains_as_transformers_does(train):
    pytest.importorskip("liger_kernel")
    plain, fused = train("plain"), train("liger", use_liger_kernel=True)
    np.testing.assert_allclose(fused[0], plain[0], rtol=1e-3)
    np.testing.assert_allclose(fused[1], plain[1], rtol=1e-2, atol=1e-2)


def test_qlora_trains_about_as_lora_does(train):
    pytest.importorskip("bitsandbytes")
    lora = {"r": 8}
    whole = train("lora", lora=lora, dtype="bfloat16", bf16=True)
    quantized = train("qlora", lora=lora, dtype="bfloat16", bf16=True, model={"load_in_4bit": True})
    np.testing.assert_allclose(quantized[0], whole[0], rtol=0.2)


def test_deepspeed_trains_as_one_process_does(train, tmp_path):
    pytest.importorskip("deepspeed")
    write(tmp_path / "zero3.json", json.dumps(ZERO_3))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    plain, sharded = train("plain"), train("zero3", launcher=launcher, deepspeed="zero3.json")
    np.testing.assert_allclose(sharded[0], plain[0], rtol=1e-3)
    np.testing.assert_allclose(sharded[1], plain[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("state_dict_type", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_fsdp2_with_two_processes_trains_as_one_does(train, state_dict_type):
    plain = train("plain", global_batch_size=4, per_device_train_batch_size=4)
    sharded = train(
        "fsdp2",
        launcher=TWO_PROCESSES,
        ddp_backend="gloo",
        fsdp=True,
        fsdp_config={"version": 2, "state_dict_type": state_dict_type},
        global_batch_size=4,
    )
    np.testing.assert_allclose(sharded[0], plain[0], rtol=1e-4)
    np.testing.assert_allclose(sharded[1], plain[1], rtol=1e-3, atol=1e-3)

"""Training that is interrupted while it runs, in real processes."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers import ROWS

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from llama_bidir import CrossEncoder

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")


@pytest.fixture
def command(base_checkpoint, tmp_path):
    """Returns a function that makes the command for a run that saves a checkpoint at each of its 60 steps."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": {"model_name_or_path": str(base_checkpoint)},
                "data": {"train": [str(rows)]},
                "training": {
                    "output_dir": str(tmp_path / "out"),
                    "max_steps": 60,
                    "global_batch_size": 4,
                    "per_device_train_batch_size": 2,
                    "save_steps": 1,
                    "save_total_limit": 2,
                    "use_cpu": True,
                    "report_to": "none",
                    "dataloader_num_workers": 1,
                },
            }
        )
    )

    def make(*launcher):
        return [sys.executable, "-m", *launcher, "llama_bidir", "train", str(recipe)]

    return make


def interrupt(command, output, number, log):
    """
    Starts a command in a process group of its own, and sends a signal to the group as a terminal does, after the second
    checkpoint.

    Returns:
        the exit status. All processes of the command have ended.
    """
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
        try:
            while process.poll() is None and not (output / "checkpoint-2").exists():
                time.sleep(0.005)
            started = psutil.Process(process.pid).children(recursive=True)
            for each in [psutil.Process(process.pid), *started]:
                if number == signal.SIGINT or each.pid == process.pid:
                    each.send_signal(number)
            status = process.wait(timeout=120)
        finally:
            process.kill()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert alive == []
    return status


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_and_resumes(number, command, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    assert interrupt(command(), output, number, log) == 130
    assert log.read_text().splitlines().count("interrupted") == 1
    assert "Traceback" not in log.read_text()
    assert not (output / "config.json").exists()
    resumed = subprocess.run(command(), capture_output=True, text=True, check=True)
    assert "resuming from" in resumed.stderr
    assert json.loads((output / "checkpoint-60" / "trainer_state.json").read_text())["global_step"] == 60
    assert CrossEncoder(output).config.model_type == "llama_bidirec"


@pytest.mark.slow
def test_interrupted_processes_of_torchrun_end(command, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    assert interrupt(command(*TORCHRUN), output, signal.SIGINT, log) != 0
    assert "interrupted" in log.read_text().splitlines()
    assert "llama-bidir: error" not in log.read_text()
    assert not (output / "config.json").exists()

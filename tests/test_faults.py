"""A bounded share of `python -m tests.faults`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("peft")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script kills forked processes")
def test_a_fault_while_saving_leaves_the_old_checkpoint_or_the_new_one():
    paths = ["cross_encoder", "adapter over a whole model", "in place", "trainer"]
    command = [sys.executable, "-m", "tests.faults", "--kills", "5", "--steps", "2", "--only", *paths]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert [line.split("kill -9")[0].strip() for line in lines[:-1]] == paths
    assert lines[-1] == "0 wrong outcomes"

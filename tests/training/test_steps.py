import itertools
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from train_steps import make_rows, train_case

from llama_bidir.data import GroupDataset, Grouping
from llama_bidir.training import CrossEncoderTrainingArguments
from llama_bidir.training.sampling import EpochSampler
from llama_bidir.training.steps import Steps

SCRIPT = Path(__file__).parents[1] / "train_steps.py"
LENGTHS = {"train_sampling_strategy": "group_by_length"}
STREAM = {"stream": True, "max_steps": 4}
CASES = {
    "shuffled": {"rows": 13},
    "one_group_left": {"rows": 9},  # the other processes have none
    "fewer_groups_than_a_step": {"rows": 5},
    "drop_last": {"rows": 13, "dataloader_drop_last": True},
    "lengths": {"rows": 13, **LENGTHS},
    "padded": {"rows": 13, "packing": False},
    "stream": {"rows": 13, **STREAM},
    "stream_drop_last": {"rows": 13, **STREAM, "dataloader_drop_last": True},
}


def sizes(case):
    """The groups of each step."""
    full, rest = divmod(case["rows"], 8)
    epoch = [8] * full + [rest] * (not case.get("dataloader_drop_last"))
    return (epoch * 4)[: case.get("max_steps", 2 * len(epoch))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Returns the steps, losses and weights of a case in one process, all groups of a step in one batch."""

    @cache
    def run(name, groups_per_step=8):
        return train_case(
            {**CASES[name], "per_device_train_batch_size": groups_per_step}, tmp_path_factory.mktemp(name)
        )

    return run


def assert_equal(name, found, expected):
    steps, losses, state = found
    expected_steps, expected_losses, expected_state = expected
    assert steps == expected_steps, name
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, err_msg=name)
    for key, weight in expected_state.items():
        torch.testing.assert_close(state[key], weight, rtol=0, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", CASES)
def test_an_epoch_shows_each_group_once(name, alone):
    case = CASES[name]
    steps, _, _ = alone(name)
    assert [len(set(step)) for step in steps] == [len(step) for step in steps] == sizes(case)
    epoch = -(-case["rows"] // 8) - case.get("dataloader_drop_last", False)
    for start in range(0, len(steps), epoch):
        groups = [*itertools.chain(*steps[start : start + epoch])]
        assert len(set(groups)) == len(groups)
    if not case.get("stream") and name != "lengths":
        dataset = GroupDataset([(make_rows(case["rows"]), 1.0)], Grouping(group_size=4, seed=3))
        order = list(EpochSampler(dataset, seed=3))
        assert steps[0] == sorted(order[:8])


@pytest.mark.parametrize("name", CASES)
def test_accumulated_batches_make_the_same_steps(name, alone, tmp_path):
    for size, accumulation in ((4, 2), (2, 4), (1, 8)):
        fields = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        assert_equal(name, train_case({**CASES[name], **fields}, tmp_path), alone(name))


@pytest.mark.parametrize(
    "processes", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_processes_make_the_same_steps(processes, alone, tmp_path):
    splits = {2: [(4, 1), (2, 2)], 3: [(1, 2)], 4: [(2, 1)]}[processes]
    runs = {
        f"{name}-{accumulation}": (
            name,
            processes * size * accumulation,
            {**CASES[name], "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation},
        )
        for name in CASES
        for size, accumulation in splits
    }
    (tmp_path / "cases.json").write_text(json.dumps({run: fields for run, (_, _, fields) in runs.items()}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(SCRIPT), str(tmp_path / "cases.json"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert result.returncode == 0, result.stderr
    for run, (name, groups_per_step, _) in runs.items():
        steps, losses = json.loads((tmp_path / f"{run}.json").read_text())
        assert_equal(run, (steps, losses, load_file(tmp_path / f"{run}.safetensors")), alone(name, groups_per_step))


def test_groups_are_dealt_evenly():
    steps = Steps(batch_size=4, processes=2, accumulation=2, drop_last=False)
    assert list(steps.deal(range(8), None)) == list(range(8))
    assert list(steps.deal(range(13), None)) == [*range(8), 8, 9, 10, None, 11, 12, None, None]
    assert list(steps.deal(range(1), None)) == [0, None, None, None, None, None, None, None]
    assert [steps.num_places(count) for count in (8, 13, 1, 16)] == [8, 16, 8, 16]
    assert [steps.count(count) for count in (8, 13, 1, 16, 17)] == [1, 1, 1, 1, 2]
    alone = Steps(batch_size=4, processes=1, accumulation=4, drop_last=False)
    assert list(alone.deal(range(13), None)) == list(range(13))
    dropping = Steps(batch_size=4, processes=2, accumulation=2, drop_last=True)
    assert list(dropping.deal(range(35), None)) == list(range(32))
    assert dropping.num_places(35) == 32


@pytest.mark.parametrize("stream", [False, True])
def test_dropping_all_groups_is_refused(stream, tmp_path):
    case = {"rows": 7, "stream": stream, "max_steps": 1, "per_device_train_batch_size": 4, "dataloader_drop_last": True}
    with pytest.raises(ValueError, match="leaves out all 7 groups, because a step has 8: set it to false, or make"):
        train_case({**case, "gradient_accumulation_steps": 2}, tmp_path)


@pytest.mark.parametrize("name", ["dispatch_batches", "split_batches"])
def test_batches_are_not_split_between_processes(name, tmp_path):
    with pytest.raises(ValueError, match=f"accelerator_config.{name} would split a batch between processes"):
        CrossEncoderTrainingArguments(str(tmp_path), accelerator_config={name: True}, use_cpu=True)

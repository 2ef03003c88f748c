import os
import subprocess
import sys
from pathlib import Path

import pytest

from llama_bidir import __version__
from llama_bidir.cli import main
from llama_bidir.utils.launch import WAIT_VARIABLES, check_launch, launch_number


def test_an_empty_variable_is_unset(monkeypatch):
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("LOCAL_RANK", " ")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert [launch_number(name, 7) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == [7, 7, 4]
    check_launch()
    assert [os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == [None, None, "4"]


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE"])
def test_a_variable_that_is_not_a_number_is_one_line(name, monkeypatch, capsys):
    monkeypatch.setenv(name, "first")
    assert main(["recipes"]) == 2
    assert capsys.readouterr().err == (
        f"llama-bidir: error: the environment variable {name} must be a whole number, got 'first': unset it, or start "
        "with torchrun\n"
    )


def test_training_arguments_read_the_variables(monkeypatch, tmp_path):
    pytest.importorskip("accelerate")
    from llama_bidir import CrossEncoderTrainingArguments

    monkeypatch.setenv("LOCAL_RANK", "")
    assert CrossEncoderTrainingArguments(str(tmp_path), use_cpu=True).process_index == 0
    monkeypatch.setenv("LOCAL_RANK", "one")
    with pytest.raises(ValueError, match="the environment variable LOCAL_RANK must be a whole number, got 'one'"):
        CrossEncoderTrainingArguments(str(tmp_path), use_cpu=True)


GROUP = """
import os, sys, threading
import torch, torch.distributed as dist
from llama_bidir.utils.launch import leave_process_group

def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
before = count()
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
cycle = [torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))]
cycle.append(cycle)
cycle[0](torch.ones(1, 2)).sum().backward()
with_group = count()
del cycle
leave_process_group()
print(before < with_group, count() - before, dist.is_initialized())
leave_process_group()
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads by /proc")
def test_no_thread_of_gloo_outlives_the_group(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", GROUP, str(tmp_path / "store")], capture_output=True, text=True, check=False
    )
    assert (result.stdout, result.returncode) == ("True 0 False\n", 0), result.stderr


COMMANDS = {
    "module": ["-m", "llama_bidir"],
    "one word": ["-W", "error", "-mllama_bidir"],
    "script": [str(Path(sys.executable).with_name("llama-bidir"))],
}
OTHERS = {
    "code": ["-c", "import llama_bidir"],
    "module": ["-m", "other", "-m", "llama_bidir"],
    "script": ["script.py", "llama-bidir"],
}


def environment(**variables):
    """The environment of a user: that of the tests without the variables of OpenMP."""
    return {name: value for name, value in os.environ.items() if name not in WAIT_VARIABLES} | variables


@pytest.fixture
def stub(tmp_path):
    """A `transformers` that, when imported, prints how threads wait and ends the process before torch is imported."""
    (tmp_path / "other").mkdir()
    for name in ("script.py", "other/__init__.py", "other/__main__.py"):
        (tmp_path / name).write_text("import llama_bidir")
    # One write, so the lines of two processes do not mix.
    names = "('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')"
    report = f"os.write(1, ('/'.join(str(os.environ.get(name)) for name in {names}) + chr(10)).encode())"
    (tmp_path / "transformers.py").write_text(f"import os\n{report}\nraise SystemExit")
    return tmp_path


def policies(arguments, path, **variables):
    variables["PYTHONPATH"] = os.pathsep.join([str(path), str(Path(__file__).parents[2])])
    result = subprocess.run(
        [sys.executable, *arguments], cwd=path, env=environment(**variables), capture_output=True, text=True, check=True
    )
    return result.stdout.split()


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_command_waits_passively_before_torch_is_imported(arguments, stub):
    assert policies([*arguments, "recipes"], stub) == ["PASSIVE/10000"]
    assert policies(arguments, stub, OMP_WAIT_POLICY="ACTIVE") == ["ACTIVE/None"]
    assert policies(arguments, stub, GOMP_SPINCOUNT="1000") == ["None/1000"]


@pytest.mark.parametrize("arguments", OTHERS.values(), ids=OTHERS)
def test_an_import_leaves_the_environment_alone(arguments, stub):
    assert policies(arguments, stub) == ["None/None"]


def test_processes_of_torchrun_wait_passively(stub):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llama_bidir"]
    assert policies(torchrun, stub) == ["PASSIVE/10000", "PASSIVE/10000"]


def test_the_module_runs_and_openmp_reads_the_policy():
    command = [sys.executable, "-m", "llama_bidir", "--version"]
    result = subprocess.run(
        command, env=environment(OMP_DISPLAY_ENV="VERBOSE"), capture_output=True, text=True, check=True
    )
    assert result.stdout == f"llama-bidir {__version__}\n"
    if sys.platform == "linux":  # torch comes with another OpenMP elsewhere
        assert "GOMP_SPINCOUNT = '10000'" in result.stderr

"""Scoring in several processes: worker devices, and ranks under torchrun."""

import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from llama_bidir import CrossEncoder
from llama_bidir.scoring.device import local_rank
from llama_bidir.scoring.distributed import is_shared
from llama_bidir.utils.sharing import deal

PAIRS = [(f"query {number % 7}", f"{'bees ' * (number % 11)}{number}") for number in range(60)]


@pytest.fixture(scope="module")
def single(reranker_checkpoint):
    return CrossEncoder(reranker_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def pooled(reranker_checkpoint):
    reranker = CrossEncoder(reranker_checkpoint, device=["cpu", "cpu"])
    yield reranker
    reranker.close()


@pytest.mark.slow
def test_worker_devices_give_the_same_scores_with_one_start(single, pooled):
    expected = single.predict(PAIRS)
    np.testing.assert_allclose(pooled.predict(PAIRS), expected, rtol=1e-5, atol=1e-6)
    pool = pooled.engine()
    workers = [process.pid for process in pool._processes]
    np.testing.assert_allclose(pooled.predict(iter(PAIRS), batch_size=3), expected, rtol=1e-5, atol=1e-6)
    assert pooled.predict(PAIRS[:1]).shape == (1,)
    assert pooled.predict([]).shape == (0,)
    ranking = pooled.rank("query 1", [passage for _, passage in PAIRS], top_k=5)
    assert [result["corpus_id"] for result in ranking] == [
        result["corpus_id"] for result in single.rank("query 1", [passage for _, passage in PAIRS], top_k=5)
    ]
    assert [process.pid for process in pooled.engine()._processes] == workers


@pytest.mark.slow
def test_devices_of_a_call(reranker_checkpoint, single):
    reranker = CrossEncoder(reranker_checkpoint, device="cpu")
    np.testing.assert_allclose(reranker.predict(PAIRS, device=["cpu"]), single.predict(PAIRS), rtol=1e-5, atol=1e-6)
    processes = reranker.engine()._processes
    assert len(processes) == 1
    np.testing.assert_allclose(reranker.predict(PAIRS, device="cpu"), single.predict(PAIRS), rtol=1e-5, atol=1e-6)
    assert not processes[0].is_alive()


@pytest.mark.slow
def test_an_error_of_a_worker_comes_with_its_traceback_and_the_next_call_starts_anew(pooled, single):
    encoded = [[1, 2, 3], [10**6]]  # no such token
    with pytest.raises(RuntimeError, match=r"the worker on cpu failed: Traceback [\s\S]*IndexError: index"):
        pooled.engine().logits(encoded)
    np.testing.assert_allclose(pooled.predict(PAIRS), single.predict(PAIRS), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("is_busy", [False, True])
def test_a_worker_that_dies_is_told_and_does_not_hang(pooled, single, is_busy):
    pool = pooled.engine()
    victim = pool._processes[1]

    def kill(tokens=0):
        os.kill(victim.pid, signal.SIGKILL)

    if not is_busy:
        kill()
        victim.join()
    with pytest.raises(RuntimeError, match="the worker on cpu failed: its process ended with exit code -9"):
        pool.logits([[number % 300] * 50 for number in range(2000)], on_tokens=kill)
    np.testing.assert_allclose(pooled.predict(PAIRS), single.predict(PAIRS), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_an_error_between_two_batches_leaves_no_answer_behind(pooled, single):
    def fail(tokens):
        raise KeyError(tokens)

    with pytest.raises(KeyError):
        pooled.engine().logits([[number % 300] * 50 for number in range(200)], on_tokens=fail)
    np.testing.assert_allclose(pooled.predict(PAIRS), single.predict(PAIRS), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_bar_that_scores_on_the_same_workers_is_told(pooled, single):
    with pytest.raises(RuntimeError, match="worker processes score one call at a time: do not score within a progress"):
        pooled.engine().logits(
            [[number % 300] * 50 for number in range(200)], on_tokens=lambda tokens: pooled.predict(PAIRS)
        )
    np.testing.assert_allclose(pooled.predict(PAIRS), single.predict(PAIRS), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_copies_have_workers_of_their_own(pooled, single):
    workers = [process.pid for process in pooled.engine()._processes]
    copied = pickle.loads(pickle.dumps(pooled))
    assert copied.devices == pooled.devices
    np.testing.assert_allclose(copied.predict(PAIRS), single.predict(PAIRS), rtol=1e-5, atol=1e-6)
    copied.close()
    assert [process.pid for process in pooled.engine()._processes] == workers


@pytest.mark.slow
def test_threads_share_a_pool(pooled, single):
    with ThreadPoolExecutor(4) as threads:
        scores = list(threads.map(lambda start: pooled.predict(PAIRS[start:]), range(8)))
    for start, part in enumerate(scores):
        np.testing.assert_allclose(part, single.predict(PAIRS[start:]), rtol=1e-5, atol=1e-6)


def test_devices_are_checked(model, tokenizer):
    with pytest.raises(ValueError, match="device must name at least one device, got an empty list"):
        CrossEncoder(model, tokenizer, device=[])
    for device in ("typo", ["cpu", "typo"], 1.5):
        with pytest.raises(ValueError, match=r"device ('typo'|1.5) is not one that torch knows"):
            CrossEncoder(model, tokenizer, device=device)


def test_shares_hold_every_pair_once_and_like_amounts_of_text():
    pairs = [("q", "x" * (number * 37 % 500)) for number in range(101)]
    for world_size in (1, 2, 3, 8):
        shares = deal([sum(map(len, pair)) for pair in pairs], world_size)
        assert len(shares) == world_size
        assert sorted(index for share in shares for index in share) == list(range(101))
        sizes = [sum(len(pairs[index][1]) for index in share) for share in shares]
        assert max(sizes) - min(sizes) <= 500


RANK_SCRIPT = """
import os, sys
import numpy as np
from llama_bidir import CrossEncoder
from llama_bidir.scoring.engine import LocalEngine

folder, output, *tasks = sys.argv[1:]
rank = os.environ["RANK"]
LocalEngine.chunk_pairs = 8
for task in tasks:
    pairs = [(f"query {number % 7}", f"{'bees ' * (number % 11)}{number}") for number in range(60)]
    reranker = CrossEncoder(folder, device="cpu", distributed=task != "alone")
    scored = []
    forward = reranker.engine()._forward
    reranker.engine()._forward = lambda ids, *args: scored.append(len(ids)) or forward(ids, *args)
    if task == "other pairs" and rank == "1":
        pairs = pairs[:30]
    if task == "alone" and rank == "1":
        pairs = pairs[:3]
    if task == "failure" and rank == "1":
        reranker.engine()._forward = lambda *args: 1 / 0
    np.savez(f"{output}/{task}-{rank}.npz", scores=reranker.predict(iter(pairs)), scored=sum(scored))
"""


ABSENT_SCRIPT = """
import os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from llama_bidir import CrossEncoder
from llama_bidir.scoring import distributed

folder, output, task = sys.argv[1:]
rank, pairs = int(os.environ["RANK"]), [("bees", "clover"), ("bees", "sun")]
if task == "joined by us":
    distributed.TIMEOUT = timedelta(seconds=10)
else:
    dist.init_process_group("gloo", timeout=timedelta(seconds=10))
reranker = CrossEncoder(folder, device="cpu", distributed=True)
if task == "second call":
    reranker.predict(pairs)
try:
    if rank == 0:
        reranker.rank("bees", ["clover", "sun"])
    elif task == "other call":
        dist.all_reduce(torch.ones(2))
    else:
        while not os.path.exists(f"{output}/{task}-0.txt"):
            time.sleep(0.1)
except Exception as error:
    with open(f"{output}/{task}-{rank}.txt", "w") as file:
        file.write(f"{type(error).__name__}: {error}")
os._exit(0)
"""


def run_ranks(tmp_path, folder, *tasks, source=RANK_SCRIPT):
    script = tmp_path / "script.py"
    script.write_text(source)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--standalone", str(script), str(folder), str(tmp_path), *tasks],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )


@pytest.mark.slow
def test_ranks_share_the_pairs_and_all_get_all_scores(tmp_path, reranker_checkpoint, single):
    result = run_ranks(tmp_path, reranker_checkpoint, "alone", "shared")
    assert result.returncode == 0, result.stderr
    expected = single.predict(PAIRS)
    for task, expected_of in (("alone", [expected, expected[:3]]), ("shared", [expected, expected])):
        outputs = [np.load(tmp_path / f"{task}-{rank}.npz") for rank in (0, 1)]
        if task == "alone":
            assert [int(output["scored"]) for output in outputs] == [60, 3]
        else:
            assert sum(int(output["scored"]) for output in outputs) == 60
            assert min(int(output["scored"]) for output in outputs) > 20
        for output, values in zip(outputs, expected_of, strict=True):
            np.testing.assert_allclose(output["scores"], values, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "messages"),
    [
        ("other pairs", ["every process must score the same pairs"]),
        ("failure", ["ZeroDivisionError: division by zero", "RuntimeError: process 1 failed: ZeroDivisionError"]),
    ],
)
def test_ranks_fail_together(tmp_path, reranker_checkpoint, task, messages):
    result = run_ranks(tmp_path, reranker_checkpoint, task)
    assert result.returncode != 0
    for message in messages:
        assert message in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("task", ["second call", "other call", "joined by us"])
def test_a_call_that_the_other_process_does_not_make_ends_with_an_error(tmp_path, reranker_checkpoint, task):
    result = run_ranks(tmp_path, reranker_checkpoint, task, source=ABSENT_SCRIPT)
    assert result.returncode == 0, result.stderr
    error = (tmp_path / f"{task}-0.txt").read_text()
    assert error.startswith(
        "RuntimeError: process 0 waited for the other processes, but one of them ended or did not make the same call "
        "within 0:00:10: with distributed=True every process must make the same calls. Make this call in all of "
    )


def test_the_number_of_a_process_may_be_unset_or_empty(monkeypatch):
    for value, number in (("3", 3), ("", 0), (" ", 0), ("-1", 0)):
        monkeypatch.setenv("LOCAL_RANK", value)
        assert local_rank() == number
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(ValueError, match="the environment variable LOCAL_RANK must be a whole number, got 'first'"):
        local_rank()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    for value in ("", "1"):
        monkeypatch.setenv("WORLD_SIZE", value)
        assert not is_shared(torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="the environment variable WORLD_SIZE must be a whole number, got 'many'"):
        is_shared(torch.device("cpu"))

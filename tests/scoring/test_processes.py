"""Rerankers in other processes: pickled, forked, interrupted."""

import copy
import os
import pickle
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from helpers import make_model
from tqdm.auto import tqdm

from llama_bidir import CrossEncoder
from llama_bidir.scoring.engine import LocalEngine, side_by_side
from llama_bidir.scoring.forks import Lock

PAIRS = [(f"query {number % 7}", f"{'bees ' * (number % 11)}{number}") for number in range(60)]
COPIES = [lambda reranker: pickle.loads(pickle.dumps(reranker)), copy.deepcopy, copy.copy]


def run_script(tmp_path, source, *arguments, threads="2"):
    """Runs a script as the leader of a group of processes, which are all stopped afterwards."""
    script = tmp_path / "script.py"
    script.write_text(source)
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        pytest.fail(f"the script hangs:\n{output}\n{errors}")
    return process.returncode, output, errors


@pytest.mark.parametrize("make_copy", COPIES, ids=["pickle", "deepcopy", "copy"])
def test_copies_score_alike(model, tokenizer, make_copy):
    model.train()
    reranker = CrossEncoder(
        model,
        tokenizer,
        activation_fn=torch.sigmoid,
        max_length=40,
        prompt_template="{passage} ? {query}",
        long_document="max",
        max_tokens_per_batch=200,
    )
    expected = reranker.predict(PAIRS)
    copied = make_copy(reranker)
    np.testing.assert_array_equal(copied.predict(PAIRS), expected)
    assert copied.model.training
    assert copied.rank("bees", ["a", "b"]) == reranker.rank("bees", ["a", "b"])
    assert (copied.model is model) == (make_copy is copy.copy)
    copied.model = make_model(seed=5)
    assert not np.allclose(copied.predict(PAIRS), expected)
    np.testing.assert_array_equal(reranker.predict(PAIRS), expected)


@pytest.mark.parametrize("kind", ["adapter", "eager", "int8"])
def test_copies_of_every_kind_of_model_score_alike(reranker_checkpoint, tokenizer, kind):
    if kind == "adapter":
        peft = pytest.importorskip("peft")
        adapted = peft.get_peft_model(
            make_model(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["score"], init_lora_weights=False)
        )
        reranker = CrossEncoder(adapted, tokenizer)
    elif kind == "eager":
        reranker = CrossEncoder(reranker_checkpoint, model_kwargs={"attn_implementation": "eager"})
    else:
        quantization = pytest.importorskip("torchao.quantization")
        quantized = make_model()
        quantization.quantize_(quantized.model, quantization.Int8WeightOnlyConfig())
        reranker = CrossEncoder(quantized, tokenizer)
    expected = reranker.predict(PAIRS)
    others = [pytest.importorskip(name) for name in ("cloudpickle", "dill")]  # of Ray, of datasets
    made = [make_copy(reranker) for make_copy in COPIES[kind == "int8" :]]  # torchao's modules need one of the others
    for copied in [*made, *(pickle.loads(other.dumps(reranker)) for other in others)]:
        np.testing.assert_allclose(copied.predict(PAIRS), expected, rtol=1e-6, atol=1e-7)


TRAVEL_SCRIPT = """
import multiprocessing, sys
import datasets
import numpy as np
from llama_bidir import CrossEncoder

PAIRS = [(f"query {number % 7}", f"{'bees ' * (number % 11)}{number}") for number in range(60)]


def score(reranker, pairs):
    return reranker.predict(pairs)


if __name__ == "__main__":
    reranker = CrossEncoder(sys.argv[1], device="cpu")
    expected = reranker.predict(PAIRS)
    for method in ("spawn", "fork"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            parts = pool.starmap(score, [(reranker, PAIRS[:30]), (reranker, PAIRS[30:])])
        np.testing.assert_allclose(np.concatenate(parts), expected, rtol=1e-5, atol=1e-6)
        print(method)
    rows = datasets.Dataset.from_dict({"query": [q for q, _ in PAIRS], "passage": [p for _, p in PAIRS]})
    scored = rows.map(
        lambda batch: {"score": reranker.predict(list(zip(batch["query"], batch["passage"])))},
        batched=True, batch_size=10, num_proc=2,
    )
    np.testing.assert_allclose(scored["score"], expected, rtol=1e-5, atol=1e-6)
    print("datasets")
"""


@pytest.mark.slow
def test_a_reranker_travels_to_pools_and_to_a_map_in_processes(tmp_path, reranker_checkpoint):
    pytest.importorskip("datasets")
    status, output, errors = run_script(tmp_path, TRAVEL_SCRIPT, reranker_checkpoint)
    assert (status, output.split()) == (0, ["spawn", "fork", "datasets"]), errors


FORK_SCRIPT = """
import os, signal, sys, threading, time
import numpy as np
from llama_bidir import CrossEncoder

PAIRS = [(f"query {number % 7}", f"{'bees ' * (number % 11)}{number}") for number in range(200)]
folder = sys.argv[1]
plain = CrossEncoder(folder, device="cpu")
padded = CrossEncoder(folder, device="cpu", model_kwargs={"attn_implementation": "eager"})
expected = plain.predict(PAIRS)


def score(reranker):
    while True:
        reranker.predict(PAIRS)


for reranker in (plain, padded):
    threading.Thread(target=score, args=[reranker], daemon=True).start()
for kind in ["plain", "padded", "new"] * 7:
    time.sleep(0.01)
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        scorer = {"plain": plain, "padded": padded}.get(kind) or CrossEncoder(folder, device="cpu")
        tolerance = 1e-5 * np.abs(expected).max()  # some scores are near 0
        same = np.allclose(scorer.predict(PAIRS), expected, rtol=0, atol=tolerance)
        alone = np.allclose(scorer.predict(PAIRS[0]), expected[0], rtol=0, atol=tolerance)
        os._exit(0 if same and alone else 1)
    print(kind, os.waitpid(child, 0)[1], flush=True)
os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_fork_while_another_thread_scores_can_score(tmp_path, reranker_checkpoint):
    status, output, errors = run_script(tmp_path, FORK_SCRIPT, reranker_checkpoint)
    assert (status, output.splitlines()) == (0, ["plain 0", "padded 0", "new 0"] * 7), errors


WORKERS_FORK_SCRIPT = """
import os, sys
import numpy as np
from llama_bidir import CrossEncoder

PAIRS = [(f"query {number % 7}", f"{'bees ' * (number % 11)}{number}") for number in range(60)]

if __name__ == "__main__":
    reranker = CrossEncoder(sys.argv[1], device=["cpu"])
    expected = reranker.predict(PAIRS)
    workers = [process.pid for process in reranker.engine()._processes]
    for kind in ("idle", "scores"):
        child = os.fork()
        if child == 0:
            if kind == "scores":
                assert np.allclose(reranker.predict(PAIRS), expected, rtol=1e-5, atol=1e-6)
                assert workers != [process.pid for process in reranker.engine()._processes]
            sys.exit(0)  # with everything that Python does at exit
        assert os.waitpid(child, 0)[1] == 0
        assert np.allclose(reranker.predict(PAIRS), expected, rtol=1e-5, atol=1e-6)
        assert workers == [process.pid for process in reranker.engine()._processes]
        print(kind)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_neither_uses_nor_stops_the_workers_of_its_parent(tmp_path, reranker_checkpoint):
    status, output, errors = run_script(tmp_path, WORKERS_FORK_SCRIPT, reranker_checkpoint)
    assert (status, output.split()) == (0, ["idle", "scores"]), errors


class FailingBar(tqdm):
    """Raises an error as soon as pairs are scored."""

    def update(self, n=1):
        raise KeyError("the bar")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def score_in_a_thread(reranker, pairs):
    """Another thread would wait forever for a lock that this one keeps."""
    scores = []
    thread = threading.Thread(target=lambda: scores.append(reranker.predict(pairs)), daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert not thread.is_alive()
    return scores[0]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_error_in_a_progress_bar_keeps_no_lock(tokenizer, two_threads, monkeypatch, attention, ahead):
    monkeypatch.setattr(LocalEngine, "tokenizes_ahead", ahead)
    reranker = CrossEncoder(make_model(attn_implementation=attention), tokenizer, device="cpu")
    expected = reranker.predict(PAIRS)
    with pytest.raises(KeyError) as kept:  # with its traceback, and so with all frames that it went through
        list(reranker.predict_chunks([PAIRS], progress=FailingBar(disable=True)))
    assert torch.get_num_threads() == 2
    np.testing.assert_allclose(score_in_a_thread(reranker, PAIRS), expected, rtol=1e-5, atol=1e-6)
    assert reranker.model.config._attn_implementation == attention
    assert kept.value.args == ("the bar",)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_generator_that_is_not_read_to_its_end_keeps_no_lock(tokenizer, two_threads, monkeypatch, ahead):
    monkeypatch.setattr(LocalEngine, "tokenizes_ahead", ahead)
    reranker = CrossEncoder(make_model(attn_implementation="eager"), tokenizer, device="cpu")
    chunks = reranker.predict_chunks(PAIRS[start : start + 20] for start in (0, 20, 40))
    first = next(chunks)
    np.testing.assert_allclose(score_in_a_thread(reranker, PAIRS[:20]), first, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(reranker.predict(PAIRS[20:40]), next(chunks), rtol=1e-5, atol=1e-6)
    chunks.close()
    np.testing.assert_allclose(score_in_a_thread(reranker, PAIRS[:20]), first, rtol=1e-5, atol=1e-6)
    results = side_by_side(abs, range(9), num_calls=2, num_threads=2)
    next(results)
    assert list(side_by_side(abs, range(9), num_calls=2, num_threads=2)) == list(range(9))  # in the same thread
    results.close()
    assert torch.get_num_threads() == 2
    score_in_a_thread(reranker, PAIRS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_bar_may_score_with_the_same_reranker(tokenizer, two_threads, attention):
    reranker = CrossEncoder(make_model(attn_implementation=attention), tokenizer, device="cpu")
    expected = reranker.predict(PAIRS)
    inner = []

    class ScoringBar(tqdm):
        def update(self, n=1):
            inner.append(reranker.predict(PAIRS[:20]))

    scores = next(reranker.predict_chunks([PAIRS], progress=ScoringBar(disable=True)))
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(inner[0], expected[:20], rtol=1e-5, atol=1e-6)


def test_a_lock_is_free_in_a_forked_process():
    lock = Lock()
    with lock.hold():
        lock.after_fork()
        thread = threading.Thread(target=lambda: lock.hold().__enter__(), daemon=True)
        thread.start()
        thread.join(timeout=60)
        assert not thread.is_alive()


INTERRUPT_SCRIPT = """
import itertools, os, signal, sys, threading
import numpy as np
from llama_bidir import CrossEncoder

PAIRS = [(f"query {number % 7}", f"{'bees ' * (number % 11)}{number}") for number in range(60)]


def interrupt_all():
    os.killpg(0, signal.SIGINT)  # what a terminal does


def endless():
    for number in itertools.count():
        if number == 9000:  # several chunks are scored
            threading.Timer(0.3, interrupt_all).start()
        yield f"query {number}", "bees"


if __name__ == "__main__":
    folder, kind, output = sys.argv[1:]
    reranker = CrossEncoder(folder, device=["cpu", "cpu"] if kind == "workers" else "cpu")
    if kind == "workers":
        threading.Timer(1, interrupt_all).start()  # they are starting
        try:
            reranker.predict(PAIRS)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    try:
        reranker.predict(endless())
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    documents = [f"bees {number}" for number in range(200_000)]
    try:
        threading.Timer(1, interrupt_all).start()
        reranker.rank("bees", documents)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    np.save(output, reranker.predict(PAIRS))
    processes = getattr(reranker.engine(), "_processes", [])
    print("workers", *(process.pid for process in processes), flush=True)
    reranker.predict(endless())
"""


def exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")
@pytest.mark.parametrize("kind", ["process", "workers"])
def test_an_interrupt_ends_a_call_and_the_next_one_works(tmp_path, reranker_checkpoint, kind):
    status, output, errors = run_script(tmp_path, INTERRUPT_SCRIPT, reranker_checkpoint, kind, tmp_path / "scores.npy")
    *interrupts, last = output.splitlines()
    assert interrupts == ["interrupted"] * (3 if kind == "workers" else 2), errors
    assert status == -signal.SIGINT
    workers = [int(pid) for pid in re.findall(r"\d+", last)]
    assert len(workers) == (2 if kind == "workers" else 0)
    assert not any(map(exists, workers))
    assert errors.count("Traceback") == 1  # of the last, uncaught interrupt; workers say nothing
    scores = np.load(tmp_path / "scores.npy")
    expected = CrossEncoder(reranker_checkpoint, device="cpu").predict(PAIRS)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


UNDISTURBED_SCRIPT = """
import os, signal, sys
from llama_bidir import CrossEncoder

if __name__ == "__main__":
    reranker = CrossEncoder(sys.argv[1], device=["cpu", "cpu"])
    scores = reranker.predict([("query", "bees")])
    workers = reranker.engine()._processes
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    for worker in workers:
        worker.join(timeout=1)
    print([worker.exitcode for worker in workers])
    print(scores.tolist() == reranker.predict([("query", "bees")]).tolist())
    print(workers is reranker.engine()._processes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs masks of signals")
def test_ctrl_c_does_not_reach_workers(tmp_path, reranker_checkpoint):
    status, output, errors = run_script(tmp_path, UNDISTURBED_SCRIPT, reranker_checkpoint)
    assert status == 0, errors
    assert output.splitlines() == ["[None, None]", "True", "True"]

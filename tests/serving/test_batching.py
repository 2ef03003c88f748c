"""How requests share batches: order, fairness, limits, failures and cancelled requests."""

import threading
import time

import pytest
import torch

from llama_bidir.serving.batching import Batcher, ClosedError, QueueFullError, share


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([], 10, []),
        ([[4, 4, 4]], 10, [2]),
        ([[4, 4], [3]], 20, [2, 1]),
        ([[40]], 10, [1]),  # longer than a batch, alone
        ([[40], [1]], 10, [1, 0]),
        ([[5] * 100, [5], [5]], 30, [4, 1, 1]),  # small ones pass a large one
        ([[5] * 100, [5] * 100, [5]], 30, [5, 0, 1]),  # large ones, first come, first served
        ([[5] * 3, [5] * 3, [5] * 3], 30, [3, 3, 0]),  # small ones are served whole
        ([[8] * 9, [1] * 5], 10, [1, 2]),  # a large one gets a sequence, even one of more than half a batch
        ([[9], [9], [9]], 20, [1, 1, 0]),  # first come, first served where not all fit
        ([[1] * 3, [], [1] * 3], 4, [3, 0, 1]),
    ],
)
def test_a_batch_is_shared(lengths, budget, expected):
    assert share(lengths, budget) == expected


class FakeEngine:
    """Logits are the sums of the token ids. Each batch releases `entered`, and waits for `go` if it is given."""

    def __init__(self, go=None):
        self.batches, self.go, self.fails = [], go, lambda sequences: False
        self.entered = threading.Semaphore(0)

    def logits(self, sequences, **options):
        self.entered.release()
        if self.go is not None:
            assert self.go.acquire(timeout=10)
        self.batches.append([list(ids) for ids in sequences])
        if self.fails(sequences):
            raise RuntimeError("out of order")
        return torch.tensor([[float(sum(ids))] for ids in sequences])


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def make():
    made = []

    def make(engine, **options):
        made.append(
            Batcher(lambda: engine, **{"max_tokens": 10, "max_waiting": 100, "max_waiting_tokens": 1000, **options})
        )
        return made[-1]

    yield make
    for batcher in made:
        batcher.close()


def test_requests_that_wait_share_the_next_batch_and_a_large_one_starves_nobody(make):
    go = threading.Semaphore(0)
    engine = FakeEngine(go)
    batcher = make(engine)
    first = batcher.submit([[1]])
    assert engine.entered.acquire(timeout=10)
    large = batcher.submit([[number] for number in range(30)])
    small = batcher.submit([[7], [8]])
    go.release(2)
    assert small.result(timeout=10).tolist() == [[7.0], [8.0]]
    assert not large.done()  # 8 of its 30 sequences are
    go.release(10)
    assert large.result(timeout=10).flatten().tolist() == [float(number) for number in range(30)]
    assert first.result(timeout=10).tolist() == [[1.0]]
    assert engine.batches[:2] == [[[1]], [[number] for number in range(8)] + [[7], [8]]]
    assert all(len(batch) <= 10 for batch in engine.batches)


def test_a_request_that_fails_does_not_fail_the_others(make):
    go = threading.Semaphore(0)
    engine, recovered = FakeEngine(go), []
    engine.fails = lambda sequences: [13] in sequences
    batcher = make(engine, recover=lambda: recovered.append(1))
    good, bad, other = batcher.submit([[1]]), batcher.submit([[13]]), batcher.submit([[2]])
    go.release(100)
    assert (good.result(timeout=10).item(), other.result(timeout=10).item()) == (1.0, 2.0)
    with pytest.raises(RuntimeError, match="out of order"):
        bad.result(timeout=10)
    assert recovered
    assert batcher.submit([[3]]).result(timeout=10).item() == 3.0  # and the thread lives


def test_a_failing_recovery_fails_its_request_alone(make):
    engine, calls = FakeEngine(), []
    engine.fails = lambda sequences: [13] in sequences

    def recover():
        calls.append(1)
        raise OSError("no worker")

    batcher = make(engine, recover=recover)
    with pytest.raises(OSError, match="no worker"):
        batcher.submit([[13]]).result(timeout=10)
    assert batcher.is_alive
    assert batcher.submit([[1]]).result(timeout=10).item() == 1.0
    assert len(calls) == 1


def test_closing_can_cancel(make):
    go = threading.Semaphore(0)
    engine = FakeEngine(go)
    batcher = make(engine)
    futures = [batcher.submit([[number]] * 4) for number in range(5)]
    assert engine.entered.acquire(timeout=10)
    closing = threading.Thread(target=batcher.close, kwargs={"cancel": True})
    closing.start()
    wait_until(lambda: all(future.cancelled() for future in futures))
    go.release(1)
    closing.join(timeout=10)
    assert not batcher.is_alive


def test_a_cancelled_request_frees_its_place(make):
    go = threading.Semaphore(0)
    engine = FakeEngine(go)
    batcher = make(engine, max_waiting=2)
    running = batcher.submit([[1]])
    assert engine.entered.acquire(timeout=10)
    waiting = batcher.submit([[2]] * 50)
    with pytest.raises(QueueFullError, match="2 requests are waiting, which is the limit") as raised:
        batcher.submit([[3]])
    assert raised.value.retry_after >= 1
    assert waiting.cancel()
    after = batcher.submit([[4]])
    go.release(2)
    assert running.result(timeout=10).item() == 1.0
    assert after.result(timeout=10).item() == 4.0
    assert [2] not in [ids for batch in engine.batches for ids in batch]


def test_waiting_tokens_are_limited_and_a_single_large_request_is_not(make):
    go = threading.Semaphore(0)
    batcher = make(FakeEngine(go), max_waiting_tokens=20)
    large = batcher.submit([[1] * 5] * 9)
    with pytest.raises(QueueFullError, match=r"^45 tokens are waiting, and with the 1 of this request they would exc"):
        batcher.submit([[2]])
    go.release(100)
    assert large.result(timeout=10).shape == (9, 1)
    small = [batcher.submit([[number] * 5]) for number in range(4)]
    assert [future.result(timeout=10).item() for future in small] == [0.0, 5.0, 10.0, 15.0]


def test_an_answered_request_no_longer_waits(make):
    go = threading.Semaphore(0)
    engine = FakeEngine(go)
    batcher = make(engine)
    future = batcher.submit([[1]])
    assert batcher.num_waiting == 1
    assert engine.entered.acquire(timeout=10)
    with batcher._changed:  # the thread cannot tidy up
        go.release(1)
        assert future.result(timeout=10).item() == 1.0
        assert batcher.num_waiting == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_request_waits_for_a_thread_that_has_ended(make):
    go = threading.Semaphore(0)

    def fail(sequences, tokens, seconds):
        raise RuntimeError("the counters are broken")

    batcher = make(FakeEngine(go), on_batch=fail)
    first, second = batcher.submit([[1]] * 10), batcher.submit([[2]] * 20)
    go.release(1)
    assert first.result(timeout=10).flatten().tolist() == [1.0] * 10
    with pytest.raises(ClosedError):
        second.result(timeout=10)
    with pytest.raises(ClosedError):
        batcher.submit([[3]])


def test_closing_finishes_what_is_there(make):
    go = threading.Semaphore(0)
    batcher = make(FakeEngine(go))
    futures = [batcher.submit([[number]] * 4) for number in range(5)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    wait_until(lambda: batcher._is_closing)
    with pytest.raises(ClosedError, match="the server is stopping"):
        batcher.submit([[1]])
    go.release(100)
    closing.join(timeout=10)
    assert [future.result(timeout=1)[0].item() for future in futures] == [0.0, 1.0, 2.0, 3.0, 4.0]

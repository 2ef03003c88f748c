"""Scoring on several devices: one worker process per device pulls batches of tokens from this process."""

import multiprocessing.connection
import multiprocessing.process
import multiprocessing.resource_tracker
import signal
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
import torch.multiprocessing

from .engine import CHUNK_PAIRS, LocalEngine
from .forks import Lock, register, scoring_threads
from .packing import batches_by_tokens, empty_logits

# A worker computes one batch while its next one waits in the pipe.
BATCHES_IN_FLIGHT = 2


class WorkerPool:
    """
    Computes logits in worker processes that start once and share the weights of a model on the CPU.

    Workers are spawned, so a script needs the usual `if __name__ == "__main__":`. A worker on a GPU keeps the weights
    that the model had when the worker started.

    Args:
        model: a reranker on the CPU; its weights move to shared memory.
        devices: one worker for each, such as `["cuda:0", "cuda:1"]` or `["cpu", "cpu"]`.

    Raises:
        RuntimeError: a worker could not start, with its traceback.
    """

    tokenizes_ahead = True

    def __init__(self, model: Any, devices: Sequence[str | torch.device]):
        self.devices = [torch.device(device) for device in devices]
        self.chunk_pairs = CHUNK_PAIRS * len(self.devices)
        self._config = model.config
        num_cpu_workers = sum(device.type == "cpu" for device in self.devices)
        threads_per_worker = max(1, scoring_threads() // max(1, num_cpu_workers))
        self._lock = Lock()
        self._is_busy = False
        context = torch.multiprocessing.get_context("spawn")
        self._connections: list[Any] = []
        self._processes: list[Any] = []
        self._finalizer = weakref.finalize(self, _stop, self._connections, self._processes)
        register(self)
        try:
            for device in self.devices:
                connection, other_end = context.Pipe()
                self._connections.append(connection)
                process = context.Process(
                    target=_work,
                    args=(other_end, model, str(device), threads_per_worker),
                    name=f"llama-bidir {device}",
                    daemon=True,
                )
                with _without_interrupts():
                    process.start()
                    self._processes.append(process)
                other_end.close()
            # Each worker first sends the token budget of its device.
            self._budget = min(int(self._receive(number)) for number in range(len(self.devices)))
        except BaseException:
            self.close()
            raise

    def logits(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        max_tokens: int | None = None,
        max_sequences: int | None = None,
        on_tokens: Callable[[int], Any] = lambda tokens: None,
    ) -> torch.Tensor:
        """
        See [`Engine.logits`]. A worker that has finished a batch gets the next one; the longest sequences come first.

        Raises:
            RuntimeError: a worker failed, with its traceback, or died. The other workers are stopped.
        """
        with self._lock.hold():
            if self._is_busy:  # `on_tokens` scores: the answers of the two calls would be mixed up
                raise RuntimeError("worker processes score one call at a time: do not score within a progress bar")
            self._is_busy = True
            try:
                return self._logits(sequences, max_tokens or self._budget, max_sequences, on_tokens)
            finally:
                self._is_busy = False

    def _logits(
        self,
        sequences: Sequence[Sequence[int]],
        max_tokens: int,
        max_sequences: int | None,
        on_tokens: Callable[[int], Any],
    ) -> torch.Tensor:
        lengths = [len(ids) for ids in sequences]
        waiting = deque(
            batches_by_tokens(
                lengths,
                max_tokens=max_tokens,
                max_sequences=max_sequences,
                num_workers=len(self.devices),
                device_type=self.devices[0].type,
            )
        )
        in_flight: list[deque[list[int]]] = [deque() for _ in self.devices]
        logits = empty_logits(len(sequences), self._config.num_labels)
        try:
            for number in [*range(len(self.devices))] * BATCHES_IN_FLIGHT:
                self._send_next(number, waiting, in_flight[number], sequences)
            while any(in_flight):
                busy = [number for number, batches in enumerate(in_flight) if batches]
                for number in self._wait(busy):
                    logits[in_flight[number][0]] = self._receive(number)
                    on_tokens(sum(lengths[index] for index in in_flight[number].popleft()))
                    self._send_next(number, waiting, in_flight[number], sequences)
        except BaseException:
            self.close()  # answers still on their way would be taken for those of the next call
            raise
        return logits

    def token_budget(self) -> int:
        """The default maximum of tokens per batch: the smallest budget of the devices."""
        return self._budget

    def close(self) -> None:
        """Stops the workers."""
        self._finalizer()

    @property
    def is_open(self) -> bool:
        return bool(self._finalizer.alive)

    def after_fork(self) -> None:
        """Closes the pipes to the parent's workers. Otherwise they would not notice that the parent closes them."""
        self._finalizer.detach()
        for connection in self._connections:
            connection.close()
        # At exit, multiprocessing ends the daemons in this set. There is no public way to remove them from it.
        multiprocessing.process._children.difference_update(self._processes)  # type: ignore[attr-defined]

    def _send_next(
        self, number: int, waiting: deque[list[int]], in_flight: deque[list[int]], sequences: Sequence[Sequence[int]]
    ) -> None:
        if not waiting:
            return
        batch = waiting.popleft()
        in_flight.append(batch)
        with suppress(OSError):  # the worker has ended: waiting for its answer reports why
            self._connections[number].send([sequences[index] for index in batch])

    def _wait(self, numbers: list[int]) -> list[int]:
        """Returns the numbers of the workers that have answered or ended."""
        sources = {self._connections[number]: number for number in numbers}
        sources |= {self._processes[number].sentinel: number for number in numbers}
        return sorted({sources[source] for source in multiprocessing.connection.wait(list(sources))})

    def _receive(self, number: int) -> torch.Tensor:
        try:
            answer = self._connections[number].recv()
        except (EOFError, OSError):
            self._processes[number].join(timeout=5)
            answer = f"its process ended with exit code {self._processes[number].exitcode}"
        if isinstance(answer, str):
            raise RuntimeError(f"the worker on {self.devices[number]} failed: {answer}")
        return torch.from_numpy(answer)


def _work(connection: Any, model: Any, device: str, num_threads: int) -> None:
    """Runs in a worker process: answers batches with logits, or an error with its traceback, until the pipe closes."""
    try:
        torch.set_num_threads(num_threads)
        engine = LocalEngine(model.to(device))
        connection.send(np.array(engine.token_budget()))
        # A thread reads, so neither side ever waits in `send` for the other to read.
        batches: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=_read, args=(connection, batches), daemon=True).start()
        while (sequences := batches.get()) is not None:
            if isinstance(sequences, Exception):
                raise sequences
            connection.send(engine.logits(sequences, max_tokens=sum(map(len, sequences))).numpy())
    except BrokenPipeError:
        return
    except Exception:
        connection.send(traceback.format_exc())


def _read(connection: Any, batches: "SimpleQueue[Any]") -> None:
    try:
        while True:
            batches.put(connection.recv())
    except (EOFError, OSError):
        batches.put(None)
    except Exception as error:
        batches.put(error)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Makes processes that start in this context ignore Ctrl-C. A terminal sends it to all; the parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # The first process to be spawned starts multiprocessing's tracker, which would unblock SIGINT.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(connections: list[Any], processes: list[Any]) -> None:
    for connection in connections:
        connection.close()
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(timeout=5)
        process.kill()

"""Scoring on several devices: one worker process a device, which pull batches of tokens from this process."""

import multiprocessing.connection
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.multiprocessing

from .packing import batches_by_tokens, token_budget
from .scoring import CHUNK_PAIRS, LocalEngine

# One batch is computed while the next one waits in the pipe.
BATCHES_IN_FLIGHT = 2


class WorkerPool:
    """
    Computes logits in worker processes that start once and share the weights of a model on the CPU.

    Workers are spawned: a script needs the usual `if __name__ == "__main__":`. They keep the weights that the model had
    when they started.

    Args:
        model: a reranker on the CPU; its weights move to shared memory.
        devices: one worker each, such as `["cuda:0", "cuda:1"]` or `["cpu", "cpu"]`.

    Raises:
        RuntimeError: a worker could not start, with its traceback.
    """

    tokenizes_ahead = True

    def __init__(self, model: Any, devices: Sequence[str | torch.device]):
        self.devices = [torch.device(device) for device in devices]
        self.chunk_pairs = CHUNK_PAIRS * len(self.devices)
        self._config, self._dtype = model.config, model.dtype
        num_cpu_workers = sum(device.type == "cpu" for device in self.devices)
        num_threads = max(1, torch.get_num_threads() // max(1, num_cpu_workers))
        context = torch.multiprocessing.get_context("spawn")
        self._connections: list[Any] = []
        self._processes: list[Any] = []
        self._finalizer = weakref.finalize(self, _stop, self._connections, self._processes)
        for device in self.devices:
            connection, other_end = context.Pipe()
            process = context.Process(
                target=_work,
                args=(other_end, model, str(device), num_threads),
                name=f"llama-bidir {device}",
                daemon=True,
            )
            process.start()
            other_end.close()
            self._connections.append(connection)
            self._processes.append(process)
        for number in range(len(self.devices)):
            self._receive(number)

    def logits(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        max_tokens: int | None = None,
        max_sequences: int | None = None,
        on_tokens: Callable[[int], Any] = lambda tokens: None,
    ) -> torch.Tensor:
        """
        See [`Engine.logits`]. A worker that has finished a batch gets the next one, the longest sequences first.

        Raises:
            RuntimeError: a worker failed, with its traceback, or died. The other workers are stopped.
        """
        lengths = [len(ids) for ids in sequences]
        if max_tokens is None:
            budget = min(token_budget(device, self._dtype, self._config) for device in set(self.devices))
            # Small enough for every worker to get some.
            max_tokens = max(1, min(budget, -(-sum(lengths) // (BATCHES_IN_FLIGHT * len(self.devices)))))
        waiting = deque(batches_by_tokens(lengths, max_tokens=max_tokens, max_sequences=max_sequences))
        in_flight: list[deque[list[int]]] = [deque() for _ in self.devices]
        logits = torch.empty(len(sequences), self._config.num_labels)
        for number in [*range(len(self.devices))] * BATCHES_IN_FLIGHT:
            self._send_next(number, waiting, in_flight[number], sequences)
        while any(in_flight):
            busy = [number for number, batches in enumerate(in_flight) if batches]
            for number in self._wait(busy):
                logits[in_flight[number][0]] = self._receive(number)
                on_tokens(sum(lengths[index] for index in in_flight[number].popleft()))
                self._send_next(number, waiting, in_flight[number], sequences)
        return logits

    def close(self) -> None:
        """Stops the workers."""
        self._finalizer()

    @property
    def is_open(self) -> bool:
        return bool(self._finalizer.alive)

    def _send_next(
        self, number: int, waiting: deque[list[int]], in_flight: deque[list[int]], sequences: Sequence[Sequence[int]]
    ) -> None:
        if not waiting:
            return
        batch = waiting.popleft()
        in_flight.append(batch)
        try:
            self._connections[number].send([sequences[index] for index in batch])
        except OSError:  # a closed pipe; what the worker said before it ended is still there to be read
            self._receive(number)

    def _wait(self, numbers: list[int]) -> list[int]:
        """Numbers of the workers that have answered or ended."""
        sources = {self._connections[number]: number for number in numbers}
        sources |= {self._processes[number].sentinel: number for number in numbers}
        return sorted({sources[source] for source in multiprocessing.connection.wait(list(sources))})

    def _receive(self, number: int) -> torch.Tensor:
        try:
            answer = self._connections[number].recv()
        except (EOFError, OSError):
            self._processes[number].join()
            answer = f"its process ended with exit code {self._processes[number].exitcode}"
        if isinstance(answer, str):
            self.close()
            raise RuntimeError(f"the worker on {self.devices[number]} failed: {answer}")
        return torch.from_numpy(answer)


def _work(connection: Any, model: Any, device: str, num_threads: int) -> None:
    """A worker process: answers batches with logits, and an error with its traceback, until the pipe is closed."""
    try:
        torch.set_num_threads(num_threads)
        engine = LocalEngine(model.to(device))
        connection.send(torch.empty(0).numpy())
        while True:
            sequences = connection.recv()
            tokens = sum(map(len, sequences))
            connection.send(engine.logits(sequences, max_tokens=tokens, max_sequences=len(sequences)).numpy())
    except (EOFError, KeyboardInterrupt):
        return
    except Exception:
        connection.send(traceback.format_exc())


def _stop(connections: list[Any], processes: list[Any]) -> None:
    for connection in connections:
        connection.close()
    for process in processes:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()


def check_devices(devices: Any) -> list[str]:
    """Returns a list of devices as strings; raises ValueError for an empty one, or for one that torch does not know."""
    names = [str(torch.device(device)) for device in devices]
    if not names:
        raise ValueError("device must name at least one device, got an empty list")
    return names

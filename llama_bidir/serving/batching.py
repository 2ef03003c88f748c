"""Requests that arrive while a batch is computed share the next one."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from ..scoring.engine import Engine

logger = logging.getLogger(__name__)

# How much the last batch counts in the mean speed.
SMOOTHING = 0.2


class QueueFullError(Exception):
    """The queue is full. `retry_after` is the estimated wait in seconds before the client should retry."""

    def __init__(self, reason: str, retry_after: float):
        super().__init__(f"{reason}: ask again in {retry_after:.0f} s")
        self.retry_after = retry_after


class ClosedError(Exception):
    """The server is stopping."""


@dataclass(eq=False)
class Ticket:
    """
    A request that waits for its scores.

    Args:
        sequences: the token ids of its pairs.
        future: gets float32 logits of shape `(num_sequences, num_labels)`, in the order of `sequences`.
    """

    sequences: Sequence[Sequence[int]]
    future: "Future[torch.Tensor]" = field(default_factory=Future)
    logits: list[torch.Tensor] = field(default_factory=list)
    num_done: int = 0

    def __post_init__(self) -> None:
        self.num_tokens = sum(map(len, self.sequences))

    @property
    def lengths(self) -> list[int]:
        """The tokens of each sequence that is not scored yet."""
        return [len(ids) for ids in self.sequences[self.num_done :]]


def share(lengths: Sequence[Sequence[int]], budget: int) -> list[int]:
    """
    Decides how many sequences of each request the next batch takes. Requests of at most half the budget share one half,
    and larger requests share the other. Within each half, and for tokens that are left, earlier requests go first.

    Args:
        lengths: for each request, in the order of arrival, the tokens of its remaining sequences, which are at least 1.
        budget: the tokens of the batch. It is exceeded only by a single sequence that is longer.

    Returns:
        the number of sequences to take from the start of each request. The first request always gets one.
    """
    taken = [0] * len(lengths)
    left = budget

    def take(numbers: Sequence[int], limit: int) -> None:
        """Takes sequences of these requests in turn, while they fit into the limit and the batch."""
        nonlocal left
        spent = sum(sum(lengths[number][: taken[number]]) for number in numbers)
        for number in numbers:
            for length in lengths[number][taken[number] :]:
                if spent + length > limit or length > left:
                    break
                taken[number] += 1
                spent += length
                left -= length

    everyone = range(len(lengths))
    if lengths:
        taken[0] = 1
        left -= lengths[0][0]
    are_small = [sum(each) <= budget // 2 for each in lengths]
    for is_small in (True, False):
        take([number for number in everyone if are_small[number] is is_small], budget // 2)
    take(everyone, budget)
    return taken


class Batcher:
    """
    Scores the sequences of many requests on one thread, batch by batch.

    Args:
        engine: returns what computes logits. It is called for each batch.
        recover: called after a batch has failed, for example to stop worker processes.
        max_tokens: the most tokens of a batch.
        max_waiting, max_waiting_tokens: the most requests, and the most tokens of them, that wait or are computed. A
            single request may have more tokens.
        on_batch: called with the sequences, the tokens and the seconds of each batch.
    """

    def __init__(
        self,
        engine: Callable[[], Engine],
        *,
        max_tokens: int,
        max_waiting: int,
        max_waiting_tokens: int,
        recover: Callable[[], None] = lambda: None,
        on_batch: Callable[[int, int, float], None] = lambda sequences, tokens, seconds: None,
    ):
        self._engine, self._recover, self._on_batch = engine, recover, on_batch
        self.max_tokens, self.max_waiting, self.max_waiting_tokens = max_tokens, max_waiting, max_waiting_tokens
        self._tickets: list[Ticket] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._tokens_per_second: float | None = None
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """The requests that wait or are computed."""
        return sum(not ticket.future.done() for ticket in self._tickets)

    def full_error(self) -> QueueFullError:
        """Returns the error of too many requests, with the estimated wait."""
        return QueueFullError(f"{self.max_waiting} requests are waiting, which is the limit", self._estimate_wait())

    def submit(self, sequences: Sequence[Sequence[int]]) -> "Future[torch.Tensor]":
        """
        Adds a request. Cancel the future if nobody waits for it any more.

        Raises:
            QueueFullError: too many requests or tokens wait.
            ClosedError: the batcher is closing.
        """
        ticket = Ticket(sequences)
        with self._changed:
            if self._is_closing or not self._thread.is_alive():
                raise ClosedError("the server is stopping")
            self._drop_done()
            if len(self._tickets) >= self.max_waiting:
                raise self.full_error()
            waiting = sum(other.num_tokens for other in self._tickets)
            if waiting and waiting + ticket.num_tokens > self.max_waiting_tokens:
                reason = (
                    f"{waiting} tokens are waiting, and with the {ticket.num_tokens} of this request they would exceed "
                    f"the limit of {self.max_waiting_tokens}"
                )
                raise QueueFullError(reason, self._estimate_wait())
            self._tickets.append(ticket)
            self._changed.notify()
        return ticket.future

    @property
    def is_alive(self) -> bool:
        """Whether requests are computed."""
        return self._thread.is_alive()

    def close(self, *, cancel: bool = False) -> None:
        """Takes no new requests, finishes those that are there, or cancels them, and ends the thread."""
        with self._changed:
            self._is_closing = True
            for ticket in self._tickets if cancel else ():
                ticket.future.cancel()
            self._changed.notify()
        self._thread.join()

    def _drop_done(self) -> None:
        """Forgets the requests that are answered or cancelled."""
        self._tickets = [ticket for ticket in self._tickets if not ticket.future.done()]

    def _estimate_wait(self) -> float:
        tokens = sum(sum(ticket.lengths) for ticket in self._tickets)
        return max(1.0, tokens / self._tokens_per_second) if self._tokens_per_second else 1.0

    def _run(self) -> None:
        try:
            while (batch := self._next()) is not None:
                started = time.perf_counter()
                sequences = [ids for ticket, part in batch for ids in ticket.sequences[part]]
                try:
                    self._deliver(batch, self._score(sequences))
                except Exception as error:
                    logger.error(f"a batch of {len(batch)} requests failed: {type(error).__name__}")
                    logger.debug("the error of the batch", exc_info=error)
                    self._score_alone(batch)
                self._measure(len(sequences), sum(map(len, sequences)), time.perf_counter() - started)
        finally:  # not reached while requests wait, unless something here is wrong
            with self._changed:
                self._is_closing = True
                self._drop_done()
                for ticket in self._tickets:
                    _finish(ticket, ClosedError("the server is stopping"))

    def _measure(self, num_sequences: int, num_tokens: int, seconds: float) -> None:
        speed, before = num_tokens / max(seconds, 1e-9), self._tokens_per_second
        self._tokens_per_second = speed if before is None else before + SMOOTHING * (speed - before)
        self._on_batch(num_sequences, num_tokens, seconds)

    def _next(self) -> list[tuple[Ticket, slice]] | None:
        """Waits for requests. Returns the next batch, or None when the batcher is closed and nothing is left."""
        with self._changed:
            while True:
                self._drop_done()
                if self._tickets:
                    break
                if self._is_closing:
                    return None
                self._changed.wait()
            counts = share([ticket.lengths for ticket in self._tickets], self.max_tokens)
            return [
                (ticket, slice(ticket.num_done, ticket.num_done + count))
                for ticket, count in zip(self._tickets, counts, strict=True)
                if count
            ]

    def _score(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        return self._engine().logits(sequences, max_tokens=None, max_sequences=None, on_tokens=lambda tokens: None)

    def _score_alone(self, batch: Sequence[tuple[Ticket, slice]]) -> None:
        """Scores each request of a failed batch on its own. Only those that fail again get an error."""
        has_failed = True
        for ticket, part in batch:
            if ticket.future.done():
                continue
            try:
                if has_failed:
                    self._recover()
                self._deliver([(ticket, part)], self._score(ticket.sequences[part]))
                has_failed = False
            except Exception as error:
                has_failed = True
                logger.error(f"a request of {len(ticket.sequences)} pairs failed: {type(error).__name__}")
                logger.debug("the error of the request", exc_info=error)
                _finish(ticket, error)

    def _deliver(self, batch: Sequence[tuple[Ticket, slice]], logits: torch.Tensor) -> None:
        rows: Iterator[torch.Tensor] = iter(logits.split([part.stop - part.start for _, part in batch]))
        for (ticket, part), own in zip(batch, rows, strict=True):
            ticket.logits.append(own)
            ticket.num_done = part.stop
            if ticket.num_done == len(ticket.sequences):
                _finish(ticket, None)


def _finish(ticket: Ticket, error: Exception | None) -> None:
    """Sets the outcome of a request, unless it has been cancelled in the meantime."""
    if not ticket.future.set_running_or_notify_cancel():
        return
    if error is None:
        ticket.future.set_result(torch.cat(ticket.logits))
    else:
        ticket.future.set_exception(error)

"""From token ids to logits in this process: batches by tokens, packed where attention can read them."""

import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache, partial
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch

from .forks import Lock, scoring_threads
from .forward import is_plain, packed_logits
from .packing import (
    PACKED_ATTENTION,
    PACKED_IMPLEMENTATIONS,
    SMALLEST_BATCH,
    balanced_batches,
    batches_by_tokens,
    empty_logits,
    pack,
    pad,
    token_budget,
)

logger = logging.getLogger(__name__)

# Enough pairs for batches of similar lengths, and few enough to need little memory.
CHUNK_PAIRS = 4096
PADDED_PAIRS = 32
# More calls at once would wait for Python's global lock.
MAX_SIDE_BY_SIDE = 4

Forward = Callable[[dict[str, Any]], torch.Tensor]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Engine(Protocol):
    """Computes logits of sequences of token ids, here or elsewhere."""

    @property
    def chunk_pairs(self) -> int:
        """The number of pairs to collect before they are scored."""

    @property
    def tokenizes_ahead(self) -> bool:
        """Whether tokenization has a thread of its own."""

    def token_budget(self) -> int:
        """The default maximum of tokens per batch."""

    def logits(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        max_tokens: int | None,
        max_sequences: int | None,
        on_tokens: Callable[[int], Any],
    ) -> torch.Tensor:
        """
        Args:
            sequences: token ids.
            max_tokens: maximum tokens per batch; chosen for the device when None.
            max_sequences: maximum sequences per batch; no maximum when None.
            on_tokens: called with the number of tokens that have just been scored, or queued on a GPU.

        Returns:
            float32 logits on the CPU, of shape `(num_sequences, num_labels)`, in the order of `sequences`.
        """


# `torch.set_num_threads` applies to the whole process, so only one call at a time may change it.
_side_by_side_lock = Lock()


def side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_calls: int, num_threads: int
) -> Generator[Result, None, None]:
    """
    Calls `function` for each item. `num_calls` calls run in parallel, each with its share of torch's threads. On a CPU,
    the cores then do not wait for each other after every operation.

    Args:
        function: called on the threads of a pool, or on this thread if `num_calls` is 1.
        items: its arguments.
        num_calls: the number of parallel calls.
        num_threads: torch's threads for all calls together. Afterwards, the old number of threads is restored.

    Yields:
        the results, in the order of the items. After a call fails, no further call starts. Close the generator if it
        is not read to its end: until then, other threads wait.
    """
    if num_calls == 1:
        yield from map(function, items)
        return
    with _side_by_side_lock.hold():
        threads_before = torch.get_num_threads()
        try:
            yield from _compute_pool(num_calls, num_threads // num_calls).map(function, items)
        finally:
            torch.set_num_threads(threads_before)


@cache
def _compute_pool(num_calls: int, num_threads: int) -> ThreadPoolExecutor:
    """Threads that are reused: what torch's libraries allocate for a thread is not freed when it ends."""
    return ThreadPoolExecutor(num_calls, "compute", torch.set_num_threads, (num_threads,))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compute_pool.cache_clear)  # a forked process does not have these threads


class LocalEngine:
    """
    Computes logits in this process, where the model is. It leaves the model as it was: it only reads a plain one, and
    puts any other into evaluation mode, with packed attention, for the time of a call.

    Args:
        model: a [`LlamaBidirectionalForSequenceClassification`], an adapter on one, or an exported graph.
    """

    chunk_pairs = CHUNK_PAIRS

    def __init__(self, model: Any):
        self.model = model
        self._is_exported = not isinstance(model, torch.nn.Module)
        self._num_threads = scoring_threads()
        self._budgets: dict[torch.device, int] = {}
        self._tokens_that_fit: int | None = None
        self._is_short_of_memory = False

    @property
    def tokenizes_ahead(self) -> bool:
        """Not on a CPU, where tokenization would take cores from the model."""
        return bool(self.model.device.type != "cpu")

    @property
    def is_packed(self) -> bool:
        """Whether batches are packed: attention other than sdpa and flash attention reads padded input only."""
        attention = self.model.config._attn_implementation
        return not self._is_exported and attention in ("sdpa", *PACKED_IMPLEMENTATIONS)

    def logits(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        max_tokens: int | None = None,
        max_sequences: int | None = None,
        on_tokens: Callable[[int], Any] = lambda tokens: None,
    ) -> torch.Tensor:
        """See [`Engine.logits`]. A batch that does not fit in memory halves the budget for the rest of the process."""
        if max_tokens is None:
            max_tokens = self.token_budget()
        if not self.is_packed:
            max_sequences = min(max_sequences or PADDED_PAIRS, PADDED_PAIRS)
        with self._forward_function() as forward:
            return self._score(sequences, forward, max_tokens, max_sequences, on_tokens)

    def token_budget(self) -> int:
        """The default maximum of tokens per batch; the same for all calls on a device."""
        device = self.model.device
        if device not in self._budgets:
            self._budgets[device] = token_budget(device, self.model.dtype, self.model.config)
        return self._budgets[device]

    @contextmanager
    def _forward_function(self) -> Iterator[Forward]:
        """Yields the function that computes the logits of a batch, valid while the context is open."""
        if self._is_exported:
            yield self._call
        elif self.is_packed and is_plain(self.model):
            yield partial(packed_logits, self.model)
        else:
            with _lock_of(self.model).hold(), _ready_to_score(self.model, packed=self.is_packed):
                yield self._call

    def _call(self, batch: dict[str, Any]) -> torch.Tensor:
        logits: torch.Tensor = self.model(**batch).logits
        return logits

    def _score(
        self,
        sequences: Sequence[Sequence[int]],
        forward: Forward,
        max_tokens: int,
        max_sequences: int | None,
        on_tokens: Callable[[int], Any],
    ) -> torch.Tensor:
        lengths = [len(ids) for ids in sequences]
        order: list[int] = []
        outputs: list[torch.Tensor] = []
        waiting = list(range(len(sequences)))
        while waiting:
            num_calls = self._num_calls()
            batches = [
                [waiting[position] for position in batch]
                for batch in self._batches(
                    [lengths[index] for index in waiting],
                    max_tokens=min(max_tokens, self._tokens_that_fit or max_tokens),
                    max_sequences=max_sequences,
                    num_workers=num_calls,
                )
            ]
            waiting = []
            num_calls = min(num_calls, len(batches))
            outcomes = side_by_side(
                partial(self._forward_if_it_fits, forward, is_alone=num_calls == 1),
                ([sequences[index] for index in batch] for batch in batches),
                num_calls=num_calls,
                num_threads=self._num_threads,
            )
            with closing(outcomes):  # if `on_tokens` raises, its traceback would keep the generator open
                for batch, output in zip(batches, outcomes, strict=True):
                    if output is None:
                        waiting += batch
                    else:
                        order += batch
                        outputs.append(output)
                        on_tokens(sum(lengths[index] for index in batch))
        logits = empty_logits(len(sequences), self.model.config.num_labels)
        if outputs:
            logits[order] = torch.cat(outputs).cpu()  # the one wait for the device
        return logits

    def _batches(self, lengths: Sequence[int], **limits: Any) -> Iterable[list[int]]:
        """Padded batches hold similar lengths; packed batches hold equal numbers of tokens."""
        if self.is_packed:
            return balanced_batches(lengths, min_tokens=SMALLEST_BATCH["cpu"], **limits)
        return batches_by_tokens(lengths, padded=True, **limits)

    def _num_calls(self) -> int:
        """The number of batches to compute at once: as many as leave no thread idle, up to four."""
        if self._is_exported:  # onnxruntime has its own threads
            return 1
        is_compiled = self.model._compiled_call_impl is not None
        is_offloaded = getattr(self.model, "hf_device_map", None) is not None
        # bitsandbytes rearranges the weights of a layer in its first forward pass on a CPU.
        is_rearranged = any(getattr(self.model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
        is_alone = is_compiled or is_offloaded or is_rearranged or self._is_short_of_memory
        if self.model.device.type != "cpu" or is_alone:
            return 1
        counts = range(1, min(MAX_SIDE_BY_SIDE, self._num_threads) + 1)
        return max(counts, key=lambda count: (self._num_threads // count * count, count))

    def _forward_if_it_fits(self, forward: Forward, ids: list[Sequence[int]], *, is_alone: bool) -> torch.Tensor | None:
        """Returns logits, or None if memory did not suffice; by then the traceback, which holds tensors, is freed."""
        num_tokens = sum(map(len, ids)) if self.is_packed else len(ids) * max(map(len, ids))
        if len(ids) > 1 and num_tokens > (self._tokens_that_fit or num_tokens):
            return None  # an earlier batch has shown that this one does not fit
        try:
            return self._forward(ids, forward)
        except RuntimeError as error:
            # The CPU allocator raises a plain RuntimeError.
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            if len(ids) == 1 and is_alone:
                raise torch.OutOfMemoryError(
                    f"one pair of {num_tokens} tokens does not fit in the memory of {self.model.device}: lower "
                    f"max_length or use a smaller dtype ({error})"
                ) from None
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self._is_short_of_memory = True
        if len(ids) > 1:
            self._tokens_that_fit = min(num_tokens // 2, self._tokens_that_fit or num_tokens)
        logger.warning(f"{self.model.device} has no memory for {num_tokens} tokens at once: continuing with half of it")
        return None

    @torch.inference_mode()
    def _forward(self, ids: list[Sequence[int]], forward: Forward) -> torch.Tensor:
        return forward(pack(ids, self.model.device) if self.is_packed else pad(ids, self.model.device))


_locks: WeakKeyDictionary[torch.nn.Module, Lock] = WeakKeyDictionary()


def _lock_of(model: torch.nn.Module) -> Lock:
    """Returns the lock of a model, which several engines may share while they change its mode and attention."""
    return _locks.setdefault(model, Lock())


@contextmanager
def _ready_to_score(model: Any, *, packed: bool) -> Iterator[None]:
    """Puts a model into evaluation mode, with packed attention if possible, until the context closes."""
    attention = model.config._attn_implementation
    in_training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        if packed and attention == "sdpa":
            model.set_attn_implementation(PACKED_ATTENTION)
        yield
    finally:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        for module in in_training:
            module.training = True

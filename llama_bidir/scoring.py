"""From pairs to logits: a stream of chunks, each tokenized, scored in batches by tokens, and put back in order."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import Any, Protocol, TypeVar

import torch
from tqdm.auto import tqdm

from .packing import PACKED_IMPLEMENTATIONS, batches_by_tokens, pack, pad, token_budget
from .prompts import EncodedPairs, PromptEncoder

logger = logging.getLogger(__name__)

# A chunk is large enough for batches of like lengths, and small enough for memory not to notice.
CHUNK_PAIRS = 4096
CHUNK_CHARACTERS = 4_000_000
PADDED_PAIRS = 32
# More would wait for Python's lock.
MAX_COMPUTE_THREADS = 4

Pair = tuple[str, str]
Item = TypeVar("Item")
Result = TypeVar("Result")


class Engine(Protocol):
    """Computes logits of sequences of token ids, here or elsewhere."""

    @property
    def chunk_pairs(self) -> int:
        """Pairs that are worth collecting before they are scored."""

    @property
    def tokenizes_ahead(self) -> bool:
        """Whether tokenization has a thread of its own."""

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
            max_tokens: of a batch; chosen for the device when None.
            max_sequences: of a batch, where given.
            on_tokens: called with the number of tokens that have just been scored.

        Returns:
            float32 logits on the CPU, of shape `(num_sequences, num_labels)`, in the order of `sequences`.
        """


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item], *, num_threads: int) -> Iterator[Result]:
    """
    Calls `function` for each item, several at once. The threads of torch's operations are divided among the calls: on
    a CPU that leaves no core to wait for the others after every operation.

    Yields:
        the results, in the order of the items. What has not started when a call fails is not started any more.
    """
    if num_threads == 1:
        yield from map(function, items)
        return
    total = torch.get_num_threads()
    pool = ThreadPoolExecutor(num_threads, "compute", torch.set_num_threads, (total // num_threads,))
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(total)  # threads that start later take it from here


class LocalEngine:
    """Computes logits in this process, where the model is."""

    chunk_pairs = CHUNK_PAIRS

    def __init__(self, model: Any):
        self.model = model
        self._tokens_that_fit: int | None = None

    @property
    def tokenizes_ahead(self) -> bool:
        """On a CPU, tokenization would only take the cores from the model."""
        return bool(self.model.device.type != "cpu")

    @property
    def is_packed(self) -> bool:
        return self.model.config._attn_implementation in PACKED_IMPLEMENTATIONS

    def logits(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        max_tokens: int | None = None,
        max_sequences: int | None = None,
        on_tokens: Callable[[int], Any] = lambda tokens: None,
    ) -> torch.Tensor:
        """See [`Engine.logits`]. A batch that does not fit in memory halves the budget, from then on."""
        lengths = [len(ids) for ids in sequences]
        num_threads = self._num_threads()
        if max_tokens is None:
            budget = token_budget(self.model.device, self.model.dtype, self.model.config)
            max_tokens = max(1, min(budget, -(-sum(lengths) // num_threads)))
        if not self.is_packed:
            max_sequences = max_sequences or PADDED_PAIRS
        order: list[int] = []
        outputs: list[torch.Tensor] = []
        waiting = list(range(len(sequences)))
        while waiting:
            batches = [
                [waiting[position] for position in batch]
                for batch in batches_by_tokens(
                    [lengths[index] for index in waiting],
                    max_tokens=min(max_tokens, self._tokens_that_fit or max_tokens),
                    max_sequences=max_sequences,
                    padded=not self.is_packed,
                )
            ]
            waiting = []
            inputs = ([sequences[index] for index in batch] for batch in batches)
            results = side_by_side(self._forward_if_it_fits, inputs, num_threads=min(num_threads, len(batches)))
            for batch, output in zip(batches, results, strict=True):
                if output is None:
                    waiting += batch
                else:
                    order += batch
                    outputs.append(output)
                    on_tokens(sum(lengths[index] for index in batch))
        logits = torch.empty(len(sequences), self.model.config.num_labels)
        if outputs:
            logits[order] = torch.cat(outputs).cpu()  # the one wait for the device
        return logits

    def _num_threads(self) -> int:
        """How many batches to compute side by side."""
        is_compiled = self.model._compiled_call_impl is not None
        if self.model.device.type != "cpu" or is_compiled:
            return 1
        return min(MAX_COMPUTE_THREADS, torch.get_num_threads())

    def _forward_if_it_fits(self, ids: list[Sequence[int]]) -> torch.Tensor | None:
        """Logits, or None where memory did not suffice. The traceback, which holds tensors, is gone by the return."""
        num_tokens = sum(map(len, ids))
        if len(ids) > 1 and num_tokens > (self._tokens_that_fit or num_tokens):
            return None  # a batch before this one has shown it
        try:
            return self._forward(ids)
        except RuntimeError as error:
            # The allocator of the CPU raises no type of its own.
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            if len(ids) == 1:
                raise torch.OutOfMemoryError(
                    f"one pair of {num_tokens} tokens does not fit in the memory of {self.model.device}: lower "
                    f"max_length or use a smaller dtype ({error})"
                ) from None
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self._tokens_that_fit = num_tokens // 2
        logger.warning(
            f"{self.model.device} has no memory for {num_tokens} tokens at once: going on with {num_tokens // 2}"
        )
        return None

    @torch.inference_mode()
    def _forward(self, ids: list[Sequence[int]]) -> torch.Tensor:
        inputs = pack(ids, self.model.device) if self.is_packed else pad(ids, self.model.device)
        logits: torch.Tensor = self.model(**inputs).logits
        return logits


@dataclass
class Tally:
    """What happened to the pairs of a call."""

    num_pairs: int = 0
    num_truncated: int = 0
    num_windowed: int = 0
    num_windows: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def add(self, encoded: EncodedPairs, positions: Sequence[int]) -> None:
        """Counts the pairs that are at `positions` of `encoded`."""
        windows = [encoded.num_windows[position] for position in positions]
        self.num_pairs += len(positions)
        self.num_truncated += sum(encoded.is_truncated[position] for position in positions)
        self.num_windowed += sum(count > 1 for count in windows)
        self.num_windows += sum(count for count in windows if count > 1)

    def log(self, max_length: int) -> None:
        """Says once what a call cut or split."""
        if self.num_truncated:
            logger.warning(
                f"{self.num_truncated} of {self.num_pairs} pairs were longer than {max_length} tokens and were cut to "
                "fit: raise max_length to keep more"
            )
        if self.num_windowed:
            logger.warning(
                f"{self.num_windowed} of {self.num_pairs} pairs were longer than {max_length} tokens and were scored "
                f"in {self.num_windows} windows, the best of which counts"
            )


@dataclass
class EncodedChunk:
    """Tokenized pairs of a chunk, twins only once: pair i is number `positions[i]` of `encoded`."""

    encoded: EncodedPairs
    positions: list[int]


def split_into_chunks(pairs: Iterable[Pair], chunk_pairs: int) -> Iterator[list[Pair]]:
    """Pairs in lists of at most `chunk_pairs`, and of fewer where texts are long."""
    chunk: list[Pair] = []
    characters = 0
    for pair in pairs:
        chunk.append(pair)
        characters += len(pair[0]) + len(pair[1])
        if len(chunk) == chunk_pairs or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def encode_chunks(
    pairs: Iterable[Pair], encoder: PromptEncoder, *, chunk_pairs: int, long_document: str
) -> Iterator[EncodedChunk]:
    """Tokenizes pairs, at most `chunk_pairs` at a time. Equal pairs are one, so that their scores tie."""
    for chunk in split_into_chunks(pairs, chunk_pairs):
        numbers = {pair: number for number, pair in enumerate(dict.fromkeys(chunk))}
        encoded = encoder.encode(list(numbers), long_document=long_document)
        yield EncodedChunk(encoded, [numbers[pair] for pair in chunk])


class Scorer:
    """
    Scores pairs as they come, chunk by chunk, on an engine.

    Args:
        encoder: renders and tokenizes pairs.
        engine: computes logits.
        progress: a bar that counts pairs.
        num_labels: logits a pair.
        max_tokens, max_sequences: of a batch (see [`Engine.logits`]).
        long_document: see [`PromptEncoder.encode`].
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        engine: Engine,
        progress: "tqdm[Any]",
        *,
        num_labels: int,
        max_tokens: int | None,
        max_sequences: int | None,
        long_document: str,
    ):
        self.encoder, self.engine, self.progress, self.num_labels = encoder, engine, progress, num_labels
        self.max_tokens, self.max_sequences, self.long_document = max_tokens, max_sequences, long_document
        self.tally = Tally()

    def score(self, pairs: Iterable[Pair]) -> torch.Tensor:
        """Returns float32 logits of shape `(num_pairs, num_labels)` on the CPU, in the order of the pairs."""
        chunks = encode_chunks(
            pairs, self.encoder, chunk_pairs=self.engine.chunk_pairs, long_document=self.long_document
        )
        if self.engine.tokenizes_ahead:
            chunks = one_ahead(chunks)
        return torch.cat([torch.empty(0, self.num_labels), *map(self._score_chunk, chunks)])

    def _score_chunk(self, chunk: EncodedChunk) -> torch.Tensor:
        """The best window of a pair counts, label by label."""
        encoded, positions = chunk.encoded, chunk.positions
        bar = _ChunkProgress(self.progress, len(positions), sum(map(len, encoded.input_ids)))
        logits = self.engine.logits(
            encoded.input_ids, max_tokens=self.max_tokens, max_sequences=self.max_sequences, on_tokens=bar.advance
        )
        if len(encoded.input_ids) > len(encoded.num_windows):
            logits = torch.stack([windows.amax(dim=0) for windows in logits.split(encoded.num_windows)])
        self.tally.add(encoded, positions)
        return logits[positions]


class _ChunkProgress:
    """Moves a bar of pairs in step with the tokens that are scored, so that its rate is steady."""

    def __init__(self, progress: "tqdm[Any]", num_pairs: int, num_tokens: int):
        self.progress, self.num_pairs, self.num_tokens = progress, num_pairs, num_tokens
        self.tokens_done = self.pairs_shown = 0

    def advance(self, tokens: int) -> None:
        self.tokens_done += tokens
        pairs = self.num_pairs * self.tokens_done // self.num_tokens
        self.progress.update(pairs - self.pairs_shown)
        self.pairs_shown = pairs


def one_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made on a thread while the one before it is in use."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as thread:
        future = thread.submit(next, items, end)
        while (item := future.result()) is not end:
            future = thread.submit(next, items, end)
            yield item  # type: ignore[misc]

"""From pairs to logits: a stream of chunks, each tokenized, scored in batches by tokens, and put back in order."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import Any, TypeVar

import torch
from tqdm.auto import tqdm

from ..prompts import EncodedPairs, PromptEncoder
from .engine import CHUNK_PAIRS, Engine

logger = logging.getLogger(__name__)

# Where the device waits for the tokens of the first chunk, it is smaller.
FIRST_CHUNK_PAIRS = 1024
CHUNK_CHARACTERS = 4_000_000

Pair = tuple[str, str]
Item = TypeVar("Item")
Result = TypeVar("Result")


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


def split_into_chunks(
    pairs: Iterable[Pair], chunk_pairs: int, *, first_chunk_pairs: int | None = None
) -> Iterator[list[Pair]]:
    """
    Pairs in lists of at most `chunk_pairs`, and of fewer where texts are long. Where `first_chunk_pairs` is given, the
    first list has at most so many, and each one after it twice as many as the one before.
    """
    most_characters = CHUNK_CHARACTERS * max(1, chunk_pairs // CHUNK_PAIRS)
    most_pairs = chunk_pairs if first_chunk_pairs is None else min(chunk_pairs, first_chunk_pairs)
    chunk: list[Pair] = []
    characters = 0
    for pair in pairs:
        chunk.append(pair)
        characters += len(pair[0]) + len(pair[1])
        if len(chunk) == most_pairs or characters >= most_characters:
            yield chunk
            chunk, characters = [], 0
            most_pairs = min(chunk_pairs, 2 * most_pairs)
    if chunk:
        yield chunk


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
        is_ahead = self.engine.tokenizes_ahead
        first = FIRST_CHUNK_PAIRS if is_ahead else None
        chunks = split_into_chunks(pairs, self.engine.chunk_pairs, first_chunk_pairs=first)
        return torch.cat([torch.empty(0, self.num_labels), *self.stream(chunks)])

    def stream(self, chunks: Iterable[Sequence[Pair]]) -> Iterator[torch.Tensor]:
        """Yields the logits of each chunk. An accelerator computes one while the next one is tokenized."""
        mapped = map_ahead if self.engine.tokenizes_ahead else map
        return map(self.score_chunk, mapped(self.encode_chunk, chunks))

    def encode_chunk(self, chunk: Sequence[Pair]) -> EncodedChunk:
        """Equal pairs are one, so that their scores tie."""
        numbers = {pair: number for number, pair in enumerate(dict.fromkeys(chunk))}
        encoded = self.encoder.encode(list(numbers), long_document=self.long_document)
        return EncodedChunk(encoded, [numbers[pair] for pair in chunk])

    def score_chunk(self, chunk: EncodedChunk) -> torch.Tensor:
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
    """Moves a bar of pairs in step with the tokens that are scored."""

    def __init__(self, progress: "tqdm[Any]", num_pairs: int, num_tokens: int):
        self.progress, self.num_pairs, self.num_tokens = progress, num_pairs, num_tokens
        self.tokens_done = self.pairs_shown = 0

    def advance(self, tokens: int) -> None:
        self.tokens_done += tokens
        pairs = self.num_pairs * self.tokens_done // max(1, self.num_tokens)
        self.progress.update(pairs - self.pairs_shown)
        self.pairs_shown = pairs


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What `map` yields, each result computed on a thread while the one before it is in use."""
    with ThreadPoolExecutor(1, "tokenizer") as thread:
        pending: Future[Result] | None = None
        for item in items:
            following = thread.submit(function, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()

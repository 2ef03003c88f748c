"""From pairs to logits: a stream of chunks, each tokenized, scored in batches by tokens, and put back in order."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
from tqdm.auto import tqdm

from ..configuration_llama_bidir import LlamaBidirectionalConfig
from ..prompts import EncodedPairs, Pair, PromptEncoder, check_long_document
from ..utils.errors import ScoreError
from ..utils.validation import check_chunk, check_positive_int
from .device import Devices
from .engine import CHUNK_PAIRS, Engine
from .finite import NotFinite
from .packing import empty_logits
from .probability import Activation

logger = logging.getLogger(__name__)

# The first chunk is smaller where the device waits for its tokens.
FIRST_CHUNK_PAIRS = 1024
CHUNK_CHARACTERS = 4_000_000

Item = TypeVar("Item")
Result = TypeVar("Result")


class ScoringOptions(TypedDict, total=False):
    """Keywords of [`~cross_encoder.CrossEncoder.predict`] that ranking passes on."""

    show_progress_bar: bool | None
    activation_fn: Activation | None
    device: Devices | None
    long_document: str | None
    max_tokens_per_batch: int | None
    instruction: str | None


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
        """Counts the pairs at `positions` of `encoded`."""
        windows = [encoded.num_windows[position] for position in positions]
        self.num_pairs += len(positions)
        self.num_truncated += sum(encoded.is_truncated[position] for position in positions)
        self.num_windowed += sum(count > 1 for count in windows)
        self.num_windows += sum(count for count in windows if count > 1)


@dataclass
class EncodedChunk:
    """The distinct pairs of a chunk, tokenized. Pair i of the chunk is number `positions[i]` of `encoded`."""

    encoded: EncodedPairs
    positions: list[int]


def split_into_chunks(
    pairs: Iterable[Pair], chunk_pairs: int, *, first_chunk_pairs: int | None = None
) -> Iterator[list[Pair]]:
    """
    Yields pairs in lists of at most `chunk_pairs`, and of fewer if texts are long. If `first_chunk_pairs` is given, the
    first list has at most that many, and each following list at most twice as many as the one before.
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


def distinct(pairs: Iterable[Pair]) -> tuple[list[Pair], list[int]]:
    """Returns each pair once, in the order of its first occurrence, and the position of every pair among them."""
    positions: dict[Pair, int] = {}
    found = [positions.setdefault(pair, len(positions)) for pair in pairs]
    return list(positions), found


class Scorer:
    """
    Scores pairs as they come, chunk by chunk, on an engine.

    Args:
        encoder: renders and tokenizes pairs.
        engine: computes logits.
        progress: a bar that counts pairs.
        num_labels: logits per pair.
        max_tokens, max_sequences: of a batch (see [`Engine.logits`]).
        long_document: see [`PromptEncoder.encode`].
        activation_fn: turns the logits of a chunk into scores; None returns the logits.
        model: the model that gives the logits, to explain logits that are not finite.
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
        activation_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        model: Any = None,
    ):
        self.encoder, self.engine, self.progress, self.num_labels = encoder, engine, progress, num_labels
        self.max_tokens, self.max_sequences, self.long_document = max_tokens, max_sequences, long_document
        self.activation_fn, self.model = activation_fn, model
        self.tally = Tally()
        self.not_finite = NotFinite()

    def score(self, pairs: Iterable[Pair]) -> torch.Tensor:
        """
        Returns the scores of pairs on the CPU, in their order: float32 of shape `(num_pairs,)`, or
        `(num_pairs, num_labels)` for several labels, or what the activation makes of these.
        """
        return self.activate(self.logits(pairs))

    def logits(self, pairs: Iterable[Pair]) -> torch.Tensor:
        """Returns float32 logits of shape `(num_pairs, num_labels)` on the CPU, in the order of the pairs."""
        first = FIRST_CHUNK_PAIRS if self.engine.tokenizes_ahead else None
        chunks = split_into_chunks(pairs, self.engine.chunk_pairs, first_chunk_pairs=first)
        return torch.cat([empty_logits(0, self.num_labels), *self._logits_of_chunks(chunks)])

    def stream(self, chunks: Iterable[Sequence[Pair]]) -> Iterator[torch.Tensor]:
        """Yields the scores of each chunk, as [`score`] returns them."""
        return map(self.activate, self._logits_of_chunks(chunks))

    def activate(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns the scores of the next `(num_pairs, num_labels)` logits, and counts those that are not finite."""
        self.not_finite.add(logits)
        scores = logits.squeeze(-1) if self.num_labels == 1 else logits
        return scores if self.activation_fn is None else self.activation_fn(scores)

    def log(self) -> None:
        """Reports once how many pairs were cut or split, and how many have NaN or infinite logits."""
        tally, limit = self.tally, f"longer than {self.encoder.max_length} tokens"
        if tally.num_truncated:
            logger.warning(
                f"{tally.num_truncated} of {tally.num_pairs} pairs were {limit} and were cut to fit: raise max_length "
                "to keep more"
            )
        if tally.num_windowed:
            logger.warning(
                f"{tally.num_windowed} of {tally.num_pairs} pairs were {limit} and were scored in {tally.num_windows} "
                "windows, the best of which counts"
            )
        if self.not_finite.first is not None and tally.num_pairs:  # only the first of several processes counts pairs
            logger.warning(self.not_finite.describe(self.model))

    def _logits_of_chunks(self, chunks: Iterable[Sequence[Pair]]) -> Iterator[torch.Tensor]:
        """An accelerator computes a chunk while the next one is tokenized."""
        mapped = map_ahead if self.engine.tokenizes_ahead else map
        return map(self._score_chunk, mapped(self._encode_chunk, chunks))

    def _encode_chunk(self, chunk: Sequence[Pair]) -> EncodedChunk:
        """Equal pairs are encoded once, so their scores tie."""
        pairs, positions = distinct(chunk)
        return EncodedChunk(self.encoder.encode(pairs, long_document=self.long_document), positions)

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
    """Advances a bar of pairs in step with the tokens that are scored."""

    def __init__(self, progress: "tqdm[Any]", num_pairs: int, num_tokens: int):
        self.progress, self.num_pairs, self.num_tokens = progress, num_pairs, num_tokens
        self.tokens_done = self.pairs_shown = 0

    def advance(self, tokens: int) -> None:
        self.tokens_done += tokens
        pairs = self.num_pairs * self.tokens_done // max(1, self.num_tokens)
        self.progress.update(pairs - self.pairs_shown)
        self.pairs_shown = pairs


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yields what `map` yields; a thread computes each result while the one before it is in use."""
    with ThreadPoolExecutor(1, "tokenizer") as thread:
        pending: Future[Result] | None = None
        for item in items:
            following = thread.submit(function, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def check_limits(batch_size: Any, max_tokens_per_batch: Any, long_document: Any) -> tuple[int | None, int | None]:
    """Returns the two sizes as ints; raises ValueError for an argument that breaks its rule. Each may be None."""
    if long_document is not None:
        check_long_document(long_document)
    batch_size = check_positive_int("batch_size", batch_size)
    return batch_size, check_positive_int("max_tokens_per_batch", max_tokens_per_batch)


def check_ranking(config: LlamaBidirectionalConfig, top_k: Any, options: Mapping[str, Any]) -> int | None:
    """Returns `top_k`; raises ValueError for a model or a value that cannot rank, TypeError for an unknown keyword."""
    check_one_label(config, "ranking")
    top_k = check_positive_int("top_k", top_k)
    known = ScoringOptions.__annotations__
    for name in options.keys() - known.keys():
        raise TypeError(f"rank and rank_batch take no argument {name!r}, only {', '.join(known)}")
    return top_k


def score_chunks(scorer: Scorer, chunks: Iterable[Sequence[Pair]]) -> Iterator[np.ndarray]:
    """
    Yields the float32 scores of each chunk, and reports at the end what happened to all pairs.

    Raises:
        TypeError, ValueError: a chunk is not a list of pairs of strings, with its number.
    """
    for scores in scorer.stream(check_chunk(number, chunk) for number, chunk in enumerate(chunks)):
        yield scores.float().cpu().numpy()
    scorer.log()


def check_one_label(config: LlamaBidirectionalConfig, work: str) -> None:
    """Raises ValueError, which names the work, unless the model gives one score per pair."""
    if config.num_labels != 1:
        raise ValueError(
            f"{work} needs one score per pair, but the model has {config.num_labels} labels: use a model with one "
            "label, or predict"
        )


def convert_scores(scores: torch.Tensor, *, is_single: bool, to_numpy: bool, to_tensor: bool) -> Any:
    """Returns scores as a tensor, as a float32 numpy array or as a list of tensors; those of one pair as one value."""
    scores = scores[0] if is_single else scores
    if to_tensor:
        return scores
    if to_numpy:
        array = scores.float().cpu().numpy()
        return array if array.ndim else np.float32(array)
    return scores if is_single else list(scores)


def rank_documents(
    query: str, documents: Sequence[str], scores: Iterable[float], top_k: int | None, return_documents: bool
) -> list[dict[str, Any]]:
    """
    Ranks the documents of a query by falling score; equal scores keep their order.

    Returns:
        the first `top_k` results, as [`~cross_encoder.CrossEncoder.rank`] documents them.

    Raises:
        ScoreError: the activation has turned a logit into NaN.
    """
    results: list[dict[str, Any]] = []
    for corpus_id, (document, score) in enumerate(zip(documents, scores, strict=True)):
        if score != score:
            raise ScoreError(
                f"the score of document {corpus_id} for query {query!r} is NaN and has no rank, although its logit "
                "is finite: check activation_fn"
            )
        text = {"text": document} if return_documents else {}
        results.append({"corpus_id": corpus_id, "score": float(score), **text})
    return sorted(results, key=lambda result: -result["score"])[:top_k]

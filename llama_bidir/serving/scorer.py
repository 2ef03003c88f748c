"""A reranker behind the server: texts to scores, batched with those of other requests."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from ..cross_encoder import CrossEncoder
from ..prompts import Pair, PromptEncoder
from ..scoring.finite import find_cause
from ..scoring.pipeline import check_one_label, distinct
from ..scoring.probability import Probability, resolve_activation
from ..utils.errors import ScoreError
from ..utils.validation import check_text
from .batching import Batcher

# The budgets of tokens that one round of requests takes: more keep the device busier, and fewer wait less.
ROUND = 4
SLICE_PAIRS = 256
# English has about 4. More would mostly be cut.
CHARACTERS_PER_TOKEN = 8


class TooManyTokensError(ValueError):
    """A request has more tokens than the limit."""


class Encoded(NamedTuple):
    """
    The token ids of a request.

    Args:
        sequences: one per window of each distinct pair.
        num_windows: of each distinct pair.
        positions: for each pair of the request, which distinct pair it is.
        num_truncated: how many distinct pairs lost tokens.
    """

    sequences: list[list[int]]
    num_windows: list[int]
    positions: list[int]
    num_truncated: int

    @property
    def num_tokens(self) -> int:
        """The tokens that are computed."""
        return sum(map(len, self.sequences))


class ServedReranker:
    """
    Scores requests. The score of a pair does not depend on the requests that share its batch.

    Args:
        cross_encoder: the reranker, with one label.
        name: what the answers call it.
        activation_fn: of the scores, as in [`CrossEncoder`]; None gives raw logits.
        max_tokens_per_batch: chosen for the device when None.
        max_tokens_per_request: limit of a request.
        max_waiting, max_waiting_tokens: limits of the queue (see [`Batcher`]).
        on_batch: see [`Batcher`].
    """

    def __init__(
        self,
        cross_encoder: CrossEncoder,
        name: str,
        *,
        activation_fn: Any = None,
        max_tokens_per_batch: int | None = None,
        max_tokens_per_request: int = 1_000_000,
        max_waiting: int = 2048,
        max_waiting_tokens: int = 20_000_000,
        **batching: Any,
    ):
        check_one_label(cross_encoder.config, "serving")
        self.cross_encoder, self.name = cross_encoder, name
        self.activation_fn = resolve_activation(activation_fn, cross_encoder.config)
        self.max_tokens_per_request = max_tokens_per_request
        self._encoder = PromptEncoder.from_config(
            cross_encoder.tokenizer, cross_encoder.config, parse_special_tokens=cross_encoder.parse_special_tokens
        )
        # A pool of its own: a request that is tokenized must not block others that only need a thread for a moment.
        self.tokenizing = ThreadPoolExecutor(os.cpu_count() or 1, "tokenize")
        # The engine divides these among its parallel calls or its devices.
        max_tokens = max_tokens_per_batch or ROUND * cross_encoder.engine().token_budget()
        self.batcher = Batcher(
            cross_encoder.engine,
            max_tokens=max_tokens,
            max_waiting=max_waiting,
            max_waiting_tokens=max_waiting_tokens,
            recover=cross_encoder.close,
            **batching,
        )

    def encode(
        self, pairs: Sequence[tuple[str, str]], instruction: str | None, should_stop: Callable[[], bool] = lambda: False
    ) -> Encoded:
        """
        Renders and tokenizes pairs, a slice at a time.

        Args:
            pairs: (query, document) strings.
            instruction: of all pairs, or None.
            should_stop: asked between slices, to give up a request that nobody waits for.

        Raises:
            ValueError: the template has no field for the instruction, or leaves no room for a pair.
            TooManyTokensError: the request is too large.
            InterruptedError: `should_stop` returned True.
        """
        queries = {query for query, _ in pairs}
        for name, texts in (("instruction", [instruction or ""]), ("query", queries)):
            for text in texts:
                check_text(name, text)
        for _, document in pairs:
            check_text("document", document)
        # Each pair renders its query, so a small body can be a large amount of text.
        characters = sum(len(query) + len(document) for query, document in pairs) + len(pairs) * len(instruction or "")
        if characters > CHARACTERS_PER_TOKEN * self.max_tokens_per_request:
            raise TooManyTokensError(
                f"the prompts have {characters} characters, and at most "
                f"{CHARACTERS_PER_TOKEN * self.max_tokens_per_request} are allowed: send fewer or shorter texts"
            )
        with_instruction: list[Pair] = [(query, passage, instruction) for query, passage in pairs]
        unique, positions = distinct(with_instruction)
        sequences: list[list[int]] = []
        num_windows: list[int] = []
        num_tokens = num_truncated = 0
        for start in range(0, len(unique), SLICE_PAIRS):
            if should_stop():
                raise InterruptedError("nobody waits for this request")
            part = self._encoder.encode(
                unique[start : start + SLICE_PAIRS], long_document=self.cross_encoder.long_document
            )
            sequences += part.input_ids
            num_windows += part.num_windows
            num_truncated += part.num_truncated
            num_tokens += sum(map(len, part.input_ids))
            if num_tokens > self.max_tokens_per_request:
                raise TooManyTokensError(
                    f"the request has more than {self.max_tokens_per_request} tokens, which is the limit: send "
                    "fewer or shorter documents"
                )
        return Encoded(sequences, num_windows, positions, num_truncated)

    def submit(self, encoded: Encoded) -> "Future[torch.Tensor]":
        """Queues a request and returns a future of its logits. Raises the errors of [`Batcher.submit`]."""
        return self.batcher.submit(encoded.sequences)

    def scores(self, encoded: Encoded, logits: torch.Tensor) -> torch.Tensor:
        """
        Returns the float32 logits of the pairs of a request, from those of its sequences.

        Raises:
            ScoreError: one is NaN or infinite.
        """
        values = torch.stack([windows.amax() for windows in logits.split(encoded.num_windows)])[encoded.positions]
        if not values.isfinite().all():
            position = int((~values.isfinite()).nonzero()[0])
            raise ScoreError(f"the score of document {position} is {float(values[position])}: {self.explain()}")
        return values

    def activate(self, values: torch.Tensor) -> list[float]:
        """Returns the scores that the server gives for logits."""
        scores: list[float] = (values if self.activation_fn is None else self.activation_fn(values)).tolist()
        return scores

    def normalize(self, values: torch.Tensor) -> list[float]:
        """Returns numbers between 0 and 1: calibrated probabilities if there are any, else the sigmoid."""
        calibration = self.cross_encoder.config.calibration
        scores: list[float] = (values.sigmoid() if calibration is None else Probability(**calibration)(values)).tolist()
        return scores

    def explain(self) -> str:
        """Returns the likely cause of a score that is not finite. Finding it reads all weights."""
        return str(find_cause(self.cross_encoder.model))

    def warm_up(self) -> None:
        """Scores a short and a long pair, which allocates memory and starts worker processes."""
        longest = self.cross_encoder.config.rerank_max_length
        (ids,) = self._encoder.encode([("warm", "up " * longest)]).input_ids
        self.batcher.submit([ids[:8], ids]).result()

    def close(self, *, cancel: bool = False) -> None:
        """Finishes the requests in progress, or cancels them, and stops worker processes."""
        self.tokenizing.shutdown(wait=not cancel, cancel_futures=cancel)
        self.batcher.close(cancel=cancel)
        self.cross_encoder.close()

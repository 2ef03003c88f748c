"""Finds the pairs whose logits are NaN or infinite, and the likely cause."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..utils.errors import ScoreError

# Below this temperature, ordinary logits overflow float32.
SMALLEST_TEMPERATURE = 1e-30


@dataclass
class NotFinite:
    """Counts the pairs of a call whose logits are NaN or infinite."""

    num_pairs: int = 0
    num_nan: int = 0
    num_infinite: int = 0
    first: int | None = None

    def add(self, logits: torch.Tensor) -> None:
        """Counts the next logits, of shape `(num_pairs, num_labels)`."""
        is_bad = ~logits.isfinite().all(dim=-1)
        if is_bad.any():
            num_nan = int(logits.isnan().any(dim=-1).sum())
            self.num_nan += num_nan
            self.num_infinite += int(is_bad.sum()) - num_nan
            if self.first is None:
                self.first = self.num_pairs + int(is_bad.nonzero()[0])
        self.num_pairs += len(logits)

    @property
    def kind(self) -> str:
        """The kind of the logits: `NaN`, `infinite`, or both."""
        return " or ".join(["NaN"] * bool(self.num_nan) + ["infinite"] * bool(self.num_infinite))

    def describe(self, model: Any) -> str:
        """Returns a message with the number of these pairs, the first one, and the likely cause."""
        count = self.num_nan + self.num_infinite
        return (
            f"{count} of {self.num_pairs} pairs have {self.kind} logits, first pair {self.first}: {find_cause(model)}"
        )


class RankedActivation:
    """
    An activation for ranking. It refuses logits that are NaN or infinite.

    Args:
        activation_fn: applied to finite logits; None leaves them as they are.
        queries, groups: the queries, and the documents of each query, in the order of the logits.
        model: the model that gives the logits.
    """

    def __init__(
        self,
        activation_fn: Callable[[torch.Tensor], torch.Tensor] | None,
        queries: Sequence[str],
        groups: Sequence[Sequence[str]],
        model: Any,
    ):
        self.activation_fn, self.queries, self.groups, self.model = activation_fn, queries, groups, model

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Returns the scores of all logits. Raises ScoreError, naming the first document whose logit is not finite."""
        not_finite = NotFinite()
        not_finite.add(logits[:, None])
        if not_finite.first is not None:
            value, corpus_id = float(logits[not_finite.first]), not_finite.first
            for query, documents in zip(self.queries, self.groups, strict=True):
                if corpus_id < len(documents):
                    raise ScoreError(
                        f"the score of document {corpus_id} for query {query!r} is "
                        f"{'NaN' if value != value else 'infinite'} and has no rank: {find_cause(self.model)}"
                    )
                corpus_id -= len(documents)
        return logits if self.activation_fn is None else self.activation_fn(logits)


def find_cause(model: Any) -> str:
    """
    Returns why a model probably gives logits that are NaN or infinite, and what to do.

    Args:
        model: a reranker, an adapter on one, or an exported graph. All of its weights are read, which takes time.
    """
    if not isinstance(model, torch.nn.Module):
        return "the exported graph overflows: export the checkpoint again and compare its scores"
    config: Any = model.config
    for name, weight in model.named_parameters():
        if not _is_finite(weight):
            return (
                f"the weights hold NaN or infinity, first in {name}: check the checkpoint, or use bfloat16 or float32"
            )
    for name, buffer in model.named_buffers():
        if not _is_finite(buffer):
            rope = {key: value for key, value in sorted(config.rope_parameters.items()) if key.startswith("rope")}
            return (
                f"the frequencies {name} of the rotary embedding hold NaN or infinity: correct rope_parameters, {rope}"
            )
    if config.temperature < SMALLEST_TEMPERATURE:
        return (
            f"temperature is {config.temperature}, so small that logits overflow float32: raise it, 1.0 has no effect"
        )
    if model.dtype == torch.float16:
        return "float16 overflows above 65504: use bfloat16 or float32"
    return f"the weights are finite, but {str(model.dtype).removeprefix('torch.')} overflows: check the checkpoint"


def _is_finite(tensor: torch.Tensor) -> bool:
    """Returns whether all values are finite. Assumes it for quantized weights and for weights on the meta device."""
    is_readable = type(tensor.data) is torch.Tensor and tensor.is_floating_point() and not tensor.is_meta
    return not is_readable or tensor.dtype.itemsize < 2 or bool(tensor.isfinite().all())

"""Scores as calibrated probabilities."""

from collections.abc import Callable
from typing import Any, Literal

import torch

from ..configuration_llama_bidir import LlamaBidirectionalConfig

PROBABILITY = "probability"
# Turns scores into others, or `"probability"`.
Activation = Callable[[torch.Tensor], torch.Tensor] | Literal["probability"]


class Probability:
    """
    The probability of relevance of a score, `sigmoid(slope * score + offset)` (Platt scaling). `llama-bidir calibrate`
    fits the two numbers.

    Args:
        slope: above 0, so that the order of scores stays.
        offset: any number.
    """

    def __init__(self, slope: float, offset: float):
        self.slope, self.offset = slope, offset

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Returns float32 probabilities of the shape of `scores`."""
        return torch.sigmoid(self.slope * scores.double() + self.offset).float()


def rank_by(activation_fn: Any) -> Any:
    """Returns an activation to rank by. For `"probability"`, this is the logit: probabilities near 1 are rounded."""
    return torch.nn.Identity() if activation_fn == PROBABILITY else activation_fn


def resolve_activation(
    activation_fn: Any, config: LlamaBidirectionalConfig
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """
    Returns the function that an activation stands for, or None.

    Raises:
        ValueError: it is `"probability"` and the reranker is not calibrated, or it is another text.
        TypeError: it is neither a function nor text.
    """
    if activation_fn is None or callable(activation_fn):
        return activation_fn
    if not isinstance(activation_fn, str):
        raise TypeError(f"activation_fn must be a function, 'probability' or None, got {activation_fn!r}")
    if activation_fn != PROBABILITY:
        raise ValueError(f"activation_fn must be a function, 'probability' or None, got {activation_fn!r}")
    if config.calibration is None:
        raise ValueError(
            "activation_fn 'probability' needs a calibrated reranker, and this one is not: fit it with `llama-bidir "
            "calibrate --model M --data ROWS`, or pass torch.sigmoid for numbers between 0 and 1 that are no "
            "probabilities"
        )
    return Probability(**config.calibration)

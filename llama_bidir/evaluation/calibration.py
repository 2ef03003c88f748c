"""Calibration: from scores to probabilities of relevance, and how good such probabilities are."""

import os
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..utils.extras import require

Numbers = NDArray[np.float64]

NUM_BINS = 15
MAX_ITERATIONS = 200
TOLERANCE = 1e-16  # of the decrease of the loss that a step of Newton's method promises


class Bin(NamedTuple):
    """The pairs whose probabilities lie in one interval: their mean probability, the share of them that is relevant,
    and their number."""

    probability: float
    relevant: float
    num_pairs: int


def fit_calibration(scores: NDArray[Any], labels: NDArray[Any]) -> tuple[float, float]:
    """
    Fits the slope and the offset of `sigmoid(slope * score + offset)` by the smallest log loss ([Platt
    1999](https://www.researchgate.net/publication/2594015), with his targets, which keep the slope finite if scores
    separate the labels).

    Args:
        scores: finite numbers, one per pair.
        labels: True for a relevant pair.

    Returns:
        the slope, above 0, and the offset.

    Raises:
        ValueError: all labels are equal, all scores are equal, or relevant pairs do not have higher scores.
    """
    labels = np.asarray(labels, dtype=bool)
    num_relevant, num_others = int(labels.sum()), int((~labels).sum())
    if not num_relevant or not num_others:
        kind = "relevant" if num_relevant else "irrelevant"
        raise ValueError(f"calibration needs relevant and irrelevant pairs, but all {len(labels)} are {kind}")
    values = np.asarray(scores, dtype=np.float64)
    if not np.std(values) > 0:
        raise ValueError(f"calibration needs scores that differ, but all {len(labels)} are {values[0]:g}")
    targets = np.where(labels, (num_relevant + 1) / (num_relevant + 2), 1 / (num_others + 2))
    slope, offset = _minimize(np.stack([values, np.ones_like(values)], axis=1), targets)
    if not slope > 0:
        raise ValueError(
            "the scores of relevant pairs are not higher than those of other pairs, so no probability can keep their "
            "order: train the reranker, or check the labels"
        )
    return slope, offset


def _minimize(inputs: Numbers, targets: Numbers) -> tuple[float, float]:
    """Returns the two weights of `inputs` with the smallest log loss, by Newton's method with a line search."""
    weights = np.zeros(2)

    def loss(weights: Numbers) -> float:
        logits = inputs @ weights
        return float(np.mean(np.logaddexp(0, logits) - targets * logits))

    for _ in range(MAX_ITERATIONS):
        probabilities = np.exp(-np.logaddexp(0, -(inputs @ weights)))
        gradient = inputs.T @ (probabilities - targets) / len(targets)
        curvature = inputs.T @ (inputs * (probabilities * (1 - probabilities))[:, None]) / len(targets)
        step = np.linalg.lstsq(curvature, gradient)[0]
        decrease, size = float(gradient @ step), 1.0
        if decrease < TOLERANCE:
            break
        while loss(weights - size * step) > loss(weights) - 1e-4 * size * decrease and size > 1e-10:
            size /= 2
        weights = weights - size * step
    slope, offset = weights.tolist()
    return slope, offset


def log_loss(probabilities: NDArray[Any], labels: NDArray[Any]) -> float:
    """Returns the mean of -log(probability of the true label). Probabilities are kept 1e-15 away from 0 and 1."""
    clipped = np.clip(np.asarray(probabilities, dtype=np.float64), 1e-15, 1 - 1e-15)
    return float(-np.mean(np.log(np.where(np.asarray(labels, dtype=bool), clipped, 1 - clipped))))


def reliability_bins(probabilities: NDArray[Any], labels: NDArray[Any], num_bins: int = NUM_BINS) -> list[Bin]:
    """Returns the intervals of equal width between 0 and 1 that hold a pair, in order."""
    numbers = np.minimum((np.asarray(probabilities) * num_bins).astype(int), num_bins - 1)
    chosen = [numbers == number for number in np.unique(numbers)]
    return [Bin(float(np.mean(probabilities[mask])), float(np.mean(labels[mask])), int(mask.sum())) for mask in chosen]


def expected_calibration_error(probabilities: NDArray[Any], labels: NDArray[Any], num_bins: int = NUM_BINS) -> float:
    """
    Returns the mean difference between the probability and the share of relevant pairs, over intervals of equal width,
    weighted by their pairs ([Guo et al. 2017](https://arxiv.org/abs/1706.04599)).
    """
    bins = reliability_bins(probabilities, labels, num_bins)
    return sum(each.num_pairs * abs(each.probability - each.relevant) for each in bins) / len(labels)


def plot_reliability(
    path: str | os.PathLike[str], before: list[Bin], after: list[Bin], *, title: str, num_bins: int = NUM_BINS
) -> None:
    """
    Draws the share of relevant pairs by probability, before and after calibration, over the number of pairs.

    Args:
        path: the PNG file to write.
        before, after: see [`reliability_bins`].
        title: of the plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = require("matplotlib.figure", "eval").Figure(figsize=(5, 5.6), dpi=150, layout="constrained")
    axes, counts = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    axes.plot([0, 1], [0, 1], linestyle="--", color="gray", label="perfect")
    width = 0.4 / num_bins
    for bins, label, color, shift in (
        (before, "before", "#b07d2f", -width / 2),
        (after, "after", "#2f6fb0", width / 2),
    ):
        x = [each.probability for each in bins]
        axes.plot(x, [each.relevant for each in bins], marker="o", color=color, label=label)
        middles = [(min(int(each.probability * num_bins), num_bins - 1) + 0.5) / num_bins + shift for each in bins]
        counts.bar(middles, [each.num_pairs for each in bins], width=width, color=color)
    axes.set(ylabel="share of relevant pairs", xlim=(0, 1), ylim=(-0.02, 1.02), title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    counts.set(xlabel="probability", ylabel="pairs", yscale="log")
    counts.grid(alpha=0.3)
    figure.savefig(path)

"""Losses of random groups against slow ones in plain Python, one group and one pair at a time."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from llama_bidir.losses import LAMBDA_MU, LOSSES

from .target import Target

GARBAGE = [0.0, math.nan, math.inf, -math.inf, -100.0, 1e30]


def softplus(x: float) -> float:
    """log(1 + exp(x)), also where exp(x) is too large."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def log_sum_exp(values: Sequence[float]) -> float:
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def pairs_of(labels: Sequence[float]) -> list[tuple[int, int]]:
    places = range(len(labels))
    return [(better, worse) for better in places for worse in places if labels[better] > labels[worse]]


def listwise_cross_entropy(scores: Sequence[float], labels: Sequence[float], teacher: Sequence[float]) -> float:
    shares = [label / sum(labels) for label in labels] if any(labels) else labels
    return math.fsum(share * (log_sum_exp(scores) - score) for score, share in zip(scores, shares, strict=True))


def binary_cross_entropy(scores: Sequence[float], labels: Sequence[float], teacher: Sequence[float]) -> float:
    return mean([softplus(-score if label > 0 else score) for score, label in zip(scores, labels, strict=True)])


def ranknet(scores: Sequence[float], labels: Sequence[float], teacher: Sequence[float]) -> float:
    return mean([softplus(scores[worse] - scores[better]) / math.log(2) for better, worse in pairs_of(labels)])


def lambda_(scores: Sequence[float], labels: Sequence[float], teacher: Sequence[float]) -> float:
    def discount(rank: int) -> float:
        return 1 / math.log2(1 + rank)

    items = list(zip(scores, labels, strict=True))
    ranks = [
        1 + sum(other > score or (other == score and relevance < label) for other, relevance in items)
        for score, label in items
    ]
    ideal = sum((2**label - 1) * discount(rank) for rank, label in enumerate(sorted(labels, reverse=True), start=1))
    losses = []
    for better, worse in pairs_of(labels):
        distance = max(1, abs(ranks[better] - ranks[worse]))
        rho = abs(discount(ranks[better]) - discount(ranks[worse]))
        delta = discount(distance) - discount(distance + 1)
        gain = (2 ** labels[better] - 2 ** labels[worse]) / ideal
        losses.append((rho + LAMBDA_MU * delta) * gain * softplus(scores[worse] - scores[better]) / math.log(2))
    return mean(losses)


def list_mle(scores: Sequence[float], labels: Sequence[float], teacher: Sequence[float]) -> float:
    if len(set(labels)) < 2:
        return 0.0
    return math.fsum(
        log_sum_exp([other for other, below in zip(scores, labels, strict=True) if below <= label]) - score
        for score, label in zip(scores, labels, strict=True)
    )


def margin_mse(scores: Sequence[float], labels: Sequence[float], teacher: Sequence[float]) -> float:
    relevant = [float(label > 0) for label in labels]
    return mean([(scores[p] - scores[n] - (teacher[p] - teacher[n])) ** 2 for p, n in pairs_of(relevant)])


def kl_div(scores: Sequence[float], labels: Sequence[float], teacher: Sequence[float]) -> float:
    if not scores:
        return 0.0
    student, other = log_sum_exp(scores), log_sum_exp(teacher)
    return math.fsum(math.exp(t - other) * ((t - other) - (s - student)) for s, t in zip(scores, teacher, strict=True))


def mse(scores: Sequence[float], labels: Sequence[float], teacher: Sequence[float]) -> float:
    return mean([(score - other) ** 2 for score, other in zip(scores, teacher, strict=True)])


SLOW = {
    "listwise_cross_entropy": listwise_cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "ranknet": ranknet,
    "lambda": lambda_,
    "list_mle": list_mle,
    "margin_mse": margin_mse,
    "kl_div": kl_div,
    "mse": mse,
}


def check_loss(
    name: str, groups: list[list[tuple[float, int, float]]], garbage: float, order: Any, dtype: torch.dtype
) -> None:
    """A loss is the mean of the groups' slow losses, with finite gradients, whatever the order and the padding."""
    expected = mean([SLOW[name](*([*map(list, zip(*group, strict=True))] if group else [[]] * 3)) for group in groups])
    loss, gradient = compute(name, groups, garbage, dtype)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=dtype), **tolerance)
    assert torch.isfinite(gradient).all()
    assert torch.all(gradient[~mask_of(groups)] == 0)
    shuffled = [order.sample(group, len(group)) for group in groups]
    torch.testing.assert_close(compute(name, shuffled, garbage, dtype)[0], loss, **tolerance)


def mask_of(groups: list[list[Any]]) -> torch.Tensor:
    longest = max(map(len, groups))
    mask = [[place < len(group) for place in range(longest)] for group in groups]
    return torch.tensor(mask, dtype=torch.bool).reshape(len(groups), longest)


def compute(
    name: str, groups: list[list[tuple[float, int, float]]], garbage: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, groups))
    padded = [[*group, *[(garbage, garbage, garbage)] * (longest - len(group))] for group in groups]
    values = torch.tensor(padded, dtype=dtype).reshape(len(groups), longest, 3)
    scores, labels, teacher = values.unbind(dim=2)
    scores = scores.clone().requires_grad_()
    loss = LOSSES[name](scores, labels, mask_of(groups), teacher)
    return loss.detach(), torch.autograd.grad(loss, scores, allow_unused=True)[0].nan_to_num(nan=math.nan)


# Few values, so that scores tie.
scores = st.sampled_from([0.0, 0.5, -0.5, 1.0, 3.0, -20.0]) | st.floats(-50, 50, width=32)
items = st.tuples(scores, st.sampled_from([0, 0, 1, 2, 3]), scores)
TARGETS = [
    Target(
        "losses",
        check_loss,
        {
            "name": st.sampled_from(sorted(SLOW)),
            "groups": st.lists(st.lists(items, max_size=6), min_size=1, max_size=4),
            "garbage": st.sampled_from(GARBAGE),
            "order": st.randoms(use_true_random=False),
            "dtype": st.sampled_from([torch.float32, torch.float64]),
        },
        test_cases=150,
    )
]
assert SLOW.keys() == LOSSES.keys()

"""
Training losses: pure functions of the scores of groups of passages.

All take the same arguments and return a `torch.FloatTensor` of shape `()`: the mean over groups of each group's loss.
Batches with equal numbers of groups may thus be accumulated. Losses are computed in float32, or in float64 for float64
scores.

Args:
    scores (`torch.FloatTensor` of shape `(groups, group_size)`): logits.
    labels (`torch.Tensor` of shape `(groups, group_size)`): relevance, above 0 where the passage is relevant (higher is
        more relevant) and 0 where it is not.
    mask (`torch.BoolTensor` of shape `(groups, group_size)`, *optional*): True where there is a passage, by default
        everywhere. Where it is False, the values of the other tensors change neither the loss nor the gradients.
    teacher_scores (`torch.FloatTensor` of shape `(groups, group_size)`, *optional*): the scores of the same pairs by a
        teacher. Only the losses in `TEACHER_LOSSES` read them.

Raises:
    ValueError: the shapes differ, or a loss in `TEACHER_LOSSES` gets no `teacher_scores`.

A group that has nothing to compare (no relevant passage, no pair) contributes 0.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from .utils.names import nearest

# The value of labels and scores where there is no passage.
IGNORED = -100.0
# Weight of NDCG-Loss2 beside LambdaRank in NDCG-Loss2++.
LAMBDA_MU = 10.0

# Called as loss(scores, labels, mask=None, teacher_scores=None).
Loss = Callable[..., torch.Tensor]


def listwise_cross_entropy(
    scores: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None = None,
    teacher_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Cross entropy of the softmax over each group against its relevant passages, each in proportion to its relevance.

    With one positive this is the objective of NeMo AutoModel's cross-encoder recipe, and the ListNet top-one loss (Cao
    et al., Learning to Rank: From Pairwise Approach to Listwise Approach, ICML 2007) for one-hot relevance.
    """
    mask, scores, labels = _prepare(mask, scores, labels)
    relevance = labels.clamp(min=0)
    target = relevance / relevance.sum(dim=1, keepdim=True).clamp(min=torch.finfo(labels.dtype).tiny)
    return -(target * _log_probabilities(scores, mask)).sum(dim=1).mean()


def binary_cross_entropy(
    scores: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None = None,
    teacher_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy of the sigmoid of each score against whether the passage is relevant, averaged over each group."""
    mask, scores, labels = _prepare(mask, scores, labels)
    relevant = (labels > 0).to(scores.dtype)
    return _mean(nn.functional.binary_cross_entropy_with_logits(scores, relevant, reduction="none"), where=mask)


def ranknet(
    scores: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None = None,
    teacher_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    -log2(sigmoid(s_i - s_j)), averaged over the pairs of each group in which i is more relevant than j.

    RankNet (Burges et al., Learning to Rank using Gradient Descent, ICML 2005) in bits.
    """
    mask, scores, labels = _prepare(mask, scores, labels)
    return _mean(_pair_losses(scores), where=_preferences(labels, mask))


def lambda_loss(
    scores: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None = None,
    teacher_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    NDCG-Loss2++: RankNet with each pair weighted by what its order is worth in NDCG.

    As in RankNet, the mean is over the pairs of a group. The weight of a pair is (rho_ij + mu delta_ij) |G_i - G_j|,
    where G is the gain 2^label - 1 over the ideal DCG of the group, D(r) = log2(1 + r) the discount of rank r, rho_ij =
    |1 / D(r_i) - 1 / D(r_j)|, delta_ij = |1 / D(d) - 1 / D(d + 1)| for ranks d = |r_i - r_j| apart, and mu = 10
    (Wang et al., The LambdaLoss Framework for Ranking Metric Optimization, CIKM 2018).

    Among passages with the same score, the less relevant rank first, so every pair has a weight. Passages that are also
    equally relevant share the first of their ranks. The result does not depend on the order of the input.
    """
    mask, scores, labels = _prepare(mask, scores, labels)
    order, relevance = _differences(scores), _differences(labels)
    is_behind = ((order < 0) | ((order == 0) & (relevance > 0))) & mask[:, None, :]
    ranks = 1 + is_behind.sum(dim=2, dtype=scores.dtype)

    # 2^label - 1 over 2^top, which the ideal DCG divides out again: the gain itself is infinite from a label of 128.
    top = nn.functional.pad(labels, (0, 1)).amax(dim=1, keepdim=True)  # padded, because groups may have no passage
    gains = torch.exp2(labels - top) - torch.exp2(-top)
    ideal_ranks = torch.arange(1, scores.shape[1] + 1, dtype=scores.dtype, device=scores.device)
    ideal = (gains.sort(dim=1, descending=True).values * _discounted(ideal_ranks)).sum(dim=1, keepdim=True)
    gains = gains / ideal.clamp(min=torch.finfo(ideal.dtype).tiny)

    rho = _differences(_discounted(ranks)).abs()
    # Passages that are 0 ranks apart are not a pair.
    distances = _differences(ranks).abs().clamp(min=1)
    delta = _discounted(distances) - _discounted(distances + 1)
    weights = (rho + LAMBDA_MU * delta) * _differences(gains).abs()
    return _mean(weights * _pair_losses(scores), where=_preferences(labels, mask))


def list_mle(
    scores: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None = None,
    teacher_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Negative log likelihood of the order of the labels, drawing passages one by one from the softmax of those left.

    ListMLE (Xia et al., Listwise Approach to Learning to Rank: Theory and Algorithm, ICML 2008). Each passage is drawn
    from all passages whose label is not above its own (Breslow, Covariance Analysis of Censored Survival Data, 1974).
    The order of passages with equal labels thus does not matter. A group whose labels are all equal has no order.
    """
    mask, scores, labels = _prepare(mask, scores, labels)
    is_left = (_differences(labels) >= 0) & mask[:, None, :]
    left = scores[:, None, :].masked_fill(~is_left, torch.finfo(scores.dtype).min)
    losses = (left.logsumexp(dim=2) - scores).masked_fill(~mask, 0.0).sum(dim=1)
    has_order = _preferences(labels, mask).any(dim=2).any(dim=1)
    return losses.masked_fill(~has_order, 0.0).mean()


def margin_mse(
    scores: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None = None,
    teacher_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    ((s_p - s_n) - (t_p - t_n))^2 for the teacher's scores t, averaged over the pairs of a positive p and a negative n.

    Margin-MSE (Hofstätter et al., Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
    Distillation, 2020).
    """
    teacher_scores = _require_teacher(teacher_scores, "margin_mse")
    mask, scores, labels, teacher_scores = _prepare(mask, scores, labels, teacher_scores)
    relevant = (labels > 0).to(scores.dtype)
    errors = _differences(scores) - _differences(teacher_scores)
    return _mean(errors.square(), where=_preferences(relevant, mask))


def kl_div(
    scores: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None = None,
    teacher_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Kullback-Leibler divergence of the softmax of the scores from the softmax of the teacher's, each over the group.

    The labels are not read.
    """
    teacher_scores = _require_teacher(teacher_scores, "kl_div")
    mask, scores, _, teacher_scores = _prepare(mask, scores, labels, teacher_scores)
    teacher, student = _log_probabilities(teacher_scores, mask), _log_probabilities(scores, mask)
    return (teacher.exp() * (teacher - student)).sum(dim=1).mean()


def mse(
    scores: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor | None = None,
    teacher_scores: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    (s - t)^2 for the teacher's scores t, averaged over the passages of each group.

    The scores themselves are distilled, not their differences as in `margin_mse`. The labels are not read.
    """
    teacher_scores = _require_teacher(teacher_scores, "mse")
    mask, scores, _, teacher_scores = _prepare(mask, scores, labels, teacher_scores)
    return _mean((scores - teacher_scores).square(), where=mask)


LOSSES: dict[str, Loss] = {
    "listwise_cross_entropy": listwise_cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "ranknet": ranknet,
    "lambda": lambda_loss,
    "list_mle": list_mle,
    "margin_mse": margin_mse,
    "kl_div": kl_div,
    "mse": mse,
}
TEACHER_LOSSES = frozenset({"margin_mse", "kl_div", "mse"})
# They compare no passages with each other, so a group may be a single passage.
POINTWISE_LOSSES = frozenset({"binary_cross_entropy", "mse"})


class Mixture:
    """
    A weighted sum of losses, which is a loss itself.

    Args:
        weights: weight by name in `LOSSES`.

    Raises:
        ValueError: there is no loss, a name is unknown, or a weight is not a finite number above 0.
    """

    def __init__(self, weights: Mapping[str, float]):
        if not weights:
            raise ValueError(f"a mixture of losses must name at least one of {', '.join(LOSSES)}, got {weights!r}")
        for name, weight in weights.items():
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not (is_number and 0 < weight < math.inf):
                raise ValueError(f"the weight of the loss {name!r} must be a finite number above 0, got {weight!r}")
        self.weights = dict(weights)
        self._losses = {name: get_loss(name) for name in weights}

    def __call__(
        self,
        scores: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None = None,
        teacher_scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        parts = [
            weight * self._losses[name](scores, labels, mask, teacher_scores) for name, weight in self.weights.items()
        ]
        return torch.stack(parts).sum()


def get_loss(loss: str | Mapping[str, float] | Loss | None) -> Loss:
    """
    Returns the loss of that name, the [`Mixture`] of a mapping from names to weights, or `loss` itself if it is a
    function.

    Raises:
        ValueError: a name is unknown, or a weight breaks its rule.
    """
    if callable(loss):
        return loss
    if isinstance(loss, Mapping):
        return Mixture(loss)
    if loss not in LOSSES:
        raise ValueError(
            f"loss must be a function or one of {', '.join(LOSSES)}, got {loss!r}; the nearest is "
            f"{nearest(loss, LOSSES)!r}"
        )
    return LOSSES[loss]


def loss_names(loss: str | Mapping[str, float] | Loss | None) -> list[str]:
    """Returns the names of the losses of this module that a loss computes; none for any other function."""
    loss = get_loss(loss)
    return list(loss.weights) if isinstance(loss, Mixture) else [name for name in LOSSES if LOSSES[name] is loss]


def needs_teacher(loss: str | Mapping[str, float] | Loss | None) -> bool:
    """Whether a loss reads teacher scores."""
    return not TEACHER_LOSSES.isdisjoint(loss_names(loss))


def check_group_size(
    loss: str | Mapping[str, float] | Loss | None, group_size: int | None, name: str = "group_size"
) -> None:
    """Raises ValueError if groups are single passages and a loss compares passages."""
    comparing = [each for each in loss_names(loss) if each not in POINTWISE_LOSSES]
    if group_size == 1 and comparing:
        raise ValueError(f"{comparing[0]} compares the passages of a group: {name} must be at least 2")


def _require_teacher(teacher_scores: torch.Tensor | None, name: str) -> torch.Tensor:
    if teacher_scores is None:
        raise ValueError(f"{name} needs teacher_scores: give every row pos_score and neg_score")
    return teacher_scores


def _prepare(mask: torch.Tensor | None, scores: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """
    Returns the mask, then the scores and the others in the dtype to compute in, with 0 where there is no passage.

    Without these zeros, an infinity times 0 would make gradients NaN.
    """
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    shapes = [tuple(tensor.shape) for tensor in (scores, *others, mask)]
    if scores.ndim != 2 or len(set(shapes)) > 1:
        raise ValueError(
            "scores, labels, teacher_scores and mask must have one shape (groups, group_size), "
            f"got {', '.join(map(str, shapes))}"
        )
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return mask, *(tensor.to(dtype).masked_fill(~mask, 0.0) for tensor in (scores, *others))


def _mean(losses: torch.Tensor, *, where: torch.Tensor) -> torch.Tensor:
    """Mean over groups (dimension 0) of the mean of each group's losses at the positions that `where` marks."""
    sums = losses.masked_fill(~where, 0.0).flatten(1).sum(dim=1)
    return (sums / where.flatten(1).sum(dim=1).clamp(min=1)).mean()


def _log_probabilities(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Log of the softmax over the passages of each group; finite where there is no passage."""
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).log_softmax(dim=1)


def _differences(values: torch.Tensor) -> torch.Tensor:
    """From shape `(groups, group_size)` to `(groups, group_size, group_size)`: [g, i, j] is value i minus value j."""
    return values[:, :, None] - values[:, None, :]


def _preferences(labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of shape `(groups, group_size, group_size)`: [g, i, j] says whether passage i has a higher label than j."""
    return (_differences(labels) > 0) & mask[:, :, None] & mask[:, None, :]


def _pair_losses(scores: torch.Tensor) -> torch.Tensor:
    """[g, i, j] is the RankNet loss, in bits, for passage i being preferred to passage j."""
    return -nn.functional.logsigmoid(_differences(scores)) / math.log(2)


def _discounted(ranks: torch.Tensor) -> torch.Tensor:
    """DCG's weight of a rank (1-based)."""
    return 1 / torch.log2(1 + ranks)

"""Listwise losses: pure functions on the scores of groups of passages."""

from collections.abc import Callable

import torch

IGNORED = -100.0
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def listwise_cross_entropy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Cross entropy of the softmax over each group against its relevant passage, averaged over the groups.

    With the positive first this is the objective of NeMo AutoModel's cross-encoder recipe, and the ListNet top-one loss
    (Cao et al., Learning to Rank: From Pairwise Approach to Listwise Approach, ICML 2007) for one-hot relevance.
    Several relevant passages of a group share the target evenly.

    Args:
        scores (`torch.FloatTensor` of shape `(groups, group_size)`): logits.
        labels (`torch.FloatTensor` of shape `(groups, group_size)`): above 0 where the passage is relevant, 0 where it
            is not, -100 where there is none. Each group has a relevant passage.

    Returns:
        `torch.FloatTensor` of shape `()`, independent of how far groups are padded.
    """
    log_probabilities = scores.masked_fill(labels == IGNORED, -torch.inf).log_softmax(dim=1)
    relevant = labels > 0
    return -(log_probabilities.masked_fill(~relevant, 0.0).sum(dim=1) / relevant.sum(dim=1)).mean()


LOSSES: dict[str, Loss] = {"listwise_cross_entropy": listwise_cross_entropy}


def get_loss(loss: str | Loss) -> Loss:
    """Returns the loss of that name, or `loss` itself where it is a function; ValueError lists the names."""
    if callable(loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss must be a function or one of {', '.join(LOSSES)}, got {loss!r}")
    return LOSSES[loss]

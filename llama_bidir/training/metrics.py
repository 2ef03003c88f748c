"""Measures over whole groups, for evaluation during training."""

from collections.abc import Sequence

import numpy as np
import torch

from ..losses import IGNORED

Array = np.ndarray


def group_metrics(scores: Array, labels: Array) -> dict[str, float]:
    """
    Ranks the passages of each group by score and averages over the groups.

    Ties count against the model: a relevant passage ranks after the less relevant passages with the same score. NaN
    ranks last. A group without a relevant passage counts as 0.

    Args:
        scores, labels (`np.ndarray` of shape `(groups, largest_group)`): -100 where there is no passage. A label above
            0 marks a relevant passage, and it is the passage's gain in nDCG, as in trec_eval.

    Returns:
        `accuracy@1` (the share of groups whose first passage is relevant), `mrr@10` and `ndcg@10`.
    """
    is_passage = labels != IGNORED
    gains = np.where(is_passage, labels, 0.0).clip(min=0.0)
    keys = np.where(is_passage, np.nan_to_num(scores.astype(np.float64), nan=-np.inf), -np.inf)
    # By falling score, then passages before padding, then rising gain: lexsort takes its last key first.
    order = np.lexsort((gains, ~is_passage, -keys), axis=1)
    ranked = np.take_along_axis(gains, order, axis=1)[:, :10]
    ideal = -np.sort(-gains, axis=1)[:, :10]
    ranks = np.arange(1, ranked.shape[1] + 1)
    discounts = 1 / np.log2(ranks + 1)
    best = (ideal * discounts).sum(axis=1)
    ndcg = np.divide((ranked * discounts).sum(axis=1), best, out=np.zeros_like(best), where=best > 0)
    relevant = ranked > 0
    reciprocal_ranks = np.where(relevant.any(axis=1), 1 / (relevant.argmax(axis=1) + 1), 0.0)
    return {
        "accuracy@1": float(relevant[:, 0].mean()),
        "mrr@10": float(reciprocal_ranks.mean()),
        "ndcg@10": float(ndcg.mean()),
    }


def concatenate(tensors: Sequence[torch.Tensor]) -> Array:
    """Concatenates tensors of shape `(groups, width)`, padded with -100 to the largest width."""
    widest = max(tensor.shape[1] for tensor in tensors)
    padded = [torch.nn.functional.pad(tensor, (0, widest - tensor.shape[1]), value=IGNORED) for tensor in tensors]
    return torch.cat(padded).numpy()

"""Measures of whole groups, for evaluation while training."""

import numpy as np

from ..losses import IGNORED

Array = np.ndarray


def group_metrics(scores: Array, labels: Array) -> dict[str, float]:
    """
    Ranks the passages of each group by score and averages over the groups.

    Equal scores count against the model: a relevant passage is ranked after the others that tie with it. A score that
    is not a number ranks last. A group without a relevant passage counts as 0.

    Args:
        scores, labels (`np.ndarray` of shape `(groups, largest_group)`): labels above 0 are relevant and are the gain
            of nDCG, as in trec_eval; -100 where there is no passage.

    Returns:
        `accuracy@1` (the first passage is relevant), `mrr@10` and `ndcg@10`.
    """
    is_passage = labels != IGNORED
    gains = np.where(is_passage, labels, 0.0).clip(min=0.0)
    keys = np.where(is_passage, np.nan_to_num(scores.astype(np.float64), nan=-np.inf), -np.inf)
    # Columns by falling score; lexsort sorts by its last key first.
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

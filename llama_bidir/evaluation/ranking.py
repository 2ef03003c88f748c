"""The order of a query's candidates by the scores of the first ones."""

from collections.abc import Sequence

import numpy as np


def rank_candidates(scores: Sequence[float], num_candidates: int) -> tuple[list[int], list[float]]:
    """
    Ranks the candidates of a query.

    The scored ones come first, by falling score and in first-stage order where scores are equal. The others follow in
    first-stage order. Each of those gets the next float32 below the score before it, so tools that sort by score keep
    the order.

    Args:
        scores: float32 values of the first candidates; at least one if there are candidates.
        num_candidates: the number of all candidates, scored or not.

    Returns:
        positions of the candidates, best first, and their scores.
    """
    if not num_candidates:
        return [], []
    values = np.asarray(scores, dtype=np.float32)
    order = np.argsort(-values, kind="stable")
    ranked: list[float] = values[order].tolist()
    last = values[order[-1]]
    for _ in range(num_candidates - len(values)):
        last = np.nextafter(last, np.float32(-np.inf))
        ranked.append(float(last))
    return [*order.tolist(), *range(len(values), num_candidates)], ranked

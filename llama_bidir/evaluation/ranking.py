"""From scores to the lines of a run."""

from collections.abc import Iterator, Sequence

import numpy as np


def rank_candidates(scores: Sequence[float], num_candidates: int) -> tuple[list[int], list[float]]:
    """
    Ranks the candidates of a query.

    The scored ones come first, by falling score and in first-stage order where scores are equal. The others follow in
    first-stage order; each has the next lower float32 after the score of the one before it, so that tools that sort by
    score keep the order.

    Args:
        scores: float32 values, of the first candidates; at least one where there are candidates.
        num_candidates: the scored ones and those below.

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


def run_lines(query_id: str, doc_ids: Sequence[str], scores: Sequence[float], tag: str) -> Iterator[str]:
    """
    Yields the lines of a query in a 6-column TREC run, ranks from 1.

    Args:
        query_id, doc_ids, tag: without white space.
        scores: one a document; reading them back gives the same floats.
    """
    for rank, (doc_id, score) in enumerate(zip(doc_ids, scores, strict=True), start=1):
        yield f"{query_id} Q0 {doc_id} {rank} {float(score)!r} {tag}\n"

"""BM25 as a baseline, by bm25s: Lucene's variant, k1 = 1.2, b = 0.75, English stop words."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..utils.extras import require

Scores = npt.NDArray[np.float32]


def score_bm25(
    corpus: Mapping[str, str], queries: Mapping[str, str], candidates: Mapping[str, list[str]]
) -> dict[str, dict[str, float]]:
    """
    Scores the candidates of each query with BM25.

    Args:
        corpus: text by doc_id; document frequencies and lengths are those of the whole corpus.
        queries: text by query_id.
        candidates: doc_ids by query_id.

    Returns:
        a run: score by doc_id by query_id, 0 for a candidate that shares no term with the query.
    """
    position_of = {doc_id: position for position, doc_id in enumerate(corpus)}
    all_scores = _score_all(corpus.values(), queries.values())
    return {
        query_id: {doc_id: float(scores[position_of[doc_id]]) for doc_id in candidates[query_id]}
        for query_id, scores in zip(queries, all_scores, strict=True)
    }


def rank_bm25(texts: Iterable[str], queries: Iterable[str], depth: int) -> Iterator[tuple[list[int], list[float]]]:
    """
    Ranks a corpus for each query with BM25.

    Args:
        texts: of the documents.
        queries: texts.
        depth: documents a query, at most.

    Yields:
        positions in `texts` and scores of the documents that share a term with the query, by falling score and in the
        order of `texts` where scores are equal.
    """
    for scores in _score_all(texts, queries):
        best = _best(scores, depth)
        yield best.tolist(), scores[best].tolist()


def _score_all(texts: Iterable[str], queries: Iterable[str]) -> Iterator[Scores]:
    """Yields the score of each text, query by query."""
    bm25s = require("bm25s", "eval")
    tokens: Any = bm25s.tokenize(texts, stopwords="en", show_progress=False)
    if not tokens.vocab:  # bm25s cannot index what has no word
        yield from (np.zeros(len(tokens.ids), dtype=np.float32) for _ in queries)
        return
    retriever = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    retriever.index(tokens, show_progress=False)
    del tokens
    for query in queries:
        terms = bm25s.tokenize([query], stopwords="en", return_ids=False, show_progress=False)[0]
        known = [term for term in terms if term in retriever.vocab_dict]
        yield retriever.get_scores(known) if known else np.zeros(retriever.scores["num_docs"], dtype=np.float32)


def _best(scores: Scores, depth: int) -> npt.NDArray[np.int64]:
    found = np.flatnonzero(scores > 0)
    if len(found) > depth:  # all of those that tie with the last one stay, so that the sort decides between them
        found = found[scores[found] >= np.partition(scores[found], -depth)[-depth]]
    return found[np.argsort(-scores[found], kind="stable")][:depth]

"""BM25 as a baseline, by bm25s: Lucene's variant, k1 = 1.2, b = 0.75, English stop words."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..utils.extras import require


class BM25:
    """
    An index of texts, made once.

    Args:
        texts: the documents. Document frequencies and lengths are those of all of them.

    Raises:
        ImportError: bm25s is not installed.
    """

    def __init__(self, texts: Iterable[str]):
        self._bm25s = require("bm25s", "eval")
        tokens: Any = self._bm25s.tokenize(texts, stopwords="en", show_progress=False)
        self._num_texts = len(tokens.ids)
        self._retriever: Any = None
        if tokens.vocab:  # bm25s cannot index texts without any word
            self._retriever = self._bm25s.BM25(method="lucene", k1=1.2, b=0.75)
            self._retriever.index(tokens, show_progress=False)

    def score(self, query: str) -> npt.NDArray[np.float32]:
        """Returns the score of each text; 0 for one that shares no term with the query."""
        known = []
        if self._retriever is not None:
            terms = self._bm25s.tokenize([query], stopwords="en", return_ids=False, show_progress=False)[0]
            known = [term for term in terms if term in self._retriever.vocab_dict]
        return self._retriever.get_scores(known) if known else np.zeros(self._num_texts, dtype=np.float32)

    def search(self, query: str, depth: int) -> tuple[list[int], list[float]]:
        """
        Ranks the texts that share a term with a query.

        Args:
            query: a text.
            depth: the largest number of results.

        Returns:
            the positions of the texts and their scores, by falling score and in the order of the texts where scores
            are equal.
        """
        scores = self.score(query)
        found = np.flatnonzero(scores > 0)
        if len(found) > depth:  # every text that ties with the last one stays, so the sort decides between them
            found = found[scores[found] >= np.partition(scores[found], -depth)[-depth]]
        best = found[np.argsort(-scores[found], kind="stable")][:depth]
        return best.tolist(), scores[best].tolist()


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
    bm25 = BM25(corpus.values())
    run = {}
    for query_id, query in queries.items():
        scores = bm25.score(query)
        run[query_id] = {doc_id: float(scores[position_of[doc_id]]) for doc_id in candidates[query_id]}
    return run


def search_bm25(corpus: Mapping[str, str], queries: Mapping[str, str], depth: int = 100) -> dict[str, dict[str, float]]:
    """
    Finds the best documents of each query with BM25: a first-stage run to rerank, or to take hard negatives from.

    Args:
        corpus: text by doc_id.
        queries: text by query_id.
        depth: the largest number of documents per query.

    Returns:
        a run: score by doc_id by query_id, the best document first. A document that shares no term with the query is
        not in it.

    Raises:
        ImportError: bm25s is not installed.
    """
    doc_ids = list(corpus)
    rankings = rank_bm25(corpus.values(), queries.values(), depth)
    return {
        query_id: {doc_ids[position]: score for position, score in zip(*ranking, strict=True)}
        for query_id, ranking in zip(queries, rankings, strict=True)
    }


def rank_bm25(texts: Iterable[str], queries: Iterable[str], depth: int) -> Iterator[tuple[list[int], list[float]]]:
    """Yields the results of [`BM25.search`] among `texts` for each query."""
    bm25 = BM25(texts)
    for query in queries:
        yield bm25.search(query, depth)

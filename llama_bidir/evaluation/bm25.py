"""BM25 as a baseline, by bm25s."""

from collections.abc import Mapping

from ..extras import require


def score_bm25(
    corpus: Mapping[str, str], queries: Mapping[str, str], candidates: Mapping[str, list[str]]
) -> dict[str, dict[str, float]]:
    """
    Scores the candidates of each query with BM25 (Lucene's variant, k1 = 1.2, b = 0.75, English stop words).

    Args:
        corpus: text by doc_id; document frequencies and lengths are those of the whole corpus.
        queries: text by query_id.
        candidates: doc_ids by query_id.

    Returns:
        a run: score by doc_id by query_id, 0 for a candidate that shares no term with the query.
    """
    bm25s = require("bm25s", "eval")
    doc_ids = list(corpus)
    position_of = {doc_id: position for position, doc_id in enumerate(doc_ids)}
    retriever = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    retriever.index(bm25s.tokenize(list(corpus.values()), stopwords="en", show_progress=False), show_progress=False)
    run = {}
    for query_id, query in queries.items():
        terms = bm25s.tokenize([query], stopwords="en", return_ids=False, show_progress=False)[0]
        known = [term for term in terms if term in retriever.vocab_dict]
        scores = retriever.get_scores(known) if known else [0.0] * len(doc_ids)
        run[query_id] = {doc_id: float(scores[position_of[doc_id]]) for doc_id in candidates[query_id]}
    return run

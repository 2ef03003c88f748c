"""Measures by the names of ir_measures, computed by ir_measures."""

from collections.abc import Mapping, Sequence

from ..extras import require

Qrels = Mapping[str, Mapping[str, int]]  # query_id -> doc_id -> relevance
Run = Mapping[str, Mapping[str, float]]  # query_id -> doc_id -> score


def evaluate_run(qrels: Qrels, run: Run, measures: Sequence[str] = ("nDCG@10", "RR@10")) -> dict[str, float]:
    """
    Averages measures over the queries of the qrels; a query that the run lacks counts as 0.

    Args:
        qrels: relevance of the judged documents, by query.
        run: score of the retrieved documents, by query. Documents of equal score are ranked in the order of the run,
            for every measure alike: the tools behind ir_measures differ in how they break ties.
        measures: names as ir_measures parses them.
    """
    ir_measures = require("ir_measures", "eval")
    parsed = [ir_measures.parse_measure(measure) for measure in measures]
    run = {
        query_id: {doc_id: -float(rank) for rank, doc_id in enumerate(sorted(docs, key=lambda doc_id: -docs[doc_id]))}
        for query_id, docs in run.items()
    }
    totals = {str(measure): 0.0 for measure in parsed}
    for metric in ir_measures.iter_calc(parsed, qrels, run):
        totals[str(metric.measure)] += metric.value
    return {name: total / len(qrels) for name, total in totals.items()}

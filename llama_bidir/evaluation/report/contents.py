"""The contents of a report: values, curves, and the queries that changed most."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..comparison import TIE, Comparison
from ..measures import Evaluation, Qrels, Run, evaluate_run, rank_documents

NUM_QUERIES = 10
NUM_BINS = 30
DEPTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20, 30, 50, 100)
MIN_DEPTH = 10
MAX_RELEVANT = 3  # documents shown per query
MAX_OTHERS = 2


class System(NamedTuple):
    """A run with the name that the report uses for it, and its evaluation."""

    name: str
    run: Run
    evaluation: Evaluation


class RankedDocument(NamedTuple):
    """
    A document that a report shows under a query.

    Attributes:
        doc_id: the identifier of the document.
        relevance: the judgement, or None if the document is not judged.
        rank, baseline_rank: 1-based ranks, or None if the run or the baseline does not list the document.
    """

    doc_id: str
    relevance: int | None
    rank: int | None
    baseline_rank: int | None


class QueryCase(NamedTuple):
    """
    A query that a report shows.

    Attributes:
        query_id: the identifier of the query.
        value, baseline_value: values of the first measure. `baseline_value` is None without a baseline.
        documents: relevant documents and top-ranked documents, by rank.
        num_missing: number of relevant documents that neither run lists.
    """

    query_id: str
    value: float
    baseline_value: float | None
    documents: list[RankedDocument]
    num_missing: int


class Histogram(NamedTuple):
    """
    Histograms of the scores of one system.

    Attributes:
        name: the name of the system.
        edges: edges of the bins, of shape `(num_bins + 1,)`.
        relevant, others: shares of the relevant candidates and of all other candidates in each bin, of shape
            `(num_bins,)`.
        num_relevant, num_others: numbers of candidates.
    """

    name: str
    edges: list[float]
    relevant: list[float]
    others: list[float]
    num_relevant: int
    num_others: int


class Report(NamedTuple):
    """
    The contents of a report.

    Attributes:
        system, baseline: the evaluated system, and the system that it is compared with, or None.
        comparisons: one comparison per measure; empty without a baseline.
        measure: the first measure, which orders the queries.
        num_missing: number of judged queries that each system lacks, by name of the system.
        differences: differences in `measure`, one per query, falling. Without a baseline, its values.
        curves: (depth, nDCG at that depth) pairs by name of the system.
        histograms: one per system.
        cases: the queries that the report shows, by heading.
    """

    system: System
    baseline: System | None
    comparisons: Sequence[Comparison]
    measure: str
    num_missing: dict[str, int]
    differences: list[float]
    curves: dict[str, list[tuple[int, float]]]
    histograms: list[Histogram]
    cases: dict[str, list[QueryCase]]

    @property
    def doc_ids(self) -> set[str]:
        """The documents that the report shows."""
        return {document.doc_id for case in itertools.chain(*self.cases.values()) for document in case.documents}


def make_report(
    qrels: Qrels, system: System, baseline: System | None = None, comparisons: Sequence[Comparison] = ()
) -> Report:
    """
    Collects the contents of a report.

    Args:
        qrels: judged relevance by doc_id by query_id.
        system, baseline: systems with different names, evaluated with the same measures.
        comparisons: what [`~comparison.compare`] returns for the two systems.

    Raises:
        ValueError: system and baseline have the same name.
    """
    if baseline is not None and baseline.name == system.name:
        raise ValueError(f"the run and its baseline must have different names, got {system.name!r} twice")
    systems = [system] if baseline is None else [system, baseline]
    measure = next(iter(system.evaluation.per_query))
    values = system.evaluation.per_query[measure]
    before = baseline.evaluation.per_query[measure] if baseline else dict.fromkeys(values, 0.0)
    differences = {query_id: value - before[query_id] for query_id, value in values.items()}
    falling = sorted(differences, key=lambda query_id: -differences[query_id])
    if baseline is None:
        chosen = {f"Lowest {measure}": falling[: -NUM_QUERIES - 1 : -1]}
    else:
        chosen = {
            "Most improved": [query_id for query_id in falling[:NUM_QUERIES] if differences[query_id] > TIE],
            "Most harmed": [query_id for query_id in falling[: -NUM_QUERIES - 1 : -1] if differences[query_id] < -TIE],
        }
    return Report(
        system=system,
        baseline=baseline,
        comparisons=comparisons,
        measure=measure,
        num_missing={each.name: sum(not each.run.get(query_id) for query_id in qrels) for each in systems},
        differences=[differences[query_id] for query_id in falling],
        curves={each.name: _curve(qrels, each.run) for each in systems},
        histograms=[_histogram(qrels, each) for each in systems],
        cases={
            heading: [_case(qrels, query_id, measure, system, baseline) for query_id in query_ids]
            for heading, query_ids in chosen.items()
        },
    )


def _curve(qrels: Qrels, run: Run) -> list[tuple[int, float]]:
    longest = max((len(run.get(query_id, ())) for query_id in qrels), default=0)
    depths = [depth for depth in DEPTHS if depth <= max(longest, MIN_DEPTH)]
    ndcg = evaluate_run(qrels, run, [f"nDCG@{depth}" for depth in depths], ignore_identical_ids=False)
    return [(depth, ndcg[f"nDCG@{depth}"]) for depth in depths]


def _histogram(qrels: Qrels, system: System) -> Histogram:
    scores: dict[bool, list[float]] = {True: [], False: []}
    for query_id, judged in qrels.items():
        for doc_id, score in system.run.get(query_id, {}).items():
            scores[judged.get(doc_id, 0) >= 1].append(score)
    relevant, others = (np.array(scores[kind], dtype=np.float64) for kind in (True, False))
    edges = np.histogram_bin_edges(np.concatenate([relevant, others]), bins=NUM_BINS)
    counts = [np.histogram(values, bins=edges)[0] / max(1, len(values)) for values in (relevant, others)]
    return Histogram(system.name, edges.tolist(), counts[0].tolist(), counts[1].tolist(), len(relevant), len(others))


def _case(qrels: Qrels, query_id: str, measure: str, system: System, baseline: System | None) -> QueryCase:
    ranked = rank_documents(system.run.get(query_id, {}))
    ranked_before = rank_documents(baseline.run.get(query_id, {})) if baseline else []
    rank = {doc_id: number for number, doc_id in enumerate(ranked, start=1)}
    rank_before = {doc_id: number for number, doc_id in enumerate(ranked_before, start=1)}
    judged = qrels[query_id]
    listed = dict.fromkeys([*ranked, *ranked_before])
    relevant = [doc_id for doc_id in listed if judged.get(doc_id, 0) >= 1]
    shown = dict.fromkeys([*relevant[:MAX_RELEVANT], *ranked[:MAX_OTHERS], *ranked_before[:MAX_OTHERS]])
    return QueryCase(
        query_id,
        system.evaluation.per_query[measure][query_id],
        baseline.evaluation.per_query[measure][query_id] if baseline else None,
        [
            RankedDocument(doc_id, judged.get(doc_id), rank.get(doc_id), rank_before.get(doc_id))
            for doc_id in sorted(shown, key=lambda doc_id: rank.get(doc_id, len(listed) + 1))
        ],
        sum(relevance >= 1 for relevance in judged.values()) - len(relevant),
    )

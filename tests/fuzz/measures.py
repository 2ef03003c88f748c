"""Measures, comparisons and the order of candidates, against slow definitions."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import ir_measures
import numpy as np
from hypothesis import strategies as st
from scipy import stats

from llama_bidir.evaluation import Evaluation, compare, evaluate_queries
from llama_bidir.evaluation.bm25 import BM25
from llama_bidir.evaluation.comparison import TIE, correct_by_holm
from llama_bidir.evaluation.measures import parse_measures
from llama_bidir.evaluation.ranking import rank_candidates

from .target import Target, check_message
from .texts import identifiers

Gains = Sequence[int]
CUTOFF = 3
PIECES = ["nDCG", "RR", "R", "P", "AP", "Judged", "ERR", "RBP", "Bpref", "Success", "NumRet", "SetF", "infAP", "IPrec"]
PIECES += ["@10", "@0", "@-1", "@1e9", "@99999999999", "@", "(rel=2)", "(rel=0)", "(p=0.5)", "(p=2)", "(cutoff=3)"]
PIECES += ["(", ")", "(rel=x)", "(judged_only=True)", "(dcg='exp-log2')", ",", " ", "x", "é", "\x00", "((((" * 50]


def dcg(gains: Gains) -> float:
    return sum(max(gain, 0) / math.log2(1 + rank) for rank, gain in enumerate(gains, start=1))


# The relevance of the documents of a query by rank (0 where it is not judged), and of all its judged documents.
SLOW: dict[str, Callable[[Gains, Gains], float]] = {
    f"nDCG@{CUTOFF}": lambda ranked, judged: (
        dcg(ranked[:CUTOFF]) / ideal if (ideal := dcg(sorted(judged, reverse=True)[:CUTOFF])) else 0.0
    ),
    f"RR@{CUTOFF}": lambda ranked, judged: next(
        (1 / rank for rank, gain in enumerate(ranked[:CUTOFF], start=1) if gain > 0), 0.0
    ),
    f"P@{CUTOFF}": lambda ranked, judged: sum(gain > 0 for gain in ranked[:CUTOFF]) / CUTOFF,
    f"R@{CUTOFF}": lambda ranked, judged: (
        sum(gain > 0 for gain in ranked[:CUTOFF]) / sum(gain > 0 for gain in judged) if max(judged) > 0 else 0.0
    ),
    f"Success@{CUTOFF}": lambda ranked, judged: float(any(gain > 0 for gain in ranked[:CUTOFF])),
    "AP": lambda ranked, judged: (
        sum(sum(gain > 0 for gain in ranked[:rank]) / rank for rank, gain in enumerate(ranked, start=1) if gain > 0)
        / sum(gain > 0 for gain in judged)
        if max(judged) > 0
        else 0.0
    ),
}


def check_measures(qrels: dict[str, dict[str, int]], run: dict[str, dict[str, float]]) -> None:
    """Each measure is that of its definition, with ties broken by falling identifier and missing queries as 0."""
    evaluation = evaluate_queries(qrels, run, tuple(SLOW))
    for name, slow in SLOW.items():
        assert list(evaluation.per_query[name]) == list(qrels)
        for query_id, judged in qrels.items():
            scores = run.get(query_id, {})
            order = sorted(sorted(scores, reverse=True), key=lambda doc_id: -scores[doc_id])
            expected = slow([judged.get(doc_id, 0) for doc_id in order], list(judged.values()))
            assert math.isclose(evaluation.per_query[name][query_id], expected, abs_tol=1e-6), (name, query_id)
        mean = sum(evaluation.per_query[name].values()) / len(qrels)
        assert math.isclose(evaluation.aggregated[name], mean, abs_tol=1e-9)


def check_against_ir_measures(
    qrels: dict[str, dict[str, int]], run: dict[str, list[str]], scores: dict[str, int]
) -> None:
    """Where no score ties, the values are those of ir_measures for the same run."""
    given = {query_id: {doc_id: float(scores[doc_id]) for doc_id in docs} for query_id, docs in run.items()}
    names = ["nDCG@10", "RR@10", "AP(rel=2)", "Judged@10", "Rprec", "NumRet"]
    evaluation = evaluate_queries(qrels, given, names)
    expected = ir_measures.calc_aggregate(parse_measures(names), qrels, given)
    missing = [query_id for query_id in qrels if not given.get(query_id)]
    for measure, value in expected.items():
        assert math.isclose(evaluation.aggregated[str(measure)], value, abs_tol=1e-6) or missing
    for metric in ir_measures.iter_calc(parse_measures(names), qrels, given):
        assert math.isclose(evaluation.per_query[str(metric.measure)][metric.query_id], metric.value, abs_tol=1e-6)


def check_names(names: list[str]) -> None:
    """Any text names measures that can be computed, or gives an error that names it."""
    text = "".join(names)
    try:
        evaluation = evaluate_queries({"q": {"d": 1, "e": 2}}, {"q": {"d": 1.0}}, text)
    except (ValueError, ImportError) as error:
        return check_message(error, "measure")
    assert all(math.isfinite(value) for value in evaluation.aggregated.values())
    return None


def check_comparison(values: list[tuple[int, int]], seed: int) -> None:
    """Differences, counts and p-values are those of their definitions."""
    run, baseline = ([pair[side] / 4 for pair in values] for side in (0, 1))
    evaluations = [
        Evaluation({"AP": float(np.mean(side))}, {"AP": {str(number): value for number, value in enumerate(side)}})
        for side in (run, baseline)
    ]
    (found,) = compare(*evaluations, num_permutations=200, seed=seed)
    differences = [one - other for one, other in zip(run, baseline, strict=True)]
    assert math.isclose(found.difference, float(np.mean(differences)), abs_tol=1e-12)
    assert (found.wins, found.losses) == (sum(d > TIE for d in differences), sum(d < -TIE for d in differences))
    assert found.wins + found.losses + found.ties == len(values)
    if len(set(differences)) > 1:
        assert math.isclose(found.t_test, stats.ttest_rel(run, baseline).pvalue, rel_tol=1e-9)
    assert 1 / 201 <= found.randomization <= 1
    if len(values) <= 6:  # all assignments can be listed
        signs = list(itertools.product([1, -1], repeat=len(values)))
        as_large = [abs(np.dot(each, differences)) >= abs(sum(differences)) - 1e-9 for each in signs]
        exact = sum(as_large) / len(signs)
        assert abs(found.randomization - exact) <= 5 * math.sqrt(exact * (1 - exact) / 200) + 1 / 201


def check_holm(p_values: list[float]) -> None:
    """Holm's correction: the largest (m - k + 1) p of the k smallest p-values, at most 1."""
    corrected = correct_by_holm(p_values)
    for value, given in zip(corrected, p_values, strict=True):
        smaller = sorted(each for each in p_values if each <= given)
        expected = max(min(1.0, (len(p_values) - rank) * each) for rank, each in enumerate(smaller))
        assert math.isclose(value, expected)


def check_candidates(scores: list[float], num_others: int) -> None:
    """The scored candidates come first by score, ties in order, and the scores of the others fall strictly."""
    order, ranked = rank_candidates(scores, len(scores) + num_others)
    expected = sorted(range(len(scores)), key=lambda place: -scores[place])
    assert order == [*expected, *range(len(scores), len(scores) + num_others)]
    assert ranked[: len(scores)] == [scores[place] for place in expected]
    tail = ranked[len(scores) - 1 :]
    assert all(first > second for first, second in itertools.pairwise(tail))
    assert all(value == np.float32(value) for value in ranked)


def check_bm25(texts: list[str], query: str, depth: int) -> None:
    """A search gives the best of the texts with a score above 0, with ties in the order of the texts."""
    bm25 = BM25(texts)
    scores = bm25.score(query).tolist()
    assert len(scores) == len(texts)
    order = [place for place in sorted(range(len(texts)), key=lambda place: -scores[place]) if scores[place] > 0]
    assert bm25.search(query, depth) == (order[:depth], [scores[place] for place in order[:depth]])


documents = identifiers
qrels = st.dictionaries(
    identifiers, st.dictionaries(documents, st.integers(-1, 3), min_size=1, max_size=6), min_size=1, max_size=4
)
ties = st.sampled_from([0.0, 1.0, -1.0, 0.1, 1e-9, 1 + 2**-40]) | st.floats(-1e6, 1e6)
sentences = st.lists(st.sampled_from(["bee", "hive", "the", "sun", "é", "東京", ",", "\x00"]), max_size=6).map(" ".join)
TARGETS: list[Any] = [
    Target(
        "measures",
        check_measures,
        {"qrels": qrels, "run": st.dictionaries(identifiers, st.dictionaries(documents, ties, max_size=6), max_size=4)},
        weight=0.7,
    ),
    Target(
        "measures of ir_measures",
        check_against_ir_measures,
        {
            "qrels": qrels,
            "run": st.dictionaries(
                identifiers, st.lists(st.sampled_from("abcdef"), min_size=1, unique=True), max_size=4
            ),
            "scores": st.permutations(range(6)).map(lambda values: dict(zip("abcdef", values, strict=True))),
        },
        weight=0.5,
        test_cases=50,
    ),
    Target("names of measures", check_names, {"names": st.lists(st.sampled_from(PIECES), max_size=4)}, weight=0.5),
    Target(
        "comparisons",
        check_comparison,
        {
            "values": st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12),
            "seed": st.integers(0, 99),
        },
        weight=0.3,
        test_cases=40,
    ),
    Target("Holm's correction", check_holm, {"p_values": st.lists(st.floats(0, 1), min_size=1)}, weight=0.3),
    Target(
        "order of candidates",
        check_candidates,
        {"scores": st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1), "num_others": st.integers(0, 20)},
    ),
    Target(
        "BM25",
        check_bm25,
        {"texts": st.lists(sentences, min_size=1, max_size=8), "query": sentences, "depth": st.integers(1, 9)},
        weight=0.3,
        test_cases=40,
    ),
]

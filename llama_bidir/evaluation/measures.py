"""Measures by the names of ir_measures, computed by ir_measures."""

import re
from collections.abc import Iterable, Mapping
from subprocess import SubprocessError
from typing import Any, NamedTuple

from ..utils.extras import require
from ..utils.names import nearest

Qrels = Mapping[str, Mapping[str, int]]  # query_id -> doc_id -> relevance
Run = Mapping[str, Mapping[str, float]]  # query_id -> doc_id -> score

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "R@100")
MAX_CUTOFF = 2**31 - 1
# What the tools behind ir_measures raise for parameters that they do not take.
MEASURE_ERRORS = (ArithmeticError, LookupError, TypeError, ValueError, SubprocessError)


class Evaluation(NamedTuple):
    """
    Measures of a run.

    Attributes:
        aggregated: value by measure: the mean over the judged queries (the sum, for counts such as `NumRet`).
        per_query: value by query_id by measure, for every judged query, in the order of the qrels.
    """

    aggregated: dict[str, float]
    per_query: dict[str, dict[str, float]]


def evaluate_run(qrels: Qrels, run: Run, measures: str | Iterable[str] = DEFAULT_MEASURES) -> dict[str, float]:
    """Returns the `aggregated` values of [`evaluate_queries`]."""
    return evaluate_queries(qrels, run, measures).aggregated


def evaluate_queries(qrels: Qrels, run: Run, measures: str | Iterable[str] = DEFAULT_MEASURES) -> Evaluation:
    """
    Computes measures for each query of the qrels; a query that the run lacks counts as 0.

    Args:
        qrels: relevance of the judged documents, by query. Other queries of the run are left out.
        run: score of the retrieved documents, by query, ranked by [`rank_documents`] for every measure alike: the tools
            behind ir_measures differ in how they break ties.
        measures: see [`parse_measures`].

    Raises:
        ValueError: a measure breaks its rule, there are no qrels, or a score is NaN.
        ImportError: a measure needs a package that is not installed.
    """
    ir_measures = require("ir_measures", "eval")
    parsed = parse_measures(measures)
    if not qrels:
        raise ValueError("qrels must judge at least one query, got none")
    # The queries are numbered, because one of the tools (gdeval, for ERR) takes only numbers.
    query_ids = {str(number): query_id for number, query_id in enumerate(qrels, start=1)}
    judged = {number: dict(qrels[query_id]) for number, query_id in query_ids.items()}
    ranked = {
        number: {doc_id: -float(rank) for rank, doc_id in enumerate(rank_documents(run[query_id]))}
        for number, query_id in query_ids.items()
        if run.get(query_id)
    }
    per_query = {str(measure): dict.fromkeys(qrels, 0.0) for measure in parsed}
    try:
        for metric in ir_measures.iter_calc(parsed, judged, ranked):
            per_query[str(metric.measure)][query_ids[metric.query_id]] = float(metric.value)
    except MEASURE_ERRORS as error:
        raise ValueError(f"ir_measures could not compute {', '.join(per_query)}: {error}") from error
    return Evaluation({str(measure): _aggregate(measure, per_query[str(measure)]) for measure in parsed}, per_query)


def rank_documents(scores: Mapping[str, float]) -> list[str]:
    """
    Ranks documents by falling score, as trec_eval does: of equal scores, the greater doc_id comes first.

    trec_eval compares scores in float32; here they are compared as they are.

    Raises:
        ValueError: a score is NaN and has no rank.
    """
    for doc_id, score in scores.items():
        if score != score:
            raise ValueError(f"the score of document {doc_id!r} is NaN and has no rank: leave the document out")
    return sorted(scores, key=lambda doc_id: (scores[doc_id], doc_id), reverse=True)


def parse_measures(measures: str | Iterable[str]) -> list[Any]:
    """
    Reads measures as ir_measures names them, such as `nDCG@10`, `AP(rel=2)@100` or `Judged@10`.

    Args:
        measures: names, or one string of them between spaces or commas. One that comes twice is taken once.

    Raises:
        ValueError: there is no such measure (the nearest is named), a parameter breaks its rule, or there is no name.
        ImportError: a measure needs a package that is not installed.
    """
    if isinstance(measures, str):
        measures = re.split(r"[\s,]+(?![^()]*\))", measures)
    parsed = [_parse_measure(name) for name in measures if name]
    if not parsed:
        raise ValueError(f"measures must name at least one, such as {DEFAULT_MEASURES[0]}")
    return list(dict.fromkeys(parsed))


def _parse_measure(name: str) -> Any:
    ir_measures = require("ir_measures", "eval")
    registry = ir_measures.measures.registry
    kind = re.split(r"[(@]", name)[0]
    try:
        measure = ir_measures.parse_measure(name)
    except NameError:
        # A measure's own name comes before its aliases.
        known = nearest(kind, reversed(registry))
        raise ValueError(f"unknown measure {name!r}; the nearest is {name.replace(kind, known, 1)!r}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"measure {name!r} must be written like nDCG@10 or AP(rel=2)@100") from None
    rules = measure.SUPPORTED_PARAMS
    for parameter in rules:
        if rules[parameter].required and parameter not in measure.params:
            example = f"{kind}@10" if parameter == measure.AT_PARAM == "cutoff" else f"{kind}({parameter}=1)"
            raise ValueError(f"measure {name!r} needs its {parameter}, as in {example}")
    try:
        measure.validate_params()
    except AssertionError as error:
        known = ", ".join(rules)
        raise ValueError(f"measure {name!r}: {error}; the parameters of {kind} are {known}") from None
    cutoff = measure.params.get("cutoff", 1)
    if isinstance(cutoff, bool) or not 1 <= cutoff <= MAX_CUTOFF:  # trec_eval ends the process at 0
        raise ValueError(f"measure {name!r}: the cutoff must be an int from 1 to {MAX_CUTOFF}")
    if not ir_measures.DefaultPipeline.supports(measure):
        providers = [tool for tool in ir_measures.DefaultPipeline.providers if tool.supports(measure)]
        if not providers:
            raise ValueError(f"measure {name!r}: no tool of ir_measures computes it with these parameters")
        install = " or ".join(tool.install_instructions() or tool.NAME for tool in providers)
        raise ImportError(f"measure {name!r} needs a tool that is not installed: {install}")
    return measure


def _aggregate(measure: Any, values: Mapping[str, float]) -> float:
    aggregator = measure.aggregator()
    for value in values.values():
        aggregator.add(value)
    return float(aggregator.result())

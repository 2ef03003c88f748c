"""Retrieval measures, named and computed by ir_measures."""

import re
from collections.abc import Iterable, Mapping
from subprocess import SubprocessError
from typing import Any, NamedTuple

from ..data.identical import drop_own_ids, tell_identical
from ..utils.extras import require
from ..utils.names import nearest

Qrels = Mapping[str, Mapping[str, int]]  # query_id -> doc_id -> relevance
Run = Mapping[str, Mapping[str, float]]  # query_id -> doc_id -> score

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "R@100")
MAX_CUTOFF = 2**31 - 1
# The tools behind ir_measures raise these for parameters that they do not support.
MEASURE_ERRORS = (ArithmeticError, LookupError, TypeError, ValueError, SubprocessError)


class Evaluation(NamedTuple):
    """
    The values of a run.

    Attributes:
        aggregated: value by measure. It is the mean over the judged queries, or the sum for counts such as `NumRet`.
        per_query: value by query_id by measure, for every judged query, in the order of the qrels.
    """

    aggregated: dict[str, float]
    per_query: dict[str, dict[str, float]]


def evaluate_run(
    qrels: Qrels,
    run: Run,
    measures: str | Iterable[str] = DEFAULT_MEASURES,
    *,
    ignore_identical_ids: bool = True,
) -> dict[str, float]:
    """Returns the `aggregated` values of [`evaluate_queries`]."""
    return evaluate_queries(qrels, run, measures, ignore_identical_ids=ignore_identical_ids).aggregated


def evaluate_queries(
    qrels: Qrels,
    run: Run,
    measures: str | Iterable[str] = DEFAULT_MEASURES,
    *,
    ignore_identical_ids: bool = True,
) -> Evaluation:
    """
    Computes measures for each query of the qrels. A query that the run lacks counts as 0.

    Args:
        qrels: judged relevance by doc_id by query_id. Queries of the run that are not judged are ignored.
        run: score by doc_id by query_id. [`rank_documents`] ranks the documents for all measures, because the tools
            behind ir_measures break ties in different ways.
        measures: see [`parse_measures`].
        ignore_identical_ids: leave out documents with the identifier of their query, as BEIR does (see
            [`~data.identical`]), with a warning that counts them.

    Raises:
        ValueError: a measure is invalid, there are no qrels, or a score is NaN.
        ImportError: a measure needs a package that is not installed.
    """
    ir_measures = require("ir_measures", "eval")
    parsed = parse_measures(measures)
    if not qrels:
        raise ValueError("qrels must judge at least one query, got none")
    if ignore_identical_ids:
        run, num_identical = drop_own_ids(qrels, {query_id: run[query_id] for query_id in qrels if query_id in run})
        tell_identical("the run", num_identical, "documents")
    # The queries are numbered because one of the tools (gdeval, for ERR) accepts only numbers.
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
    Ranks documents by falling score, and equal scores by falling doc_id, as trec_eval does.

    Unlike trec_eval, it does not round the scores to float32 first.

    Raises:
        ValueError: a score is NaN.
    """
    for doc_id, score in scores.items():
        if score != score:
            raise ValueError(f"the score of document {doc_id!r} is NaN and has no rank: leave the document out")
    return sorted(scores, key=lambda doc_id: (scores[doc_id], doc_id), reverse=True)


def parse_measures(measures: str | Iterable[str]) -> list[Any]:
    """
    Parses names of ir_measures, such as `nDCG@10`, `AP(rel=2)@100` or `Judged@10`.

    Args:
        measures: names, or one string of names separated by spaces or commas. Duplicates are dropped.

    Returns:
        measures of ir_measures.

    Raises:
        ValueError: a measure is unknown (the message names the nearest), a parameter is invalid, or no name is given.
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
        # Reversed, because the name of a measure should win over its aliases.
        known = nearest(kind, reversed(registry))
        raise ValueError(f"unknown measure {name!r}; the nearest is {name.replace(kind, known, 1)!r}") from None
    except (ValueError, RecursionError, MemoryError):  # hundreds of brackets raise the last two
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
    if isinstance(cutoff, bool) or not 1 <= cutoff <= MAX_CUTOFF:  # at 0, trec_eval ends the process
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

"""Whether a run beats a baseline: paired tests over the queries, corrected for several measures."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..utils.extras import require
from .measures import Evaluation

NUM_PERMUTATIONS = 10_000
TIE = 1e-9  # differences up to this are rounding
BLOCK_SIZE = 2**22  # signs in memory at once


class Comparison(NamedTuple):
    """
    A measure of a run against a baseline.

    Attributes:
        measure: its name.
        run, baseline, difference: the aggregated values, and `run - baseline`.
        wins, losses, ties: queries for which the run has the higher, the lower, the same value.
        t_test, randomization: two-sided p-values of [`paired_t_test`] and [`randomization_test`].
        t_test_holm, randomization_holm: the same after [`correct_by_holm`] over the measures compared.
    """

    measure: str
    run: float
    baseline: float
    difference: float
    wins: int
    losses: int
    ties: int
    t_test: float
    randomization: float
    t_test_holm: float
    randomization_holm: float


def compare(
    run: Evaluation, baseline: Evaluation, *, num_permutations: int = NUM_PERMUTATIONS, seed: int = 0
) -> list[Comparison]:
    """
    Compares a run with a baseline, measure by measure.

    Args:
        run, baseline: of the same qrels and measures.
        num_permutations, seed: of the randomization test.

    Raises:
        ValueError: the two differ in their measures or queries.
    """
    measures = list(run.per_query)
    if measures != list(baseline.per_query):
        raise ValueError(f"both must have the same measures, got {measures} and {list(baseline.per_query)}")
    for measure in measures:
        if run.per_query[measure].keys() != baseline.per_query[measure].keys():
            raise ValueError(f"both must be evaluated on the same queries, but those of {measure} differ")
    differences = np.stack([_differences(run.per_query[name], baseline.per_query[name]) for name in measures], axis=1)
    differences[np.abs(differences) <= TIE] = 0
    t_test = paired_t_test(differences)
    randomization = randomization_test(differences, num_permutations=num_permutations, seed=seed)
    t_test_holm, randomization_holm = correct_by_holm(t_test), correct_by_holm(randomization)
    return [
        Comparison(
            measure,
            run.aggregated[measure],
            baseline.aggregated[measure],
            run.aggregated[measure] - baseline.aggregated[measure],
            wins=int((differences[:, column] > 0).sum()),
            losses=int((differences[:, column] < 0).sum()),
            ties=int((differences[:, column] == 0).sum()),
            t_test=t_test[column],
            randomization=randomization[column],
            t_test_holm=t_test_holm[column],
            randomization_holm=randomization_holm[column],
        )
        for column, measure in enumerate(measures)
    ]


def paired_t_test(differences: NDArray[np.float64]) -> list[float]:
    """
    Returns the two-sided p-values of Student's paired t-test.

    Args:
        differences: of shape `(num_queries, num_measures)`.

    Returns:
        one value a measure; 1 where all differences are 0, or there is but one query.
    """
    num_queries, num_measures = differences.shape
    if num_queries < 2:
        return [1.0] * num_measures
    mean, deviation = differences.mean(axis=0), differences.std(axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = np.where(mean == 0, 0.0, np.abs(mean) / (deviation / math.sqrt(num_queries)))
    student = require("scipy.special", "eval").stdtr
    return [float(value) for value in 2 * student(num_queries - 1, -statistic)]


def randomization_test(
    differences: NDArray[np.float64], *, num_permutations: int = NUM_PERMUTATIONS, seed: int = 0
) -> list[float]:
    """
    Returns the two-sided p-values of Fisher's randomization test: how often the mean difference is at least as large
    when the two systems are swapped at random, query by query (Smucker, Allan and Carterette, CIKM 2007).

    The observed assignment counts as one of the permutations, so that no p-value is 0 (Phipson and Smyth, 2010).

    Args:
        differences: of shape `(num_queries, num_measures)`; a permutation swaps all measures of a query together.

    Returns:
        one value a measure, from `1 / (num_permutations + 1)` to 1.
    """
    num_queries, num_measures = differences.shape
    generator = np.random.default_rng(seed)
    total = differences.sum(axis=0)
    as_large = np.zeros(num_measures, dtype=np.int64)
    block = max(1, BLOCK_SIZE // num_queries)
    for start in range(0, num_permutations, block):
        size = (min(block, num_permutations - start), num_queries)
        kept = generator.integers(0, 2, size, dtype=np.int8).astype(np.float64)
        sums = 2 * (kept @ differences) - total
        as_large += (np.abs(sums) >= np.abs(total) - TIE).sum(axis=0)
    return [float(value) for value in (as_large + 1) / (num_permutations + 1)]


def correct_by_holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number by the step-down method of Holm (1979), each at most 1."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _differences(run: Mapping[str, float], baseline: Mapping[str, float]) -> NDArray[np.float64]:
    return np.array([value - baseline[query_id] for query_id, value in run.items()], dtype=np.float64)

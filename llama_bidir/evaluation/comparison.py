"""Whether a run beats a baseline: paired tests over the queries, corrected for several measures."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..utils.extras import require
from .measures import Evaluation

NUM_PERMUTATIONS = 10_000
TIE_DECIMALS = 9
TIE = 10.0**-TIE_DECIMALS  # differences up to this are rounding errors
MIN_P = 0.0001  # the smallest p-value that is printed in full
SIGNS_IN_MEMORY = 2**22


class Comparison(NamedTuple):
    """
    The values of one measure for a run and its baseline.

    Attributes:
        measure: the name of the measure.
        run, baseline, difference: the aggregated values, and `run - baseline`.
        wins, losses, ties: numbers of queries for which the value of the run is higher, lower or equal.
        t_test: two-sided p-value of Student's paired t-test. Where all differences are equal, the t statistic is
            undefined, and the value is that of `randomization`.
        randomization: two-sided p-value of [`randomization_test`].
        t_test_holm, randomization_holm: the same p-values after [`correct_by_holm`] over all compared measures.
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
        run, baseline: evaluations with the same queries and measures.
        num_permutations, seed: settings of the randomization test.

    Raises:
        ValueError: the two evaluations have different measures or queries.
    """
    measures = list(run.per_query)
    if measures != list(baseline.per_query):
        raise ValueError(f"both must have the same measures, got {measures} and {list(baseline.per_query)}")
    columns = []
    for measure in measures:
        before = baseline.per_query[measure]
        if run.per_query[measure].keys() != before.keys():
            raise ValueError(f"both must be evaluated on the same queries, but those of {measure} differ")
        column = np.array([value - before[query_id] for query_id, value in run.per_query[measure].items()])
        columns.append(np.where(np.abs(column) <= TIE, 0.0, column))
    randomization = [randomization_test(each, num_permutations=num_permutations, seed=seed) for each in columns]
    stats = require("scipy.stats", "eval")
    t_test = [
        float(stats.ttest_1samp(each, 0.0).pvalue) if np.ptp(each) > TIE else p_value
        for each, p_value in zip(columns, randomization, strict=True)
    ]
    t_test_holm, randomization_holm = correct_by_holm(t_test), correct_by_holm(randomization)
    return [
        Comparison(
            measure,
            run.aggregated[measure],
            baseline.aggregated[measure],
            run.aggregated[measure] - baseline.aggregated[measure],
            wins=int((column > 0).sum()),
            losses=int((column < 0).sum()),
            ties=int((column == 0).sum()),
            t_test=t_test[number],
            randomization=randomization[number],
            t_test_holm=t_test_holm[number],
            randomization_holm=randomization_holm[number],
        )
        for number, (measure, column) in enumerate(zip(measures, columns, strict=True))
    ]


def randomization_test(
    differences: NDArray[np.float64], *, num_permutations: int = NUM_PERMUTATIONS, seed: int = 0
) -> float:
    """
    Returns the two-sided p-value of Fisher's randomization test (Smucker, Allan and Carterette, CIKM 2007).

    A permutation swaps the two systems on randomly chosen queries, which flips the signs of those differences. The
    p-value is the share of permutations whose mean difference is at least as large as the observed one. The observed
    assignment counts as one more permutation, so no p-value is 0 (Phipson and Smyth, 2010).

    Args:
        differences: run minus baseline for each query, of shape `(num_queries,)`.
        num_permutations: random permutations to draw.
        seed: seed of the permutations. Tests of equally many queries with the same seed swap the same queries.

    Returns:
        a value from `1 / (num_permutations + 1)` to 1; 1 if there is one query, or if all differences are 0.
    """
    # The test samples signs because scipy.stats.permutation_test, which permutes the differences themselves, is thirty
    # times slower: 36 seconds for 7,000 queries and three measures.
    generator = np.random.default_rng(seed)
    result = require("scipy.stats", "eval").monte_carlo_test(
        np.ones(len(differences)),
        lambda size: 1.0 - 2.0 * generator.integers(0, 2, size, dtype=np.int8),
        lambda signs, axis: np.abs(signs @ differences).round(TIE_DECIMALS),  # rounded, so that equal sums stay equal
        vectorized=True,
        n_resamples=num_permutations,
        batch=max(1, SIGNS_IN_MEMORY // len(differences)),
        alternative="greater",
    )
    return float(result.pvalue)


def correct_by_holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number by the step-down method of Holm (1979), each at most 1."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def format_p(p_value: float) -> str:
    """Formats a p-value with four decimals, or as `<0.0001`."""
    return f"<{MIN_P}" if p_value < MIN_P else f"{p_value:.4f}"

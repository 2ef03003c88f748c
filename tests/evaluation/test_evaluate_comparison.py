import itertools

import numpy as np
import pytest

from llama_bidir.evaluation import Evaluation, compare
from llama_bidir.evaluation.comparison import correct_by_holm, randomization_test

stats = pytest.importorskip("scipy.stats")


def evaluation(**measures: list[float]) -> Evaluation:
    per_query = {name: {f"q{n}": value for n, value in enumerate(values)} for name, values in measures.items()}
    return Evaluation({name: float(np.mean(values)) for name, values in measures.items()}, per_query)


def test_both_p_values_of_one_measure_by_hand():
    # The mean is 2 and the standard deviation is 1, so t = 2 / (1 / sqrt(3)) = 3.4641 with 2 degrees of freedom. For 2
    # degrees of freedom, p = 1 - t / sqrt(t^2 + 2) = 1 - sqrt(12 / 14).
    (comparison,) = compare(evaluation(a=[1.0, 2.0, 3.0]), evaluation(a=[0.0, 0.0, 0.0]), num_permutations=200_000)
    assert comparison.t_test == pytest.approx(1 - (12 / 14) ** 0.5, rel=1e-12)
    # Two of the eight assignments have a sum of 6 or more without its sign.
    assert comparison.randomization == pytest.approx(2 / 8, abs=0.005)


def test_the_t_test_is_that_of_scipy():
    run, baseline = np.random.default_rng(0).random((2, 3, 50)).tolist()
    names = ("a", "b", "c")
    comparisons = compare(
        evaluation(**dict(zip(names, run, strict=True))), evaluation(**dict(zip(names, baseline, strict=True)))
    )
    expected = stats.ttest_rel(run, baseline, axis=1).pvalue
    assert [each.t_test for each in comparisons] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("run", "baseline", "p_value"),
    [
        ([0.5], [0.0], 1),  # one query
        ([0.5, 0.25, 0.3], [0.5, 0.25, 0.1 * 3], 1),  # equal but for rounding
        ([0.5, 0.3], [0.2, 0.0], 1 / 2),  # two equal differences are no evidence, although they have no variance
        ([0.5] * 4, [0.0] * 4, 1 / 8),
        ([0.5] * 100, [0.0] * 100, 1 / 10_001),
    ],
)
def test_equal_differences_have_the_p_value_of_the_randomization_test(run, baseline, p_value):
    (comparison,) = compare(evaluation(a=run), evaluation(a=baseline))
    assert comparison.t_test == comparison.randomization == pytest.approx(p_value, abs=0.01 if p_value < 1 else 0)


def test_the_randomization_test_nears_the_exact_one():
    differences = np.array([0.5, 0.25, -0.125, 0.75, 0.0, 0.5, -0.25, 0.375])
    signs = np.array(list(itertools.product([-1, 1], repeat=8)))
    exact = np.mean(np.abs(signs @ differences) >= np.abs(differences.sum()))
    assert randomization_test(differences, num_permutations=200_000) == pytest.approx(exact, abs=0.005)


def test_the_randomization_test_is_seeded_and_never_0(monkeypatch):
    differences = np.random.default_rng(1).normal(0.1, 0.5, 200)
    first = randomization_test(differences, seed=7)
    assert first == randomization_test(differences, seed=7)
    assert first != randomization_test(differences, seed=8)
    assert randomization_test(np.zeros(10)) == 1
    assert randomization_test(np.full(100, 0.5)) == 1 / 10_001
    # In batches, the last of which is smaller.
    monkeypatch.setattr("llama_bidir.evaluation.comparison.SIGNS_IN_MEMORY", 200 * 301)
    assert randomization_test(differences, seed=7) == pytest.approx(first, abs=0.02)


def test_holm_by_hand():
    assert correct_by_holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert correct_by_holm([0.9, 0.8]) == [1, 1]
    assert correct_by_holm([0.04]) == [0.04]
    assert correct_by_holm([]) == []


def test_a_comparison_by_hand():
    run, baseline = evaluation(a=[1.0, 0.5, 0.3, 0.2], b=[1.0] * 4), evaluation(a=[0.5, 0.5, 0.1 * 3, 0.4], b=[0.0] * 4)
    a, b = compare(run, baseline)
    assert (a.measure, a.wins, a.losses, a.ties) == ("a", 1, 1, 2)
    assert (a.run, a.baseline, a.difference) == pytest.approx((0.5, 0.425, 0.075))
    assert (b.wins, b.losses, b.ties, b.t_test) == (4, 0, 0, b.randomization)
    assert b.randomization == pytest.approx(2 / 16, abs=0.02)
    assert b.randomization_holm == 2 * b.randomization
    assert a.randomization_holm == max(a.randomization, b.randomization_holm)


def test_evaluations_must_match():
    with pytest.raises(ValueError, match=r"^both must have the same measures, got \['a'\] and \['b'\]$"):
        compare(evaluation(a=[1.0]), evaluation(b=[1.0]))
    with pytest.raises(ValueError, match=r"^both must be evaluated on the same queries, but those of a differ$"):
        compare(evaluation(a=[1.0]), evaluation(a=[1.0, 0.5]))

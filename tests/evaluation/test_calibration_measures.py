"""The fit of probabilities and their measures, against values by hand and against scikit-learn's formulas."""

import numpy as np
import pytest

from llama_bidir.evaluation.calibration import (
    expected_calibration_error,
    fit_calibration,
    log_loss,
    plot_reliability,
    reliability_bins,
)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize(("slope", "offset"), [(1.0, 0.0), (0.05, 3.0), (40.0, -7.0)])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e-3, 50.0)])
def test_the_fit_finds_the_slope_and_the_offset_that_made_the_labels(slope, offset, scale, shift):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=200_000) * 2
    labels = rng.random(len(scores)) < sigmoid(slope * scores + offset)
    found = fit_calibration(scores * scale + shift, labels)
    assert found[0] * scale == pytest.approx(slope, rel=0.08, abs=0.03)  # four standard errors
    assert found[1] + found[0] * shift == pytest.approx(offset, rel=0.08, abs=0.05)


def test_the_fit_is_the_minimum_of_platts_log_loss():
    rng = np.random.default_rng(1)
    scores = rng.normal(size=500)
    labels = scores + rng.normal(size=500) > 0.8
    slope, offset = fit_calibration(scores, labels)
    positives, negatives = labels.sum(), (~labels).sum()
    targets = np.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    residual = sigmoid(slope * scores + offset) - targets
    assert abs(residual.mean()) < 1e-7
    assert abs((residual * scores).mean()) < 1e-7


def test_separable_scores_have_a_finite_slope_and_high_scores_do_not_overflow():
    for scale in (1.0, 1e4):
        scores = np.array([-2.0, -1.0, 1.0, 2.0], dtype=np.float32) * scale
        slope, offset = fit_calibration(scores, scores > 0)
        assert 0 < slope * scale < 100
        # By Platt's targets, of 2 relevant pairs of 2, 3 of 4 are.
        assert sigmoid(slope * 1.5 * scale + offset) == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [True, True], "needs relevant and irrelevant pairs, but all 2 are relevant"),
        ([1.0, 2.0], [False, False], "needs relevant and irrelevant pairs, but all 2 are irrelevant"),
        ([3.0, 3.0], [True, False], "needs scores that differ, but all 2 are 3"),
        ([1.0, 2.0, 3.0], [True, False, False], "the scores of relevant pairs are not higher than those of other"),
    ],
)
def test_what_cannot_be_fitted_is_told(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_calibration(np.array(scores), np.array(labels))


def test_an_outlier_does_not_stop_the_fit():
    rng = np.random.default_rng(2)
    scores = rng.normal(size=1000)
    labels = rng.random(1000) < sigmoid(2 * scores)
    expected = fit_calibration(scores, labels)
    found = fit_calibration(np.append(scores, 1e3), np.append(labels, True))
    assert found == pytest.approx(expected, rel=0.03, abs=0.01)


def test_measures_by_hand():
    probabilities = np.array([0.9, 0.8, 0.3, 0.0, 1.0])
    labels = np.array([True, False, False, False, True])
    assert log_loss(probabilities, labels) == pytest.approx(-(np.log(0.9) + np.log(0.2) + np.log(0.7)) / 5, abs=1e-12)
    assert log_loss(np.array([0.0]), np.array([True])) == pytest.approx(-np.log(1e-15))
    # Two intervals: 0 and 0.3 with none of 2 relevant; 0.8, 0.9 and 1 with 2 of 3.
    assert expected_calibration_error(probabilities, labels, num_bins=2) == pytest.approx(
        2 / 5 * 0.15 + 3 / 5 * (0.9 - 2 / 3)
    )
    assert [each.num_pairs for each in reliability_bins(probabilities, labels, num_bins=2)] == [2, 3]
    # The last interval holds 1.
    assert reliability_bins(np.array([1.0]), np.array([True]))[0].num_pairs == 1


def test_a_plot_shows_both_stages(tmp_path):
    bins = reliability_bins(np.array([0.1, 0.9]), np.array([False, True]))
    plot_reliability(tmp_path / "plot.png", bins, bins, title="Reliability")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

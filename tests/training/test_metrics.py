import math

import numpy as np
import pytest

pytest.importorskip("accelerate")

from llama_bidir.training.metrics import group_metrics


def metrics(scores, labels):
    return group_metrics(np.array(scores, dtype=np.float32), np.array(labels, dtype=np.float32))


def test_values_by_hand():
    # Ranks of the relevant passages: 2 of one, 1 and 3 of two.
    result = metrics([[2.0, 3.0, 1.0], [5.0, 1.0, 3.0]], [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    second = (1 + 1 / math.log2(4)) / (1 + 1 / math.log2(3))
    assert result == {
        "accuracy@1": 0.5,
        "mrr@10": pytest.approx((1 / 2 + 1) / 2),
        "ndcg@10": pytest.approx((1 / math.log2(3) + second) / 2),
    }


def test_padding_is_not_a_passage():
    padded = metrics([[2.0, 3.0, 9.0, 9.0]], [[1.0, 0.0, -100.0, -100.0]])
    assert padded == metrics([[2.0, 3.0]], [[1.0, 0.0]])


def test_ties_and_nan_count_against_the_model():
    assert metrics([[1.0, 1.0, 1.0]], [[1.0, 0.0, 0.0]])["mrr@10"] == pytest.approx(1 / 3)
    assert metrics([[math.nan, -5.0, -7.0]], [[1.0, 0.0, 0.0]])["mrr@10"] == pytest.approx(1 / 3)
    assert metrics([[math.nan, -5.0]], [[1.0, -100.0]])["mrr@10"] == 1.0


def test_only_ten_ranks_count():
    scores = [[float(-i) for i in range(12)]]
    assert metrics(scores, [[0.0] * 10 + [1.0, 0.0]]) == {"accuracy@1": 0.0, "mrr@10": 0.0, "ndcg@10": 0.0}
    assert metrics(scores, [[0.0] * 12])["ndcg@10"] == 0.0


def test_graded_gains_and_any_order_of_columns():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(20, 15)), rng.integers(0, 4, size=(20, 15)).astype(float)
    order = rng.permutation(15)
    assert group_metrics(scores[:, order], labels[:, order]) == pytest.approx(group_metrics(scores, labels))
    ir_measures = pytest.importorskip("ir_measures")
    qrels = {f"q{i}": {f"d{j}": int(labels[i, j]) for j in range(15)} for i in range(20)}
    run = {f"q{i}": {f"d{j}": float(scores[i, j]) for j in range(15)} for i in range(20)}
    expected = ir_measures.calc_aggregate([ir_measures.nDCG @ 10, ir_measures.RR @ 10], qrels, run)
    result = group_metrics(scores, labels)
    assert result["ndcg@10"] == pytest.approx(expected[ir_measures.nDCG @ 10], abs=1e-6)
    assert result["mrr@10"] == pytest.approx(expected[ir_measures.RR @ 10], abs=1e-6)

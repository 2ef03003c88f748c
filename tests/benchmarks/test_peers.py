"""The peers in their strongest form compute what this package computes."""

import numpy as np
import pytest
import torch

from benchmarks.flash import torch_varlen
from benchmarks.graphs import load_onnxruntime, load_openvino
from benchmarks.models import write_checkpoint
from benchmarks.peers import load_llama_bidir, load_unpadded
from benchmarks.speed import relative_error
from benchmarks.trainers import PACKED, UNPADDED, WHOLE_BATCH, Group, Task, train

PAIRS = [(f"what is number {number}?", "bees " * (number % 9) + str(number)) for number in range(20)]
OPTIONS = {"dtype": "float32", "device": "cpu", "max_length": 200}


@pytest.fixture(scope="module")
def folder(base_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reranker")
    write_checkpoint("tiny", base_checkpoint, folder)
    return str(folder)


@pytest.fixture(scope="module")
def expected(folder):
    return load_llama_bidir(folder, **OPTIONS).score(PAIRS, None)


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_attends_within_each_sequence(causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    starts = torch.tensor([0, 2, 9], dtype=torch.int32)
    output = torch_varlen(q, k, v, starts, starts, 7, 7, softmax_scale=0.3, causal=causal)
    for start, end in ((0, 2), (2, 9)):
        for head in range(4):
            weights = 0.3 * q[start:end, head] @ k[start:end, head // 2].T
            if causal:
                weights += torch.full_like(weights, -torch.inf).triu(1)
            states = weights.softmax(-1) @ v[start:end, head // 2]
            torch.testing.assert_close(output[start:end, head], states)


def test_varlen_refuses_dropout():
    states, starts = torch.zeros(2, 1, 8), torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"dropout_p must be 0, got 0\.1"):
        torch_varlen(states, states, states, starts, starts, 2, 2, dropout_p=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [3, 32])
def test_sentence_transformers_without_padding(folder, expected, batch_size):
    pytest.importorskip("sentence_transformers")
    scorer = load_unpadded(folder, **OPTIONS)
    assert relative_error(scorer.score(PAIRS, batch_size), expected) < 1e-5
    assert scorer.setting.format(batch_size) == f"unpadded, attention by sequence, {batch_size} pairs"


@pytest.mark.slow
@pytest.mark.parametrize("load", [load_onnxruntime, load_openvino])
def test_graphs(folder, expected, load):
    pytest.importorskip("onnxscript")
    if load is load_openvino:
        pytest.importorskip("openvino")
    assert relative_error(load(folder, **OPTIONS).score(PAIRS, 8), expected) < 1e-5
    if load is load_onnxruntime:
        scores = load(folder, **{**OPTIONS, "dtype": "int8"}).score(PAIRS, 8)
        assert 1e-4 < relative_error(scores, expected) < 0.5


@pytest.mark.slow
def test_training_without_padding_has_the_losses_of_this_package(folder):
    pytest.importorskip("sentence_transformers")
    groups = [Group(query, [f"bees {query}", "", "the hive " * 5], [1, 1, 1]) for query, _ in PAIRS[:10]]
    task = Task(folder, [groups[start : start + 2] for start in range(0, 10, 2)], 3, 200, "float32")
    losses = {name: train(name, task).losses for name in (PACKED, WHOLE_BATCH, UNPADDED)}
    assert len(losses[PACKED]) == 4
    assert losses[PACKED][0] != losses[PACKED][3]
    np.testing.assert_allclose(losses[WHOLE_BATCH], losses[PACKED], rtol=1e-5)
    np.testing.assert_allclose(losses[UNPADDED], losses[PACKED], rtol=1e-5)

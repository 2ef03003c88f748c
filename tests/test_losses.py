import math

import pytest
import torch
from torch import nn

from llama_bidir.losses import get_loss, listwise_cross_entropy


def test_by_hand():
    scores = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, -100.0]])
    labels = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, -100.0]])
    first = -math.log(math.e**2 / (math.e**2 + 2))
    second = -math.log(1 / (1 + math.e))
    assert listwise_cross_entropy(scores, labels).item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_equals_cross_entropy_with_the_positive_first():
    scores = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(6, 5)
    labels[:, 0] = 1
    expected = nn.functional.cross_entropy(scores, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(listwise_cross_entropy(scores, labels), expected)


def test_padding_and_order_change_neither_loss_nor_gradient():
    scores = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.tensor([[1.0, 0.0, 0.0]]).repeat(4, 1)
    loss = listwise_cross_entropy(scores, labels)
    (gradient,) = torch.autograd.grad(loss, scores)
    padded = torch.cat([scores, torch.full((4, 2), -100.0)], dim=1)
    padded_labels = torch.cat([labels, torch.full((4, 2), -100.0)], dim=1)
    order = torch.tensor([4, 2, 0, 3, 1])
    other = listwise_cross_entropy(padded[:, order], padded_labels[:, order])
    torch.testing.assert_close(other, loss)
    torch.testing.assert_close(torch.autograd.grad(other, scores)[0], gradient)


def test_several_positives_share_the_target():
    scores = torch.tensor([[1.0, 2.0, 0.0]])
    log_probabilities = scores.log_softmax(1)[0]
    expected = -(log_probabilities[0] + log_probabilities[1]).item() / 2
    assert listwise_cross_entropy(scores, torch.tensor([[1.0, 1.0, 0.0]])).item() == pytest.approx(expected)


def test_names():
    assert get_loss("listwise_cross_entropy") is listwise_cross_entropy
    assert get_loss(nn.functional.mse_loss) is nn.functional.mse_loss
    with pytest.raises(ValueError, match="loss must be a function or one of listwise_cross_entropy, got 'hinge'"):
        get_loss("hinge")

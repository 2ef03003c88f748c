import math
import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from llama_bidir.losses import (
    LOSSES,
    TEACHER_LOSSES,
    check_group_size,
    get_loss,
    lambda_loss,
    list_mle,
    needs_teacher,
    ranknet,
)

GARBAGE = [math.nan, math.inf, -math.inf, 1e30, -100.0]
# Groups of several grades, of one positive, of no positive, of one passage, and of none.
LABELS = [[2.0, 0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0], []]

every_loss = pytest.mark.parametrize("name", LOSSES)


def make_groups(
    *, fill: float = 0.0, ties: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """The arguments of a loss for the groups of LABELS, random scores, and `fill` where there is no passage."""
    generator = torch.Generator().manual_seed(0)

    def pad(rows: list[torch.Tensor]) -> torch.Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=fill).to(dtype)

    scores, teacher_scores = ([2 * torch.randn(len(row), generator=generator) for row in LABELS] for _ in range(2))
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in LABELS], batch_first=True)
    return {
        "scores": pad([row.sign() for row in scores] if ties else scores).requires_grad_(),
        "labels": pad([torch.tensor(row) for row in LABELS]),
        "mask": mask,
        "teacher_scores": pad(teacher_scores),
    }


def loss_and_gradient(name: str, groups: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    loss = LOSSES[name](**groups)
    return loss, torch.autograd.grad(loss, groups["scores"])[0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def lambda_weight(gain_difference: float, better: int, worse: int) -> float:
    """Weight of a pair in NDCG-Loss2++, from the ranks of its passages."""
    distance = abs(better - worse)
    rho = abs(1 / math.log2(1 + better) - 1 / math.log2(1 + worse))
    delta = 1 / math.log2(1 + distance) - 1 / math.log2(2 + distance)
    return (rho + 10 * delta) * gain_difference


# Of a group with scores (1, 3, 2, 0) and labels (2, 0, 1, 0), ranked 3, 1, 2, 4.
IDEAL_DCG = 3 + 1 / math.log2(3)
TEACHER = [2.0, 1.0, -1.0, 0.0]
SOFTMAX = [math.exp(s) / sum(math.exp(s) for s in (1, 3, 2, 0)) for s in (1, 3, 2, 0)]
TEACHER_SOFTMAX = [math.exp(t) / sum(math.exp(t) for t in TEACHER) for t in TEACHER]
BY_HAND = {
    "listwise_cross_entropy": -(2 * math.log(SOFTMAX[0]) + math.log(SOFTMAX[2])) / 3,
    "binary_cross_entropy": -sum(math.log(sigmoid(x)) for x in (1, -3, 2, 0)) / 4,
    # Pairs (0, 1), (0, 2), (0, 3), (2, 1), (2, 3).
    "ranknet": -sum(math.log2(sigmoid(x)) for x in (1 - 3, 1 - 2, 1 - 0, 2 - 3, 2 - 0)) / 5,
    "lambda": -(
        lambda_weight(3 / IDEAL_DCG, 3, 1) * math.log2(sigmoid(1 - 3))
        + lambda_weight(2 / IDEAL_DCG, 3, 2) * math.log2(sigmoid(1 - 2))
        + lambda_weight(3 / IDEAL_DCG, 3, 4) * math.log2(sigmoid(1 - 0))
        + lambda_weight(1 / IDEAL_DCG, 2, 1) * math.log2(sigmoid(2 - 3))
        + lambda_weight(1 / IDEAL_DCG, 2, 4) * math.log2(sigmoid(2 - 0))
    )
    / 5,
    "list_mle": -(
        math.log(SOFTMAX[0])
        + math.log(math.exp(2) / (math.exp(3) + math.exp(2) + 1))
        + math.log(math.exp(3) / (math.exp(3) + 1))
        + math.log(1 / (math.exp(3) + 1))
    ),
    # The teacher's margins of (0, 1), (0, 3), (2, 1), (2, 3) are 1, 2, -2, -1.
    "margin_mse": ((-2 - 1) ** 2 + (1 - 2) ** 2 + (-1 + 2) ** 2 + (2 + 1) ** 2) / 4,
    "mse": ((1 - 2) ** 2 + (3 - 1) ** 2 + (2 + 1) ** 2 + 0) / 4,
    "kl_div": sum(p * math.log(p / q) for p, q in zip(TEACHER_SOFTMAX, SOFTMAX, strict=True)),
}


@every_loss
def test_by_hand(name):
    scores, labels = torch.tensor([[1.0, 3.0, 2.0, 0.0]]), torch.tensor([[2, 0, 1, 0]])
    loss = LOSSES[name](scores, labels, teacher_scores=torch.tensor([TEACHER]))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(BY_HAND[name], rel=1e-6)


@every_loss
def test_is_the_mean_over_groups_and_padding_changes_neither_loss_nor_gradient(name):
    groups = make_groups()
    losses, gradients = [], []
    for group, row in enumerate(LABELS[:-1]):
        alone = {key: value[group : group + 1, : len(row)].detach() for key, value in groups.items() if key != "mask"}
        alone["scores"].requires_grad_()
        loss, gradient = loss_and_gradient(name, alone)
        losses.append(loss)
        gradients.append(gradient[0] / len(LABELS))
    expected = pad_sequence([*gradients, torch.zeros(0)], batch_first=True)
    for fill in GARBAGE:
        loss, gradient = loss_and_gradient(name, make_groups(fill=fill))
        torch.testing.assert_close(loss, sum(losses) / len(LABELS))
        torch.testing.assert_close(gradient, expected)
        assert torch.all(gradient[~groups["mask"]] == 0)


@every_loss
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "tied"])
def test_order_of_the_passages_does_not_matter(name, ties):
    groups = make_groups(fill=math.nan, ties=ties)
    loss, gradient = loss_and_gradient(name, groups)
    for seed in range(5):
        order = torch.rand(groups["mask"].shape, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
        shuffled = {key: value.detach().gather(1, order) for key, value in groups.items()}
        shuffled["scores"].requires_grad_()
        other, other_gradient = loss_and_gradient(name, shuffled)
        torch.testing.assert_close(other, loss)
        torch.testing.assert_close(other_gradient, gradient.gather(1, order))


@every_loss
def test_gradcheck(name):
    groups = make_groups(dtype=torch.float64)
    scores = groups.pop("scores")
    assert torch.autograd.gradcheck(lambda scores: LOSSES[name](scores, **groups), scores)


@every_loss
def test_extreme_scores_still_move_the_right_way(name):
    best = torch.tensor([[1e4, -1e4, -1e4, -1e4]])
    groups = {
        "labels": torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
        "mask": torch.tensor([[True, True, True, False]]),
        "teacher_scores": best,
    }
    high, gradient = loss_and_gradient(name, {"scores": (-best).requires_grad_(), **groups})
    assert torch.isfinite(gradient).all()
    assert torch.equal(gradient.sign(), torch.tensor([[-1.0, 1.0, 1.0, 0.0]]))
    low, gradient = loss_and_gradient(name, {"scores": best.clone().requires_grad_(), **groups})
    assert torch.isfinite(gradient).all()
    assert math.inf > high > low >= 0


@every_loss
def test_bfloat16_scores_are_computed_in_float32(name):
    halves = make_groups(dtype=torch.bfloat16)
    singles = {key: value.detach().float() if key != "mask" else value for key, value in halves.items()}
    singles["scores"].requires_grad_()
    loss, gradient = loss_and_gradient(name, halves)
    expected, expected_gradient = loss_and_gradient(name, singles)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradient, expected_gradient.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("listwise_cross_entropy", 0.0),
        *[(name, label) for name in ("ranknet", "lambda", "list_mle", "margin_mse") for label in (0.0, 1.0)],
    ],
)
def test_a_group_with_nothing_to_compare_contributes_0(name, label):
    scores = torch.tensor([[1.0, 2.0, 4.0]], requires_grad=True)
    groups = {"scores": scores, "labels": torch.full((1, 3), label), "teacher_scores": torch.tensor([[3.0, 0.0, 1.0]])}
    loss, gradient = loss_and_gradient(name, groups)
    assert loss.item() == 0
    assert gradient.tolist() == [[0, 0, 0]]


def test_ranknet_and_lambda_of_a_pair_differ_by_its_weight():
    labels = torch.tensor([[1, 0]])
    for scores, ranks in (([2.0, 1.0], (1, 2)), ([1.0, 2.0], (2, 1))):
        expected = lambda_weight(1, *ranks) * ranknet(torch.tensor([scores]), labels)
        torch.testing.assert_close(lambda_loss(torch.tensor([scores]), labels), expected)


def test_lambda_ranks_the_less_relevant_of_tied_passages_first():
    scores, labels = torch.zeros(1, 4), torch.tensor([[0, 2, 0, 1]])
    # Both negatives share rank 1, and sigmoid(0) is one bit.
    pairs = [(3, 4, 1), (3, 4, 1), (2, 4, 3), (1, 3, 1), (1, 3, 1)]
    weights = [lambda_weight(gain / IDEAL_DCG, better, worse) for gain, better, worse in pairs]
    assert lambda_loss(scores, labels).item() == pytest.approx(sum(weights) / 5, rel=1e-6)


def test_list_mle_of_binary_labels_adds_a_draw_of_each_negative_to_cross_entropy():
    scores, labels = torch.tensor([[0.5, 2.0, -1.0]]), torch.tensor([[1, 0, 0]])
    negatives = -math.log(sigmoid(2 + 1)) - math.log(sigmoid(-1 - 2))
    expected = LOSSES["listwise_cross_entropy"](scores, labels) + negatives
    torch.testing.assert_close(list_mle(scores, labels), expected)


@pytest.fixture(scope="module")
def reference():
    """
    The losses of sentence-transformers as functions of the scores, labels and teacher scores of one group, whose first
    passage is the positive.
    """
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.cross_encoder import CrossEncoder, losses

    class GivenScores(CrossEncoder):
        """A cross-encoder whose passages are positions in a tensor of scores."""

        num_labels = 1
        device = torch.device("cpu")

        def __init__(self, scores):
            nn.Module.__init__(self)
            self.scores = scores

        def preprocess(self, pairs, **kwargs):
            return {"positions": torch.tensor([position for _, position in pairs])}

        def forward(self, inputs):
            return {"scores": self.scores[inputs["positions"]]}

    def listwise(loss, scores, labels):
        return loss(GivenScores(scores))([["query"], [list(range(len(scores)))]], [labels])

    def list_net(scores, logits):
        # A cross entropy minus the entropy of its target is a divergence.
        target = logits.softmax(dim=0)
        return listwise(losses.ListNetLoss, scores, logits) - torch.special.entr(target).sum()

    def listwise_cross_entropy(scores, labels, teacher_scores):
        return listwise(losses.ListNetLoss, scores, torch.where(labels > 0, labels.log(), -1e4))

    def binary_cross_entropy(scores, labels, teacher_scores):
        return losses.BinaryCrossEntropyLoss(GivenScores(scores))(
            [["query"] * len(scores), list(range(len(scores)))], labels > 0
        )

    def margin_mse(scores, labels, teacher_scores):
        passages = [[position] for position in range(len(scores))]
        return losses.MarginMSELoss(GivenScores(scores))([["query"], *passages], [teacher_scores])

    def mse(scores, labels, teacher_scores):
        return losses.MSELoss(GivenScores(scores))([["query"] * len(scores), list(range(len(scores)))], teacher_scores)

    return {
        "listwise_cross_entropy": listwise_cross_entropy,
        "binary_cross_entropy": binary_cross_entropy,
        "ranknet": lambda scores, labels, _: listwise(losses.RankNetLoss, scores, labels),
        "lambda": lambda scores, labels, _: listwise(losses.LambdaLoss, scores, labels),
        "list_mle": lambda scores, labels, _: listwise(losses.ListMLELoss, scores, labels),
        "margin_mse": margin_mse,
        "mse": mse,
        "kl_div": lambda scores, _, teacher_scores: list_net(scores, teacher_scores),
    }


GRADES = [[1.0, 0.0, 0.0, 0.0], [3.0, 1.0, 0.0, 2.0, 1.0], [1.0, 1.0, 0.0]]
FALLING = [[3.0, 2.0, 1.0, 0.0], [2.5, 0.5, 0.0], [1.0, 0.0]]
ONE_POSITIVE = [[1.0, 0.0, 0.0, 0.0], [1.0, 0.0]]


@every_loss
def test_equals_sentence_transformers(name, reference):
    generator = torch.Generator().manual_seed(1)
    for row in {"list_mle": FALLING, "margin_mse": ONE_POSITIVE}.get(name, GRADES):
        labels = torch.tensor(row)
        scores = (3 * torch.randn(len(row), generator=generator)).requires_grad_()
        teacher_scores = torch.randn(len(row), generator=generator)
        expected = reference[name](scores, labels, teacher_scores)
        loss = LOSSES[name](scores[None], labels[None], None, teacher_scores[None])
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, scores), torch.autograd.grad(expected, scores))


def test_names():
    for name, loss in LOSSES.items():
        assert get_loss(name) is loss
    assert get_loss(nn.functional.mse_loss) is nn.functional.mse_loss


def test_a_mixture_is_the_weighted_sum():
    groups = make_groups(fill=math.nan)
    mixture = get_loss({"listwise_cross_entropy": 1.0, "mse": 0.5, "kl_div": 2})
    loss = mixture(**groups)
    parts = [loss_and_gradient(name, groups) for name in ("listwise_cross_entropy", "mse", "kl_div")]
    torch.testing.assert_close(loss, parts[0][0] + 0.5 * parts[1][0] + 2 * parts[2][0])
    gradient = torch.autograd.grad(loss, groups["scores"])[0]
    torch.testing.assert_close(gradient, parts[0][1] + 0.5 * parts[1][1] + 2 * parts[2][1])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "a mixture of losses must name at least one of listwise_cross_entropy, "),
        ({"mse": 0}, "the weight of the loss 'mse' must be a finite number above 0, got 0"),
        ({"mse": math.nan}, "the weight of the loss 'mse' must be a finite number above 0, got nan"),
        ({"mse": True}, "the weight of the loss 'mse' must be a finite number above 0, got True"),
        ({"mse": "1"}, "the weight of the loss 'mse' must be a finite number above 0, got '1'"),
        ({"kl": 1.0}, "loss must be a function or one of .*, got 'kl'; the nearest is 'kl_div'"),
    ],
)
def test_a_wrong_mixture_is_refused(weights, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        get_loss(weights)


@every_loss
def test_a_batch_without_passages_contributes_0(name):
    empty = torch.zeros(2, 0, requires_grad=True)
    assert LOSSES[name](empty, empty.detach(), teacher_scores=empty.detach()).item() == 0


def test_lambda_of_large_grades_is_finite():
    """2^200 is no float32. Only the ratios of the gains count, and those of 200 and 199 are those of large grades."""
    scores = torch.tensor([[0.3, 1.0, -0.5]], requires_grad=True)
    losses = [lambda_loss(scores, torch.tensor([[top, top - 1.0, 0.0]])) for top in (200.0, 60.0)]
    torch.testing.assert_close(*losses)
    assert torch.autograd.grad(losses[0], scores)[0].isfinite().all()


def test_what_a_loss_needs():
    assert [name for name in LOSSES if needs_teacher(name)] == ["margin_mse", "kl_div", "mse"]
    assert needs_teacher({"ranknet": 1.0, "mse": 0.5})
    assert not needs_teacher({"ranknet": 1.0, "lambda": 0.5})
    assert not needs_teacher(nn.functional.mse_loss)
    for loss in ("binary_cross_entropy", "mse", {"mse": 1.0, "binary_cross_entropy": 1.0}, nn.functional.mse_loss):
        check_group_size(loss, 1)
    for loss in ("kl_div", {"mse": 1.0, "kl_div": 1.0}):
        with pytest.raises(ValueError, match=r"^kl_div compares the passages of a group: n must be at least 2$"):
            check_group_size(loss, 1, "n")
        check_group_size(loss, None)


@pytest.mark.parametrize(("name", "nearest"), [("rank_net", "ranknet"), ("mse_margin", "margin_mse")])
def test_an_unknown_name_is_told_the_known_ones(name, nearest):
    message = (
        "loss must be a function or one of listwise_cross_entropy, binary_cross_entropy, ranknet, lambda, list_mle, "
        f"margin_mse, kl_div, mse, got {name!r}; the nearest is {nearest!r}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        get_loss(name)


@every_loss
def test_only_teacher_losses_need_teacher_scores(name):
    scores, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    if name in TEACHER_LOSSES:
        with pytest.raises(ValueError, match=f"^{name} needs teacher_scores: give every row pos_score and neg_score$"):
            LOSSES[name](scores, labels)
    else:
        torch.testing.assert_close(LOSSES[name](scores, labels), LOSSES[name](scores, labels, None, scores))


@every_loss
def test_shapes_that_would_broadcast_are_refused(name):
    labels = torch.tensor([[1.0, 0.0]])
    message = "scores, labels, teacher_scores and mask must have one shape (groups, group_size), got (1, 1), (1, 2)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        LOSSES[name](torch.ones(1, 1), labels, teacher_scores=labels)

"""Batches in pieces: the gradients are those of the whole batch, and one piece at a time is in memory."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from helpers import ROWS, arguments, losses, make_model, make_tokenizer

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from llama_bidir import CrossEncoderTrainer, CrossEncoderTrainingArguments  # noqa: E402
from llama_bidir.scoring.packing import pack, pad  # noqa: E402
from llama_bidir.training.pieces import Pieces, count_pairs, select_pairs  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_plot")
SEQUENCES = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [12, 13, 14, 15], [16, 17]]


SCORED = [{**row, "pos_score": [2.0], "neg_score": [-float(len(text)) for text in row["neg_doc"]]} for row in ROWS]


def make_trainer(path, *, peft_config=None, **fields):
    torch.manual_seed(0)
    return CrossEncoderTrainer(
        make_model(),
        arguments(CrossEncoderTrainingArguments, path, optim="sgd", max_grad_norm=0, max_steps=2, **fields),
        SCORED,
        SCORED[:7],
        make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"),
        group_size=4,
        peft_config=peft_config,
    )


@pytest.mark.parametrize(
    ("fields", "peft_config", "tolerance"),
    [
        ({}, None, 1e-5),
        ({"packing": False}, None, 1e-5),
        ({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}, None, 1e-5),
        ({"gradient_checkpointing": True}, None, 1e-5),
        ({"bf16": True}, None, 5e-2),
        ({}, peft.LoraConfig(r=4, task_type="SEQ_CLS"), 1e-5),
        ({"loss": "kl_div"}, None, 1e-5),
    ],
    ids=["packed", "padded", "accumulated", "checkpointing", "bf16", "lora", "distilled"],
)
@pytest.mark.parametrize("max_pairs", [1, 3])
def test_pieces_train_as_the_whole_batch(fields, peft_config, tolerance, max_pairs, tmp_path):
    whole, pieces = (
        make_trainer(tmp_path, peft_config=copy.deepcopy(peft_config), max_pairs_per_forward=each, **fields)
        for each in (None, max_pairs)
    )
    pieces.model.load_state_dict(whole.model.state_dict())
    before = copy.deepcopy(whole.model.state_dict())
    sizes = []
    pieces.model.register_forward_pre_hook(
        lambda module, args, inputs: sizes.append(count_pairs(inputs)), with_kwargs=True
    )
    for trainer in (whole, pieces):
        trainer.train()
    assert max(sizes) == max_pairs
    np.testing.assert_allclose(losses(pieces), losses(whole), rtol=max(tolerance, 1e-5))
    for name in before:
        change, expected_change = (
            state[name] - before[name] for state in (pieces.model.state_dict(), whole.model.state_dict())
        )
        error = (change - expected_change).norm()
        assert error <= tolerance * expected_change.norm() + 1e-7, name
    assert sum((whole.model.state_dict()[name] - before[name]).norm() for name in before) > 1e-3
    measured, expected = (trainer.evaluate() for trainer in (pieces, whole))
    assert measured["eval_loss"] == pytest.approx(expected["eval_loss"], rel=max(tolerance, 1e-5))


@pytest.mark.parametrize("make_batch", [pack, pad])
def test_each_piece_sees_the_same_dropout_twice(make_batch):
    model = make_model(attention_dropout=0.5, attn_implementation="eager" if make_batch is pad else "sdpa").train()
    batch = make_batch(SEQUENCES)
    torch.manual_seed(1)
    pieces = Pieces(model, batch, 3)
    loss = pieces.scores().square().sum()
    drawn = torch.rand(1)
    loss.backward()
    pieces.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    # The same pieces with one graph.
    torch.manual_seed(1)
    scores = torch.cat([model(**select_pairs(batch, *ends)).logits[:, 0] for ends in ((0, 1), (1, 3), (3, 5))])
    assert torch.equal(torch.rand(1), drawn)  # the second time draws nothing
    torch.testing.assert_close(scores.square().sum(), loss)
    model.zero_grad()
    scores.square().sum().backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make_batch", [pack, pad])
def test_pairs_of_a_batch_are_those_of_a_smaller_one(make_batch):
    batch = make_batch(SEQUENCES)
    assert count_pairs(batch) == 5
    for start, end in ((0, 5), (0, 1), (1, 3), (4, 5)):
        selected, expected = select_pairs(batch, start, end), make_batch(SEQUENCES[start:end])
        assert selected.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(selected[name], value) if isinstance(value, torch.Tensor) else selected[name] == value


def test_a_process_with_fewer_pairs_takes_part_in_every_piece():
    model = make_model()
    calls, synced = [], []
    model.register_forward_pre_hook(lambda module, args, inputs: calls.append(count_pairs(inputs)), with_kwargs=True)

    class NoSync(nullcontext):
        def __enter__(self):
            synced.append(len(calls))

    pieces = Pieces(model, pack(SEQUENCES[:2]), 4)
    pieces.scores().sum().backward()
    assert calls == [1, 1, 1, 1]
    pieces.backward(NoSync)
    assert calls == [1] * 8
    assert synced == [4, 5, 6]  # all pieces but the last one
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model(**pack(SEQUENCES[:2])).logits.sum().backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-6)


def test_the_graph_holds_one_piece(tmp_path):
    """What autograd saves for the backward pass grows with the largest piece, not with the batch."""
    saved = {}
    for max_pairs in (None, 2):
        trainer = make_trainer(tmp_path, max_pairs_per_forward=max_pairs, per_device_train_batch_size=16)
        alive, most = 0, 0

        class Counted:
            def __init__(self, tensor):
                nonlocal alive, most
                self.tensor = tensor
                alive += tensor.nbytes
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.tensor.nbytes

        with torch.autograd.graph.saved_tensors_hooks(Counted, lambda counted: counted.tensor):
            trainer.train()
        saved[max_pairs] = most
    assert saved[2] < saved[None] / 8  # 2 pairs of 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_pairs_per_forward": 0}, r"training\.max_pairs_per_forward must be None or an int above 0, got 0"),
        ({"max_pairs_per_forward": 2.5}, r"training\.max_pairs_per_forward must be None or an int above 0, got 2\.5"),
    ],
)
def test_wrong_sizes_are_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        arguments(CrossEncoderTrainingArguments, tmp_path, **fields)

import pytest
import torch
from conftest import make_model
from test_modeling import SEQUENCES, logits_by_layout

from llama_bidir.packing import PACKED_ATTENTION, batches_by_tokens, pack


def test_pack_by_hand():
    packed = pack([[5, 6], [7], [8, 9, 10]])
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert packed["cu_seq_lens_q"].tolist() == packed["cu_seq_lens_k"].tolist() == [0, 2, 3, 6]
    assert packed["cu_seq_lens_q"].dtype == torch.int32
    assert (packed["max_length_q"], packed["max_length_k"]) == (3, 3)


@pytest.mark.parametrize(
    ("max_tokens", "max_sequences", "expected"),
    [
        (10, None, [[1, 3], [4, 0], [2]]),
        (100, None, [[1, 3, 4, 0, 2]]),
        (1, None, [[1], [3], [4], [0], [2]]),
        (100, 2, [[1, 3], [4, 0], [2]]),
    ],
)
def test_batches_hold_each_sequence_once_the_longest_first(max_tokens, max_sequences, expected):
    lengths = [4, 5, 3, 5, 5]
    expected_order = sorted(range(5), key=lambda index: -lengths[index])
    batches = list(batches_by_tokens(lengths, max_tokens=max_tokens, max_sequences=max_sequences))
    assert [index for batch in batches for index in batch] == expected_order
    assert batches == expected


def test_no_sequences_are_no_batches():
    assert list(batches_by_tokens([], max_tokens=8)) == []


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pooling", ["avg", "cls", "last"])
def test_packed_attention_equals_padded_sdpa(pooling, is_causal):
    sequences = [*SEQUENCES, [9, 9, 9, 9, 9], [4] * 17]
    expected = logits_by_layout(make_model(pooling=pooling, is_causal=is_causal), sequences)["alone"]
    model = make_model(pooling=pooling, is_causal=is_causal)
    model.set_attn_implementation(PACKED_ATTENTION)
    assert model.config._attn_implementation == PACKED_ATTENTION
    for name, logits in logits_by_layout(model, sequences).items():
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(model(**pack(sequences)).logits, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_packed_input_equal_those_of_padded_input():
    batch = pack(SEQUENCES)
    gradients = []
    for implementation in ("sdpa", PACKED_ATTENTION):
        model = make_model(attn_implementation=implementation).train()
        model(**batch).logits.square().sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_no_mask_is_made_for_packed_input(monkeypatch):
    """A mask would be quadratic in the stream."""
    seen = []
    model = make_model(attn_implementation=PACKED_ATTENTION)
    layer = model.model.layers[0]
    monkeypatch.setattr(
        layer, "forward", lambda hidden, attention_mask, **kwargs: seen.append(attention_mask) or hidden
    )
    with torch.no_grad():
        model(**pack(SEQUENCES))
    assert seen == [None]

"""Rotary embeddings whose frequencies follow the longest sequence of a batch: the score of a pair is its own."""

import re

import numpy as np
import pytest
import torch
from helpers import logits_by_layout, make_model, make_tokenizer, pack, pad, tiny_config

from llama_bidir import CrossEncoder, LlamaBidirectionalConfig

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 9.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
FIELDS = {
    "longrope": {"rope_parameters": LONGROPE, "max_position_embeddings": 256},
    "dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 64},
}
SHORT, LONG, TOO_LONG = list(range(10, 30)), list(range(5, 69)), list(range(5, 70))


def make(rope_type, **fields):
    # A copy, because the configuration completes the mapping that it is given.
    return make_model(**{**FIELDS[rope_type], "rope_parameters": dict(FIELDS[rope_type]["rope_parameters"])}, **fields)


@pytest.mark.parametrize("rope_type", FIELDS)
def test_a_score_does_not_depend_on_the_batch(rope_type):
    logits = logits_by_layout(make(rope_type), [SHORT, LONG, [7]])
    for layout in ("right", "left", "packed"):
        torch.testing.assert_close(logits[layout], logits["alone"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("rope_type", FIELDS)
@pytest.mark.parametrize("arrange", [pack, lambda sequences: pad(sequences, "right"), lambda s: pad(s, "left")])
def test_a_sequence_that_would_change_its_batch_is_refused_and_leaves_no_trace(rope_type, arrange):
    model = make(rope_type)
    before = model(torch.tensor([SHORT])).logits
    message = (
        f"rope_type {rope_type!r} changes the scores of a whole batch when one pair has more than 64 tokens, and one "
        "has 65: pass shorter pairs"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**arrange([SHORT, TOO_LONG]))
    torch.testing.assert_close(model(torch.tensor([SHORT])).logits, before, atol=0, rtol=0)


@pytest.mark.parametrize("rope_type", FIELDS)
def test_training_refuses_it_too(rope_type):
    model = make(rope_type).train()
    with pytest.raises(ValueError, match="more than 64 tokens, and one has 65"):
        model(**pad([SHORT, TOO_LONG], "right"), labels=torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("rope_type", FIELDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_predict_scores_a_pair_beside_long_ones_as_alone(rope_type, attention):
    model = make(rope_type)
    model.set_attn_implementation(attention)
    reranker = CrossEncoder(model, make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"))
    assert reranker.config.rerank_max_length == 64
    pair, long_pair = ("where do bees go?", "By the sun."), ("q", "clover and the river Seine " * 40)
    alone = reranker.predict([pair])
    np.testing.assert_allclose(reranker.predict([pair, long_pair, pair])[[0, 2]], [alone[0]] * 2, atol=1e-5, rtol=0)
    np.testing.assert_allclose(reranker.predict([pair]), alone, atol=0, rtol=0)


def test_the_length_of_longrope_ends_at_its_first_window():
    legacy = {name: value for name, value in LONGROPE.items() if name != "rope_type"} | {"type": "longrope"}
    for fields in ({"rope_parameters": dict(LONGROPE)}, {"rope_scaling": legacy}):
        assert LlamaBidirectionalConfig(**tiny_config(**fields)).rerank_max_length == 64
    reason = "beyond it, rope_type 'longrope' changes the scores of the whole batch"
    message = f"from 8 to original_max_position_embeddings (64; {reason})"
    with pytest.raises(ValueError, match=re.escape(f"{message}, got 65")):
        LlamaBidirectionalConfig(**tiny_config(rope_parameters=dict(LONGROPE), rerank_max_length=65))
    with pytest.raises(ValueError, match=re.escape(f"{message}, got 100")):
        CrossEncoder(make("longrope"), make_tokenizer(eos_token="<|end|>"), max_length=100)
    longer = {**LONGROPE, "original_max_position_embeddings": 1024}
    assert LlamaBidirectionalConfig(**tiny_config(rope_parameters=longer)).rerank_max_length == 256


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "foo"}, "rope_parameters: rope_type must be one of default, linear, dynamic, yarn, longrope, "),
        ({"type": "foo"}, "got 'foo'"),
        ({"rope_type": ["linear"]}, "rope_type must be one of .* got \\['linear'\\]"),
        ({"rope_type": "linear"}, "rope_type 'linear' needs factor to be above 0, got None"),
        ({"rope_type": "linear", "factor": "2"}, "needs factor to be above 0, got '2'"),
        ({"rope_type": "dynamic", "factor": 0}, "needs factor to be above 0, got 0"),
        ({"rope_type": "linear", "factor": True}, "needs factor to be above 0, got True"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "'llama3' needs high_freq_factor"),
        ({"rope_theta": None}, "rope_type 'default' needs rope_theta"),
        ({"rope_theta": "1e4"}, "needs rope_theta to be above 0, got '1e4'"),
        ({**LONGROPE, "long_factor": [1.0]}, "long_factor must hold 4 numbers, got 1"),
        (
            {"rope_type": "yarn", "factor": 2.0, "attention_factor": "x"},
            "needs attention_factor to be above 0, got 'x'",
        ),
        ({**LONGROPE, "short_factor": 1.0}, "needs short_factor to be above 0, got 1.0"),
        ({**LONGROPE, "original_max_position_embeddings": -1}, "needs original_max_position_embeddings"),
        ([1], r"rope_parameters must be a mapping with a rope_type, got \[1\]"),
    ],
)
def test_wrong_rope_parameters_are_named(rope, message):
    with pytest.raises(ValueError, match=message):
        LlamaBidirectionalConfig(**tiny_config(rope_parameters=rope))


def test_rope_parameters_that_cannot_be_computed_are_named():
    yarn = {"rope_type": "yarn", "rope_theta": 1.0, "factor": 8.0, "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match=r"rope_parameters .* cannot be used: ZeroDivisionError"):
        make_model(rope_parameters=yarn)

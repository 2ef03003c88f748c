"""Logits that are NaN or infinite are reported with the first position and the likely cause."""

import re

import numpy as np
import pytest
import torch
from helpers import PAIRS, make_model, make_tokenizer

from llama_bidir import CrossEncoder
from llama_bidir.evaluation import evaluate_reranker
from llama_bidir.jobs.mining import mine_negatives
from llama_bidir.utils.errors import ScoreError

CHECK = "check the checkpoint, or use bfloat16 or float32"


def reranker(model, **kwargs):
    return CrossEncoder(model, make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"), **kwargs)


def broken_weight(name, value):
    model = make_model()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    return model


def overflowing(dtype):
    """A model whose finite weights overflow `dtype` in the first layer."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.finfo(dtype).max / 2)
        model.model.layers[0].mlp.up_proj.weight.fill_(100.0)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def without_rope_theta():
    """A model as `rope_theta` 0 makes it."""
    model = make_model()
    model.config.rope_parameters["rope_theta"] = 0.0
    model.model.rotary_emb.inv_freq[1:] = torch.inf
    return model


BROKEN = {
    "NaN weight": (
        lambda: broken_weight("model.layers.1.mlp.up_proj.weight", torch.nan),
        f"the weights hold NaN or infinity, first in model.layers.1.mlp.up_proj.weight: {CHECK}",
    ),
    "infinite weight": (
        lambda: broken_weight("score.weight", torch.inf),
        f"the weights hold NaN or infinity, first in score.weight: {CHECK}",
    ),
    "rope_theta": (
        without_rope_theta,
        "the frequencies model.rotary_emb.inv_freq of the rotary embedding hold NaN or infinity: correct "
        "rope_parameters, {'rope_theta': 0.0, 'rope_type': 'default'}",
    ),
    "temperature": (
        lambda: make_model(temperature=1e-45),
        "temperature is 1e-45, so small that logits overflow float32: raise it, 1.0 has no effect",
    ),
    "float16": (lambda: overflowing(torch.float16), "float16 overflows above 65504: use bfloat16 or float32"),
    "bfloat16": (
        lambda: overflowing(torch.bfloat16),
        "the weights are finite, but bfloat16 overflows: check the checkpoint",
    ),
}


@pytest.mark.parametrize("activation", [None, torch.sigmoid])
@pytest.mark.parametrize("name", BROKEN)
def test_the_cause_is_named(name, activation, caplog):
    make, cause = BROKEN[name]
    broken = reranker(make(), activation_fn=activation)
    logits = broken.predict(PAIRS, activation_fn=torch.nn.Identity())
    assert not np.isfinite(logits).any()
    caplog.clear()
    broken.predict(PAIRS)
    (warning,) = (text for text in caplog.messages if "logits" in text)
    assert re.fullmatch(
        r"4 of 4 pairs have (NaN|infinite|NaN or infinite) logits, first pair 0: " + re.escape(cause), warning
    )
    caplog.clear()
    list(broken.predict_chunks([PAIRS[:1], PAIRS[1:]]))
    assert [text for text in caplog.messages if "logits" in text] == [warning]
    with pytest.raises(ScoreError) as error:
        broken.rank("bees", ["sun", "hive"])
    value = "NaN" if np.isnan(broken.predict([("bees", "sun")], activation_fn=torch.nn.Identity())[0]) else "infinite"
    assert str(error.value) == f"the score of document 0 for query 'bees' is {value} and has no rank: {cause}"


def test_the_first_position(caplog):
    broken = reranker(make_model())
    pairs = [("a", "b"), ("a", "z"), ("b", "b"), ("b", "z z")]
    with torch.no_grad():
        broken.model.model.embed_tokens.weight[broken.tokenizer.get_vocab()["z"]] = torch.nan
    cause = f"the weights hold NaN or infinity, first in model.embed_tokens.weight: {CHECK}"
    assert np.isnan(broken.predict(pairs)).tolist() == [False, True, False, True]
    assert f"2 of 4 pairs have NaN logits, first pair 1: {cause}" in caplog.messages
    caplog.clear()
    for chunk in broken.predict_chunks([pairs[:1], pairs[2:], pairs[:2]]):
        assert len(chunk) in (1, 2)
    assert f"2 of 5 pairs have NaN logits, first pair 2: {cause}" in caplog.messages
    with pytest.raises(ScoreError) as error:
        broken.rank_batch(["a", "empty", "b"], [["b"], [], ["b", "z"]])
    assert str(error.value) == f"the score of document 1 for query 'b' is NaN and has no rank: {cause}"


def test_an_activation_that_makes_nan_is_named():
    scores = reranker(make_model())
    with pytest.raises(
        ScoreError, match=r"document 0 for query 'a' is NaN .* its logit is finite: check activation_fn"
    ):
        scores.rank("a", ["b"], activation_fn=lambda logits: logits * torch.nan)
    assert [result["score"] for result in scores.rank("a", ["b"], activation_fn=torch.sigmoid)] == [
        pytest.approx(float(torch.sigmoid(scores.predict([("a", "b")], convert_to_tensor=True))))
    ]


def test_several_labels(caplog):
    model = make_model(num_labels=3)
    with torch.no_grad():
        model.score.weight[1] = torch.inf
    scores = reranker(model).predict(PAIRS)
    assert np.isfinite(scores).all(axis=0).tolist() == [True, False, True]
    assert "4 of 4 pairs have " in caplog.text
    assert "first pair 0: the weights hold NaN or infinity, first in score.weight" in caplog.text


def test_evaluation_and_mining_name_the_cause():
    pytest.importorskip("ir_measures")
    broken = reranker(broken_weight("score.weight", torch.nan))
    cause = f"the weights hold NaN or infinity, first in score.weight: {CHECK}"
    dataset = {"corpus": {"d": "bees"}, "queries": {"q": "hive"}, "qrels": {"q": {"d": 1}}, "run": {"q": {"d": 1.0}}}
    with pytest.raises(ScoreError) as error:
        evaluate_reranker(broken, dataset)
    assert str(error.value) == f"the score of document 0 for query 'hive' is NaN and has no rank: {cause}"
    with pytest.raises(ScoreError) as error:
        list(mine_negatives(broken, [{"query": "q", "pos_doc": "bees", "neg_doc": ["hive"]}]))
    assert str(error.value) == (
        f"row 0: the score of positives[0] is nan and has no rank; the query is str 'q': {cause}"
    )

"""What an earlier version has saved loads with the scores that it had."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llama_bidir import CrossEncoder

SAVED = Path(__file__).parents[1] / "saved" / "0.1.0"
EXPECTED = json.loads((SAVED / "expected.json").read_text())


@pytest.mark.parametrize("name", ["reranker", "adapter"])
def test_what_version_0_1_0_saved_loads_with_equal_scores(name):
    if name == "adapter":
        pytest.importorskip("peft")
    model = AutoModelForSequenceClassification.from_pretrained(SAVED / name)
    rerankers = [
        CrossEncoder(SAVED / name, device="cpu"),
        CrossEncoder(model, AutoTokenizer.from_pretrained(SAVED / name), device="cpu"),
    ]
    for reranker in rerankers:
        config = reranker.config
        assert (config.pooling, config.temperature, config.rerank_max_length) == ("last", 0.25, 48)
        assert config.prompt_template == "query: {query} [{{}}] passage: {passage}"
        scores = reranker.predict([tuple(pair) for pair in EXPECTED["pairs"]])
        np.testing.assert_allclose(scores, EXPECTED[name], rtol=0, atol=1e-5 * max(map(abs, EXPECTED[name])))

"""Fixtures of the tests of checkpoints."""

import pytest
from helpers import PAIRS, make_model, make_tokenizer

from llama_bidir import CrossEncoder


@pytest.fixture
def save(tmp_path):
    """Saves a tiny reranker and returns its folder and scores."""

    def save(pairs=PAIRS, **fields):
        tokenizer = make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")
        reranker = CrossEncoder(make_model(rerank_max_length=64, **fields), tokenizer)
        reranker.save_pretrained(tmp_path / "reranker")
        return tmp_path / "reranker", reranker.predict(pairs)

    return save

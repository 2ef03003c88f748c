"""Counts of any integer type."""

import json

import numpy as np
import pytest
import torch

from llama_bidir import CrossEncoder, LlamaBidirectionalConfig
from llama_bidir.fields_llama_bidir import as_int
from llama_bidir.jobs.mining.selection import Selection
from llama_bidir.jobs.rerank.task import RerankTask
from llama_bidir.utils.validation import check_positive_int

PAIRS = [("where do bees go?", "Honey bees navigate by the sun."), ("capital of France", "Paris."), ("", "White.")]


class Index:
    def __index__(self):
        return 2


INTEGERS = [2, np.int64(2), np.uint8(2), np.array(2), torch.tensor(2), Index()]
NOT_INTEGERS = [True, np.bool_(True), 2.0, np.float64(2), "2", b"2", [2], np.array([2, 2]), 2j]


@pytest.mark.parametrize("value", INTEGERS, ids=lambda value: type(value).__name__)
def test_an_integer_of_any_type_is_an_int(value):
    assert (as_int(value), type(as_int(value))) == (2, int)
    assert type(check_positive_int("top_k", value)) is int


@pytest.mark.parametrize("value", NOT_INTEGERS, ids=repr)
def test_nothing_else_is_an_int(value):
    assert as_int(value) is None
    with pytest.raises(ValueError, match="top_k must be None or an int above 0, got"):
        check_positive_int("top_k", value)


@pytest.mark.parametrize("kind", [np.int64, torch.tensor, np.uint16])
def test_counts_of_every_call(model, tokenizer, kind):
    expected = CrossEncoder(model, tokenizer, max_length=64, max_tokens_per_batch=100)
    reranker = CrossEncoder(model, tokenizer, max_length=kind(64), max_tokens_per_batch=kind(100), num_labels=kind(1))
    assert type(reranker.config.rerank_max_length) is int
    scores = expected.predict(PAIRS, batch_size=1)
    np.testing.assert_array_equal(reranker.predict(PAIRS, batch_size=kind(1)), scores)
    np.testing.assert_array_equal(next(iter(reranker.predict_chunks([PAIRS], kind(1)))), scores)
    texts = [passage for _, passage in PAIRS]
    ranking = reranker.rank("bees", texts, top_k=kind(2), batch_size=kind(2), max_tokens_per_batch=kind(90))
    assert ranking == expected.rank("bees", texts, 2, batch_size=2, max_tokens_per_batch=90)
    assert reranker.rank_batch(["bees"], [texts], kind(2)) == [ranking]


def test_counts_of_the_configuration(tmp_path):
    config = LlamaBidirectionalConfig(num_labels=np.int64(3), rerank_max_length=np.int32(64))
    assert (type(config.num_labels), type(config.rerank_max_length)) == (int, int)
    config.rerank_max_length = np.int64(65)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rerank_max_length"] == 65
    assert len(saved["id2label"]) == 3
    for value in (True, 0, 1.0, "1"):
        with pytest.raises(ValueError, match="num_labels must be an int above 0"):
            LlamaBidirectionalConfig(num_labels=value)


def test_counts_of_jobs():
    selection = Selection(num_negatives=np.int64(3), skip_top=np.int32(0))
    assert [type(count) for count in (selection.num_negatives, selection.skip_top)] == [int, int]
    task = RerankTask(corpus="c", queries="q", depth=np.int64(5))
    assert (task.depth, type(task.depth)) == (5, int)
    for arguments, message in (
        ({"num_negatives": True}, "num_negatives must be an int above 0, got True"),
        ({"skip_top": -1}, "skip_top must be an int of 0 or more, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Selection(**arguments)
    with pytest.raises(ValueError, match="depth must be an int above 0, got None"):
        RerankTask(corpus="c", queries="q", depth=None)

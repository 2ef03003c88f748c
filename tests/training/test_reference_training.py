"""Compares training with NeMo AutoModel's class in a plain loop. Needs `pip install --no-deps nemo-automodel`."""

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from helpers import GOLDEN, ROWS, arguments, losses
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("accelerate")

from benchmarks.peers import import_alone
from llama_bidir import (
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    LlamaBidirectionalForSequenceClassification,
)

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("nemo_automodel") is None, reason="nemo-automodel is not installed"),
]
STEPS, GROUPS, GROUP_SIZE, LEARNING_RATE = 20, 4, 4, 5e-4


def make_word_tokenizer():
    """Returns a tokenizer with one token per word, for the golden checkpoints' vocabulary of 97."""
    texts = [text for row in ROWS for text in (row["query"], *row["pos_doc"], *row["neg_doc"])]
    splitter = pre_tokenizers.Whitespace()
    words = {word for text in ["question: passage:", *texts] for word, _ in splitter.pre_tokenize_str(text)}
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<pad>", *sorted(words)])}
    assert len(vocabulary) <= 97
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


@pytest.mark.parametrize("case", ["gqa", "llama3_rope", "mha_bias_headdim"])
@pytest.mark.parametrize("packing", [True, False])
def test_twenty_steps_equal_a_plain_loop_over_the_reference(case, packing, tmp_path):
    tokenizer = make_word_tokenizer()
    model = LlamaBidirectionalForSequenceClassification.from_pretrained(GOLDEN / case / "reranker", dtype="float32")
    args = arguments(
        CrossEncoderTrainingArguments,
        tmp_path,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=GROUPS,
        train_sampling_strategy="sequential",
        packing=packing,
    )
    trainer = CrossEncoderTrainer(
        model, args, ROWS, processing_class=tokenizer, group_size=GROUP_SIZE, negatives="first"
    )
    trainer.train()

    module = import_alone("nemo_automodel.components.models.llama_bidirectional.model")
    reference = module.LlamaBidirectionalForSequenceClassification.from_pretrained(
        GOLDEN / case / "reranker", dtype=torch.float32
    ).train()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    expected, rows = [], itertools.cycle(ROWS)
    for _ in range(STEPS):
        texts = [
            f"question:{row['query']} \n \n passage:{passage}"
            for row in itertools.islice(rows, GROUPS)
            for passage in [*row["pos_doc"], *row["neg_doc"][: GROUP_SIZE - 1]]
        ]
        logits = reference(**tokenizer(texts, return_tensors="pt", padding=True)).logits.view(-1, GROUP_SIZE)
        loss = torch.nn.functional.cross_entropy(logits, torch.zeros(GROUPS, dtype=torch.long))
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
    np.testing.assert_allclose(losses(trainer), expected, rtol=1e-4)
    trained = model.state_dict()
    for name, weight in reference.state_dict().items():
        difference = (trained[name] - weight).abs().max().item()
        assert difference <= 1e-4, (name, difference)

import copy
import json

import numpy as np
import pytest
import torch
from helpers import ROWS as ALL_ROWS
from helpers import arguments, losses, make_model, make_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForSequenceClassification,
)

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

from transformers import Trainer, TrainingArguments  # noqa: E402

from llama_bidir import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments  # noqa: E402
from llama_bidir.training import DataArguments, ModelArguments, train  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_plot")
ROWS = ALL_ROWS[:16]


def assert_equal_runs(runs):
    (first_losses, first_state), *others = runs
    for other_losses, other_state in others:
        np.testing.assert_allclose(other_losses, first_losses, rtol=1e-5, atol=1e-5)
        for name, weight in first_state.items():
            torch.testing.assert_close(other_state[name], weight, rtol=1e-5, atol=1e-5, msg=name)


def test_stock_trainer_trains_pointwise_with_any_accumulation(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    rows = [
        {**tokenizer(f"question:{row['query']} passage:{passage}"), "labels": float(label + rng.normal() / 10)}
        for row in ROWS[:8]
        for label, passage in ((1, row["pos_doc"][0]), (0, row["neg_doc"][0]))
    ]
    runs = []
    for batch_size, accumulation in ((8, 1), (1, 8), (2, 4)):
        model = make_model()
        before = copy.deepcopy(model.state_dict())
        trainer = Trainer(
            model=model,
            args=arguments(
                TrainingArguments,
                tmp_path,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                optim="sgd",
                max_grad_norm=0,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
        )
        trainer.train()
        runs.append((losses(trainer), model.state_dict()))
        moved = [name for name, weight in before.items() if not torch.equal(weight, model.state_dict()[name])]
        assert set(moved) >= {"score.weight", "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"}
    assert model.config.problem_type is None
    assert_equal_runs(runs)


def test_group_trainer_with_any_accumulation(tmp_path, tokenizer):
    runs = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        model = make_model()
        trainer = CrossEncoderTrainer(
            model,
            arguments(
                CrossEncoderTrainingArguments,
                tmp_path,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                optim="sgd",
                max_grad_norm=0,
            ),
            datasets.Dataset.from_list(ROWS),
            processing_class=tokenizer,
            group_size=4,
        )
        trainer.train()
        runs.append((losses(trainer), model.state_dict()))
    assert_equal_runs(runs)


def test_group_trainer_equals_a_plain_loop(tmp_path, tokenizer):
    rows = ROWS[:4]
    args = arguments(
        CrossEncoderTrainingArguments,
        tmp_path,
        per_device_train_batch_size=4,
        max_steps=5,
        optim="sgd",
        max_grad_norm=0,
    )
    model = make_model()
    trainer = CrossEncoderTrainer(
        model, args, datasets.Dataset.from_list(rows), processing_class=tokenizer, group_size=3, negatives="first"
    )
    trainer.train()

    plain = make_model().train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=args.learning_rate)
    expected = []
    for _ in range(5):
        group_losses = []
        for row in rows:
            texts = [
                plain.config.prompt_template.format(query=row["query"], passage=passage)
                for passage in [row["pos_doc"][0], *row["neg_doc"][:2]]
            ]
            logits = plain(**tokenizer(texts, return_tensors="pt", padding=True)).logits.squeeze(-1)
            group_losses.append(-logits.log_softmax(0)[0])
        loss = torch.stack(group_losses).mean()
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(losses(trainer), expected, rtol=1e-4, atol=1e-5)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_checkpoints_reload_with_tokenizer_and_card(tmp_path):
    tokenizer = make_tokenizer(eos_token="<|end|>")
    model = make_model(temperature=0.5, pooling="last", prompt_template="{query} | {passage}", rerank_max_length=64)
    trainer = CrossEncoderTrainer(
        model,
        arguments(CrossEncoderTrainingArguments, tmp_path, max_steps=2, save_strategy="steps", save_steps=1),
        datasets.Dataset.from_list(ROWS),
        datasets.Dataset.from_list(ROWS[:3]),
        tokenizer,
        group_size=4,
    )
    trainer.train()
    pairs = [(row["query"], row["pos_doc"][0]) for row in ROWS[:4]]
    reloaded = CrossEncoder(tmp_path / "checkpoint-2")
    np.testing.assert_array_equal(reloaded.predict(pairs), CrossEncoder(model, tokenizer).predict(pairs))
    assert reloaded.tokenizer.pad_token == "<|end|>"
    assert (reloaded.config.temperature, reloaded.config.prompt_template) == (0.5, "{query} | {passage}")
    assert "pipeline_tag: text-ranking" in (tmp_path / "checkpoint-2" / "README.md").read_text()
    metrics = trainer.evaluate()
    scores = [reloaded.predict([(row["query"], text) for text in row["pos_doc"] + row["neg_doc"]]) for row in ROWS[:3]]
    by_hand = [-torch.tensor(group).log_softmax(0)[0].item() for group in scores]
    assert metrics["eval_loss"] == pytest.approx(np.mean(by_hand), rel=1e-4)


def test_columns_in_any_spelling_reach_the_collator(tmp_path, tokenizer):
    rows = [{"question": row["query"], "pos_doc": row["pos_doc"], "neg_doc": row["neg_doc"], "id": 7} for row in ROWS]
    trainer = CrossEncoderTrainer(
        make_model(),
        arguments(CrossEncoderTrainingArguments, tmp_path, max_steps=1, per_device_train_batch_size=2),
        datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        group_size=2,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert len(batch["cu_seq_lens_q"]) == 5


def test_wrong_arguments(tmp_path, tokenizer):
    args = arguments(CrossEncoderTrainingArguments, tmp_path)
    with pytest.raises(TypeError, match="processing_class must be the tokenizer of the model, got None"):
        CrossEncoderTrainer(make_model(), args)
    with pytest.raises(ValueError, match="one score per passage, but the model has 2 labels"):
        CrossEncoderTrainer(make_model(num_labels=2), args, processing_class=tokenizer)
    with pytest.raises(ValueError, match="loss must be a function or one of"):
        CrossEncoderTrainer(make_model(), args, processing_class=tokenizer, loss="hinge")
    with pytest.raises(ValueError, match="compares the passages of a group: group_size must be at least 2"):
        CrossEncoderTrainer(make_model(), args, processing_class=tokenizer, group_size=1)
    with pytest.raises(ValueError, match="group_size must be at least 1"):
        CrossEncoderTrainer(make_model(), args, processing_class=tokenizer, group_size=0)


def test_a_causal_run_is_that_of_the_stock_class(base_checkpoint, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    trainer = train(
        ModelArguments(model_name_or_path=str(base_checkpoint), is_causal=True, pooling="last"),
        DataArguments(train=[str(path)], group_size=4),
        arguments(CrossEncoderTrainingArguments, tmp_path / "out"),
    )
    config = LlamaConfig.from_dict(trainer.model.config.to_dict() | {"model_type": "llama"})
    stock = LlamaForSequenceClassification(config).eval()
    stock.load_state_dict(trainer.model.state_dict())
    inputs = torch.tensor([[5, 9, 7, 11, 6, 8]])
    with torch.no_grad():
        expected = stock(inputs).logits
        reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(reloaded(inputs).logits, expected)
    assert reloaded.config.is_causal


def test_run_trains_and_saves(base_checkpoint, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    trainer = train(
        ModelArguments(model_name_or_path=str(base_checkpoint), pooling="last", temperature=0.5),
        DataArguments(train=[str(path)], eval=[str(path)], group_size=4, prompt_template="{query} | {passage}"),
        arguments(CrossEncoderTrainingArguments, tmp_path / "out"),
    )
    pairs = [(ROWS[0]["query"], passage) for passage in ROWS[0]["neg_doc"]]
    expected = CrossEncoder(trainer.model, trainer.processing_class).predict(pairs)
    np.testing.assert_array_equal(CrossEncoder(tmp_path / "out").predict(pairs), expected)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (model.config.pooling, model.config.temperature) == ("last", 0.5)
    assert model.config.prompt_template == "{query} | {passage}"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token == "<|end|>"
    with pytest.raises(ValueError, match=r"data\.train must name at least one source"):
        train(trainer.args, DataArguments(), trainer.args)

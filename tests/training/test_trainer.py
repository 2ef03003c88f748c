import copy
import itertools

import numpy as np
import pytest
import torch
from helpers import ROWS, arguments, losses, make_model, make_tokenizer

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

from transformers import EarlyStoppingCallback, TrainingArguments  # noqa: E402
from transformers.modeling_outputs import SequenceClassifierOutput  # noqa: E402

from llama_bidir import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments  # noqa: E402
from llama_bidir.fields_llama_bidir import DEFAULT_PROMPT_TEMPLATE  # noqa: E402
from llama_bidir.losses import LOSSES, TEACHER_LOSSES  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_plot")


def make_trainer(path, rows=ROWS, eval_rows=None, *, model=None, model_fields=None, trainer_fields=None, **kwargs):
    return CrossEncoderTrainer(
        make_model(**(model_fields or {})) if model is None else model,
        arguments(CrossEncoderTrainingArguments, path, **kwargs),
        datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows,
        datasets.Dataset.from_list(eval_rows) if isinstance(eval_rows, list) else eval_rows,
        make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"),
        **{"group_size": 4, **(trainer_fields or {})},
    )


def assert_equal_states(first, second, *, atol=1e-5):
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-5, atol=atol, msg=name)


@pytest.mark.parametrize("pooling", ["avg", "cls", "last"])
def test_packed_training_equals_padded(pooling, tmp_path):
    trainers = []
    for packing in (True, False):
        trainer = make_trainer(
            tmp_path, ROWS, ROWS[:7], model_fields={"pooling": pooling}, packing=packing, optim="sgd", max_grad_norm=0
        )
        assert ("attention_mask" in next(iter(trainer.get_train_dataloader()))) == (not packing)
        trainer.train()
        trainers.append((losses(trainer), trainer.evaluate(), trainer.model.state_dict()))
    (packed_losses, packed_metrics, packed), (padded_losses, padded_metrics, padded) = trainers
    np.testing.assert_allclose(packed_losses, padded_losses, rtol=1e-5)
    assert packed_metrics["eval_loss"] == pytest.approx(padded_metrics["eval_loss"], rel=1e-4)
    assert_equal_states(packed, padded)


@pytest.mark.parametrize(
    ("model_fields", "fields"),
    [
        ({"attn_implementation": "eager"}, {}),
        ({}, {"neftune_noise_alpha": 5.0}),
        ({}, {"torch_compile": True}),
    ],
)
def test_batches_that_cannot_be_packed_are_padded_or_refused(model_fields, fields, tmp_path):
    assert not make_trainer(tmp_path, model_fields=model_fields, **fields).packing
    with pytest.raises(ValueError, match="packing=True is not possible: "):
        make_trainer(tmp_path, model_fields=model_fields, packing=True, **fields)


@pytest.mark.parametrize(
    ("given", "of_the_model", "expected"),
    [
        (None, DEFAULT_PROMPT_TEMPLATE, "Q {query} P {passage}"),
        (None, "{query} | {passage}", "{query} | {passage}"),
        (DEFAULT_PROMPT_TEMPLATE, DEFAULT_PROMPT_TEMPLATE, DEFAULT_PROMPT_TEMPLATE),
        ("{query}: {passage}", "{query} | {passage}", "{query}: {passage}"),
    ],
)
def test_the_prompt_is_the_argument_or_the_models_or_that_of_nemo_automodel(given, of_the_model, expected, tmp_path):
    tokenizer = make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")
    written = """{{- "" + "Q {query} P {passage}".format(query=messages[0]['content']) -}}"""
    tokenizer.chat_template = {"default": "{{ messages }}", "reranking": written}
    trainer = CrossEncoderTrainer(
        make_model(prompt_template=of_the_model),
        arguments(CrossEncoderTrainingArguments, tmp_path, per_device_train_batch_size=1, max_steps=1),
        ROWS[:1],
        processing_class=tokenizer,
        group_size=2,
        negatives="first",
        prompt_template=given,
    )
    assert trainer.model.config.prompt_template == expected
    batch = next(iter(trainer.get_train_dataloader()))
    texts = [
        expected.format(query=ROWS[0]["query"], passage=passage)
        for passage in (ROWS[0]["pos_doc"][0], ROWS[0]["neg_doc"][0])
    ]
    assert batch["input_ids"][0].tolist() == [token for text in texts for token in tokenizer(text)["input_ids"]]
    trainer.save_model()
    assert CrossEncoder(tmp_path).config.prompt_template == expected


def test_evaluation_is_over_whole_groups(tmp_path):
    rows = [{**row, "pos_doc": [row["pos_doc"][0], f"{row['query']} yes"]} for row in ROWS[:7]]
    trainer = make_trainer(tmp_path, ROWS, rows, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    scorer = CrossEncoder(trainer.model, trainer.processing_class)
    reciprocal, ndcg, first, loss = [], [], [], []
    for row in rows:
        passages = row["pos_doc"] + row["neg_doc"]
        scores = scorer.predict([(row["query"], passage) for passage in passages])
        ranks = [1 + int((scores > scores[index]).sum()) for index in (0, 1)]
        first.append(min(ranks) == 1)
        reciprocal.append(1 / min(ranks))
        ndcg.append(sum(1 / np.log2(rank + 1) for rank in ranks) / (1 + 1 / np.log2(3)))
        loss.append(-torch.tensor(scores).log_softmax(0)[:2].mean().item())
    assert metrics["eval_accuracy@1"] == pytest.approx(np.mean(first))
    assert metrics["eval_mrr@10"] == pytest.approx(np.mean(reciprocal))
    assert metrics["eval_ndcg@10"] == pytest.approx(np.mean(ndcg))
    assert metrics["eval_loss"] == pytest.approx(np.mean(loss), rel=1e-4)
    prediction = trainer.predict(datasets.Dataset.from_list(rows))
    assert prediction.predictions.shape == prediction.label_ids.shape == (7, 7)
    assert prediction.metrics["test_ndcg@10"] == pytest.approx(metrics["eval_ndcg@10"])


def test_callers_metrics_and_named_eval_sets(tmp_path):
    trainer = CrossEncoderTrainer(
        make_model(),
        arguments(CrossEncoderTrainingArguments, tmp_path),
        ROWS,
        {"a": ROWS[:3], "b": datasets.Dataset.from_list(ROWS[3:5])},
        make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"),
        compute_metrics=lambda prediction: {"groups": len(prediction.predictions)},
    )
    metrics = trainer.evaluate()
    assert (metrics["eval_a_groups"], metrics["eval_b_groups"]) == (3, 2)
    assert {"eval_a_ndcg@10", "eval_b_loss"} <= set(metrics)


def test_best_model_and_early_stopping(tmp_path):
    trainer = make_trainer(
        tmp_path,
        ROWS,
        ROWS,
        max_steps=40,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ndcg@10",
        save_total_limit=2,
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step < 40
    measured = {entry["step"]: entry["eval_ndcg@10"] for entry in trainer.state.log_history if "eval_ndcg@10" in entry}
    assert trainer.state.best_metric == max(measured.values())
    assert trainer.evaluate()["eval_ndcg@10"] == pytest.approx(max(measured.values()))


def score_groups(model, rows):
    """The scores of the positive and the first three negatives of each row, pair by pair in a plain forward pass."""
    tokenizer = make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")
    texts = [
        model.config.prompt_template.format(query=row["query"], passage=passage)
        for row in rows
        for passage in [row["pos_doc"][0], *row["neg_doc"][:3]]
    ]
    return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in texts]).view(len(rows), 4)


@pytest.mark.parametrize(
    ("loss", "temperature"),
    [
        *((name, None) for name in LOSSES),
        ({"listwise_cross_entropy": 1.0, "mse": 0.5}, None),
        ("ranknet", 0.5),
        ("kl_div", 2.0),
    ],
    ids=str,
)
def test_every_loss_takes_the_step_of_a_plain_loop(loss, temperature, tmp_path):
    rows = [{**row, "neg_doc": row["neg_doc"][:3], "pos_score": [2], "neg_score": [0, -1, -2]} for row in ROWS[:4]]
    fields = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0, "per_device_train_batch_size": 4}
    fields |= {"loss": loss, "loss_temperature": temperature}
    trainer = make_trainer(tmp_path, rows, trainer_fields={"negatives": "first"}, **fields)
    plain = copy.deepcopy(trainer.model).train()
    trainer.train()
    labels, teacher_scores = torch.tensor([[1.0, 0.0, 0.0, 0.0]] * 4), torch.tensor([[2.0, 0.0, -1.0, -2.0]] * 4)
    divisor = temperature or 1.0
    scores = score_groups(plain, rows) / divisor
    weights = loss if isinstance(loss, dict) else {loss: 1.0}
    expected_loss = sum(
        weight * LOSSES[name](scores, labels, None, teacher_scores / divisor) for name, weight in weights.items()
    )
    expected_loss.backward()
    assert losses(trainer) == [pytest.approx(expected_loss.item(), rel=1e-5)]
    expected = {weight_name: weight - 1e-2 * weight.grad for weight_name, weight in plain.named_parameters()}
    assert_equal_states(expected, trainer.model.state_dict())


@pytest.mark.parametrize("name", ["lambda", "ranknet", "list_mle", "listwise_cross_entropy"])
def test_losses_read_the_relevance_of_the_rows(name, tmp_path):
    rows = [
        {**row, "pos_doc": [row["pos_doc"][0], row["neg_doc"][0]], "neg_doc": row["neg_doc"][1:3]} for row in ROWS[:4]
    ]
    rows = [{**row, "pos_relevance": [1, 3]} for row in rows]
    fields = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0, "per_device_train_batch_size": 4}
    trainer_fields = {"negatives": "first", "positives": "all"}
    trainer = make_trainer(tmp_path, rows, rows, loss=name, trainer_fields=trainer_fields, **fields)
    labels = torch.tensor([[1.0, 3.0, 0.0, 0.0]] * 4)
    with torch.no_grad():
        scores = score_groups(trainer.model, ROWS[:4])
    ideal = 3 + 1 / np.log2(3)
    gained = [
        np.sum(row.numpy()[order] / np.log2([2, 3, 4, 5]))
        for row, order in zip(labels, (-scores).argsort(dim=1), strict=True)
    ]
    assert trainer.evaluate()["eval_ndcg@10"] == pytest.approx(np.mean(gained) / ideal)
    trainer.train()
    assert losses(trainer) == [pytest.approx(LOSSES[name](scores, labels).item(), rel=1e-5)]


def test_one_temperature_divides_the_scores(tmp_path):
    arguments = make_trainer(tmp_path, ROWS[:4], loss_temperature=0.5).args
    message = r"training\.loss_temperature 0\.5 and model\.temperature 2\.0 would both divide the scores"
    with pytest.raises(ValueError, match=message):
        CrossEncoderTrainer(make_model(temperature=2.0), arguments, processing_class=make_tokenizer())


@pytest.mark.parametrize("name", [*sorted(TEACHER_LOSSES), {"ranknet": 1.0, "mse": 0.5}], ids=str)
def test_teacher_losses_need_teacher_scores(name, tmp_path):
    with pytest.raises(ValueError, match="has no teacher scores, which the loss needs: give every row pos_score"):
        make_trainer(tmp_path, ROWS, loss=name).train()


def test_logits_and_labels_in_half_precision(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    logits = trainer.model(**{name: batch[name] for name in batch if name not in ("labels", "teacher_scores")}).logits
    halved = {
        name: value.bfloat16() if torch.is_floating_point(value) else value
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }  # as DeepSpeed passes them
    loss = trainer.compute_loss(lambda **inputs: SequenceClassifierOutput(logits=logits.bfloat16()), halved)
    scores = torch.full_like(batch["labels"], -100.0)
    scores[batch["labels"] != -100] = logits.squeeze(-1).bfloat16().float()
    torch.testing.assert_close(loss, trainer.loss(scores, batch["labels"], batch["labels"] != -100))


def test_a_function_as_loss(tmp_path):
    def hinge(scores, labels, mask, teacher_scores):
        assert teacher_scores.isnan().equal(mask)
        margins = 1 - scores[:, :1] + scores
        return margins.clamp(min=0).masked_fill((labels > 0) | ~mask, 0.0).sum(1).mean()

    trainer_fields = {"loss": hinge, "negatives": "first"}
    fields = {"max_steps": 1, "per_device_train_batch_size": 4}
    trainer = make_trainer(tmp_path, ROWS[:4], trainer_fields=trainer_fields, **fields)
    scores = score_groups(trainer.model, ROWS[:4])
    trainer.train()
    expected = (1 - scores[:, :1] + scores[:, 1:]).clamp(min=0).sum(1).mean().item()
    assert losses(trainer) == [pytest.approx(expected, rel=1e-5)]


def test_streams_train_and_evaluate(tmp_path):
    def generate():
        yield from ROWS

    stream = datasets.IterableDataset.from_generator(generate)
    mapped = make_trainer(tmp_path, train_sampling_strategy="sequential", max_steps=8)
    streamed = make_trainer(tmp_path, stream, stream.take(5), max_steps=8, trainer_fields={"negatives": "first"})
    mapped_first = make_trainer(
        tmp_path, train_sampling_strategy="sequential", max_steps=8, trainer_fields={"negatives": "first"}
    )
    for trainer in (mapped, streamed, mapped_first):
        trainer.train()
    np.testing.assert_allclose(losses(streamed), losses(mapped_first), rtol=1e-5)
    assert losses(mapped) != losses(mapped_first)
    assert streamed.evaluate()["eval_loss"] == pytest.approx(mapped_first.evaluate(ROWS[:5])["eval_loss"], rel=1e-4)


def test_groups_by_length(tmp_path):
    rows = [{**ROWS[number % 20], "pos_doc": ["bees " * number]} for number in range(100)]
    trainer = make_trainer(
        tmp_path, rows, train_sampling_strategy="group_by_length", per_device_train_batch_size=2, packing=False
    )
    lengths = trainer.train_dataset.num_characters()
    order = [index for batch in trainer.get_train_dataloader().batch_sampler for index in batch]
    assert sorted(order) == list(range(len(rows)))
    assert order != sorted(order)
    for start in range(0, len(rows), 24):  # sorted in chunks of 12 batches, the first of which may be exchanged
        chunk = [lengths[index] for index in order[start + 1 : start + 24]]
        assert chunk == sorted(chunk, reverse=True)


def test_order_depends_on_seed_and_epoch_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    sampler = trainer.get_train_dataloader().batch_sampler.sampler
    orders = []
    for epoch in (0, 1, 0):
        trainer.train_dataset.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(len(ROWS)))


def test_gradient_checkpointing_changes_no_loss(tmp_path):
    plain, checkpointed = (
        make_trainer(tmp_path, max_steps=5, gradient_checkpointing=checkpointing) for checkpointing in (False, True)
    )
    for trainer in (plain, checkpointed):
        trainer.train()
    np.testing.assert_allclose(losses(checkpointed), losses(plain), rtol=1e-5)


def test_bfloat16_computes_as_autocast_and_keeps_weights_in_float32(tmp_path):
    trainer = make_trainer(tmp_path, bf16=True, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.autocast("cpu", torch.bfloat16):
        expected = trainer.compute_loss(trainer.model.train(), batch).item()
    assert expected != trainer.compute_loss(trainer.model, batch).item()
    trainer.train()
    assert losses(trainer) == [pytest.approx(expected, rel=1e-6)]
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}


def test_neftune_adds_noise_in_training_only(tmp_path):
    plain, noisy = (
        make_trainer(tmp_path, ROWS, ROWS[:4], neftune_noise_alpha=alpha, packing=False) for alpha in (None, 5)
    )
    assert noisy.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    for trainer in (plain, noisy):
        trainer.train()
    assert losses(noisy)[0] != losses(plain)[0]


def test_global_batch_size_sets_accumulation(tmp_path):
    args = arguments(CrossEncoderTrainingArguments, tmp_path, global_batch_size=12, per_device_train_batch_size=4)
    assert args.gradient_accumulation_steps == 3
    with pytest.raises(ValueError, match=r"global_batch_size must be a multiple of .* = 4, got 6: change one of them"):
        arguments(CrossEncoderTrainingArguments, tmp_path, global_batch_size=6, per_device_train_batch_size=4)


def test_accumulation_with_short_groups(tmp_path):
    rows = [{**row, "neg_doc": row["neg_doc"][: 1 + number % 3]} for number, row in enumerate(ROWS[:8])]
    states = []
    for size, accumulation in ((8, 1), (1, 8)):
        trainer = make_trainer(
            tmp_path,
            rows,
            optim="sgd",
            max_grad_norm=0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        states.append((losses(trainer), copy.deepcopy(trainer.model.state_dict())))
    np.testing.assert_allclose(states[0][0], states[1][0], rtol=1e-5)
    assert_equal_states(states[0][1], states[1][1])


def test_liger_is_never_silently_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("llama_bidir.training.liger.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="liger-kernel is not installed: pip install liger-kernel"):
        make_trainer(tmp_path, use_liger_kernel=True)
    monkeypatch.setattr("llama_bidir.training.liger.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="use_liger_kernel needs a GPU"):
        make_trainer(tmp_path, use_liger_kernel=True)


def test_wrong_groups_are_refused_before_training(tmp_path):
    for fields, message in (
        ({"group_size": 1}, "compares the passages of a group: group_size must be at least 2"),
        ({"negatives": "random"}, "negatives must be one of sample, first, got 'random'"),
        ({"loss": "hinge"}, "loss must be a function or one of"),
        ({"loss": "ranknet", "group_size": 1}, "ranknet compares the passages of a group"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, trainer_fields=fields)
    with pytest.raises(ValueError, match="there is no row to make a group of"):
        make_trainer(tmp_path, [])


@pytest.mark.parametrize(
    ("fields", "trainer_fields", "error", "message"),
    [
        ({"label_smoothing_factor": 0.1}, {}, ValueError, "label_smoothing_factor is for classes"),
        ({"loss_temperature": 0}, {}, ValueError, "loss_temperature must be a finite number above 0, got 0"),
        (
            {},
            {"compute_loss_func": print},
            TypeError,
            "compute_loss_func is not supported: pass a model, and a function",
        ),
        ({}, {"model_init": make_model}, TypeError, "model_init is not supported"),
    ],
)
def test_arguments_without_effect_are_refused(fields, trainer_fields, error, message, tmp_path):
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, trainer_fields=trainer_fields, **fields)


def test_arguments_must_be_ours(tmp_path):
    with pytest.raises(TypeError, match="args must be CrossEncoderTrainingArguments, got TrainingArguments"):
        CrossEncoderTrainer(make_model(), arguments(TrainingArguments, tmp_path), ROWS)
    with pytest.raises(ValueError, match="loss must be a function or one of"):
        arguments(CrossEncoderTrainingArguments, tmp_path, loss="hinge")


@pytest.mark.parametrize(
    "fields",
    [
        {"dataloader_drop_last": True},
        {"prediction_loss_only": True},
        {"eval_do_concat_batches": False},
        {"eval_accumulation_steps": 1},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    ],
)
def test_evaluation_is_the_same_however_it_is_read(fields, tmp_path):
    rows = [{**row, "pos_doc": [row["pos_doc"][0], f"{row['query']} yes"]} for row in ROWS[:5]]
    plain = make_trainer(tmp_path, ROWS, rows, trainer_fields={"eval_group_size": 3}).evaluate()
    trainer = make_trainer(
        tmp_path, ROWS, rows, trainer_fields={"eval_group_size": 3}, per_device_eval_batch_size=2, **fields
    )
    for metrics in (trainer.evaluate(), trainer.evaluate()):
        for name in ("eval_loss", "eval_accuracy@1", "eval_mrr@10", "eval_ndcg@10"):
            assert metrics[name] == pytest.approx(plain[name], rel=1e-5)


def test_rows_are_checked_with_their_number(tmp_path):
    rows = [*ROWS[:2], {"query": "q", "pos_doc": ["p"], "neg_doc": []}]
    with pytest.raises(ValueError, match="row 2 of source 0: the row has no neg_doc"):
        make_trainer(tmp_path, rows, train_sampling_strategy="sequential").train()


def test_every_group_is_seen_once_per_epoch(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=2, max_steps=-1, per_device_train_batch_size=3)
    seen = []
    collate = trainer.data_collator
    trainer.data_collator = lambda groups: (seen.extend(group["query"] for group in groups), collate(groups))[1]
    trainer.train()
    half = len(ROWS)
    assert len(seen) == 2 * half
    for part in (seen[:half], seen[half:]):
        assert sorted(part) == sorted(row["query"] for row in ROWS)
    assert seen[:half] != seen[half:]
    assert len(list(itertools.chain(losses(trainer)))) == trainer.state.global_step == 14

"""Adapters on disk: their base model, other ways to load them, further training, and vocabularies that have grown."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import PAIRS, ROWS, arguments, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from llama_bidir import CrossEncoder, LlamaBidirectionalForSequenceClassification

peft = pytest.importorskip("peft")

TOKENS = 320  # of the base


@pytest.fixture
def work(base_checkpoint, tmp_path, monkeypatch):
    """A working folder with the base model in `base`."""
    folder = tmp_path / "work"
    shutil.copytree(base_checkpoint, folder / "base")
    monkeypatch.chdir(folder)
    return folder


def adapt(base="base", *, num_tokens=TOKENS, dtype="float32", **config):
    """A reranker with an adapter, whose trained weights are not the initial ones."""
    torch.manual_seed(0)
    model = LlamaBidirectionalForSequenceClassification.from_pretrained(
        base, pooling="last", temperature=0.5, rerank_max_length=64, dtype=dtype
    )
    if num_tokens != TOKENS:
        model.resize_token_embeddings(num_tokens)
    fields = {"r": 2, "target_modules": "all-linear", "modules_to_save": ["score"], "task_type": "SEQ_CLS", **config}
    model = peft.get_peft_model(model, peft.LoraConfig(**fields)).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += torch.randn_like(weight) * 0.05
    return CrossEncoder(model, make_tokenizer(eos_token="<|end|>"), device="cpu")


def assert_equal(first, second):
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-6)


def test_a_base_given_as_a_relative_path_is_found_from_any_folder(work, monkeypatch):
    reranker = adapt()
    expected = reranker.predict(PAIRS)
    reranker.save_pretrained("adapter")
    fields = json.loads((work / "adapter" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(work / "base")
    monkeypatch.chdir("/")
    assert_equal(CrossEncoder(work / "adapter").predict(PAIRS), expected)


def test_a_relative_base_in_an_adapter_that_another_tool_has_saved(work, monkeypatch, caplog):
    reranker = adapt()
    expected = reranker.predict(PAIRS)
    reranker.save_pretrained("out/adapter")
    path = work / "out" / "adapter" / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "base_model_name_or_path": "base"}))  # as PEFT writes it
    assert_equal(CrossEncoder("out/adapter").predict(PAIRS), expected)
    monkeypatch.chdir("/")
    for load in (CrossEncoder, LlamaBidirectionalForSequenceClassification.from_pretrained):
        caplog.clear()
        reloaded = load(work / "out" / "adapter")
        assert f"its base model 'base' is taken from {work / 'base'}" in caplog.text
    assert_equal(CrossEncoder(reloaded, reranker.tokenizer).predict(PAIRS), expected)


@pytest.mark.parametrize("load", [CrossEncoder, AutoModelForSequenceClassification.from_pretrained])
def test_a_base_that_is_not_there_is_named_with_its_adapter(work, load):
    adapt().save_pretrained("adapter")
    (work / "base").rename(work / "moved")
    fix = "write its path or Hub id into base_model_name_or_path in adapter_config.json"
    message = (
        f"'adapter' is an adapter, and the folder {str(work / 'base')!r} of its base model does not exist here: {fix}"
    )
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        load("adapter")
    path = work / "adapter" / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "base_model_name_or_path": "org/missing"}))
    with pytest.raises(OSError, match=r"^'adapter' is an adapter, and its base model 'org/missing' cannot be loaded: "):
        load("adapter")
    path.write_text(json.dumps({**fields, "base_model_name_or_path": None}))
    with pytest.raises(FileNotFoundError, match=f"^'adapter' is an adapter that does not name its base model: {fix}$"):
        load("adapter")


def test_an_adapter_on_a_model_made_in_memory_says_that_its_base_is_unknown(model, tokenizer, tmp_path, caplog):
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["score"])
    CrossEncoder(peft.get_peft_model(model, config), tokenizer).save_pretrained(tmp_path)
    assert "the adapter is saved without the name of its base model" in caplog.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_classes_of_transformers_load_an_adapter(work, dtype, caplog):
    reranker = adapt(dtype=dtype)
    expected = reranker.predict(PAIRS)
    reranker.save_pretrained("adapter")
    caplog.clear()
    for load in (AutoModelForSequenceClassification, LlamaBidirectionalForSequenceClassification):
        model = load.from_pretrained("adapter", dtype=dtype)
        assert type(model) is LlamaBidirectionalForSequenceClassification
        assert (model.config.pooling, model.config.temperature) == ("last", 0.5)
        np.testing.assert_allclose(
            CrossEncoder(model, reranker.tokenizer).predict(PAIRS),
            expected,
            rtol=0,
            atol=1e-6 if dtype == "float32" else 0.05,
        )
    assert "score.weight is new" not in caplog.text


def test_a_loaded_adapter_can_be_trained_further(work):
    pytest.importorskip("accelerate")
    from llama_bidir import CrossEncoderTrainer, CrossEncoderTrainingArguments

    reranker = adapt()
    expected = reranker.predict(PAIRS)
    reranker.save_pretrained("adapter")
    loaded = CrossEncoder("adapter", device="cpu")
    trained = {name.split(".")[-2] for name, weight in loaded.model.named_parameters() if weight.requires_grad}
    assert trained == {"default"}  # adapters and the copy of the head
    assert not loaded.model.training
    assert_equal(loaded.predict(PAIRS), expected)
    training = arguments(CrossEncoderTrainingArguments, work / "more", max_steps=2)
    trainer = CrossEncoderTrainer(loaded.model, training, ROWS, processing_class=loaded.tokenizer, group_size=3)
    trainer.train()
    trainer.save_model()
    before, after = (load_file(work / name / "adapter_model.safetensors") for name in ("adapter", "more"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "lora_B" in name or "score" in name)
    again = CrossEncoder("more", device="cpu")
    assert_equal(again.predict(PAIRS), CrossEncoder(trainer.model, loaded.tokenizer).predict(PAIRS))
    assert np.abs(again.predict(PAIRS) - expected).max() > 0.01


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"modules_to_save": ["score", "embed_tokens"]},
        {"trainable_token_indices": {"embed_tokens": [3, 325]}},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
)
def test_lora_after_the_vocabulary_has_grown(work, config):
    reranker = adapt(num_tokens=330, **config)
    reranker.tokenizer.add_tokens([f"<|extra{number}|>" for number in range(10)])
    pairs = [*PAIRS, ("<|extra4|> where?", "<|extra5|> here")]
    expected = reranker.predict(pairs)
    reranker.save_pretrained("adapter")
    loaded = CrossEncoder("adapter", device="cpu")
    assert loaded.model.get_input_embeddings().weight.shape[0] == loaded.config.vocab_size == 330
    assert_equal(loaded.predict(pairs), expected)
    from llama_bidir.training import merge_adapter

    merge_adapter("adapter", "merged")
    np.testing.assert_allclose(CrossEncoder("merged", device="cpu").predict(pairs), expected, rtol=0, atol=1e-4)


def test_an_adapter_that_lacks_weights_is_refused(work):
    adapt(num_tokens=330).save_pretrained("adapter")
    path = work / "adapter" / "adapter_model.safetensors"
    whole = load_file(path)
    save_file({name: weight for name, weight in whole.items() if "embed_tokens" not in name}, path)
    with pytest.raises(
        ValueError, match="'adapter' is an adapter for a vocabulary of 330 tokens, but its base model has 320"
    ):
        CrossEncoder("adapter")
    for part in ("score", "layers.1.mlp.up_proj.lora_B"):
        save_file({name: weight for name, weight in whole.items() if part not in name}, path)
        for load in (CrossEncoder, AutoModelForSequenceClassification.from_pretrained):
            with pytest.raises(
                ValueError, match=rf"the adapter 'adapter' lacks weights, which would be random: .*{re.escape(part)}"
            ):
                load("adapter")


def test_an_adapter_without_a_head_says_that_the_head_is_new(work, caplog):
    reranker = adapt(modules_to_save=None, task_type=None)
    reranker.save_pretrained("adapter")
    caplog.clear()
    CrossEncoder("adapter")
    assert "score.weight is new" in caplog.text


def test_the_adapter_in_use_is_saved_at_the_top(work):
    torch.manual_seed(0)
    model = LlamaBidirectionalForSequenceClassification.from_pretrained("base")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["score"])
    reranker = CrossEncoder(
        peft.get_peft_model(model, config, adapter_name="mine").eval(), make_tokenizer(eos_token="e")
    )
    expected = reranker.predict(PAIRS)
    reranker.save_pretrained("adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir("adapter"))
    assert_equal(CrossEncoder("adapter", device="cpu").predict(PAIRS), expected)


def test_a_pickled_adapter_loads_on_a_base_in_safetensors_when_asked(work):
    reranker = adapt()
    expected = reranker.predict(PAIRS)
    reranker.save_pretrained("adapter")
    torch.save(load_file("adapter/adapter_model.safetensors"), "adapter/adapter_model.bin")
    (work / "adapter" / "adapter_model.safetensors").unlink()
    asked = {"use_safetensors": False}
    assert_equal(CrossEncoder("adapter", model_kwargs=asked).predict(PAIRS), expected)
    model = AutoModelForSequenceClassification.from_pretrained("adapter", **asked)
    assert_equal(CrossEncoder(model, reranker.tokenizer).predict(PAIRS), expected)
    with pytest.raises(ValueError, match="holds its weights as a pickle"):
        CrossEncoder("adapter")

    weights = torch.load("adapter/adapter_model.bin", weights_only=True)
    missing = next(name for name in weights if "layers.1." in name and "lora_A" in name)
    torch.save({name: weight for name, weight in weights.items() if name != missing}, "adapter/adapter_model.bin")
    for load in (
        lambda: CrossEncoder("adapter", model_kwargs=asked),
        lambda: AutoModelForSequenceClassification.from_pretrained("adapter", **asked),
    ):
        with pytest.raises(ValueError, match=r"'adapter' lacks weights, which would be random: .*layers\.1\."):
            load()

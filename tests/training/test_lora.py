import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from helpers import ROWS, arguments, losses, make_tokenizer, stop, tiny_config
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from llama_bidir import (  # noqa: E402
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    LlamaBidirectionalForSequenceClassification,
)
from llama_bidir.training import DataArguments, ModelArguments, merge_adapter, train  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_plot")
PAIRS = [(row["query"], passage) for row in ROWS[:5] for passage in row["pos_doc"] + row["neg_doc"]]


def train_adapter(base, path, peft_config=None, **kwargs):
    torch.manual_seed(0)
    model = LlamaBidirectionalForSequenceClassification.from_pretrained(
        base, pooling="last", temperature=0.5, prompt_template="{query} | {passage}", rerank_max_length=64
    )
    trainer = CrossEncoderTrainer(
        model,
        arguments(CrossEncoderTrainingArguments, path, max_steps=6, **kwargs),
        ROWS,
        processing_class=make_tokenizer(eos_token="<|end|>"),
        peft_config=peft_config or peft.LoraConfig(r=4, lora_alpha=8),
        group_size=4,
    )
    initial = trainer.model.base_model.model.score.original_module.weight.detach().clone()
    trainer.train()
    trainer.save_model()
    return trainer, initial


@pytest.fixture(scope="module")
def adapter(base_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    trainer, initial = train_adapter(base_checkpoint, path)
    return path, trainer, initial


def test_the_head_is_trained_and_saved_with_the_adapter(adapter):
    path, trainer, initial = adapter
    weights = load_file(path / "adapter_model.safetensors")
    head = next(weight for name, weight in weights.items() if "score" in name)
    assert not torch.equal(head, initial)
    assert {name.rsplit(".", 3)[1] for name in weights if "lora_A" in name} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    trainable = {name.split(".")[-2] for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert trainable == {"default"}  # adapters and the copy of the head, and nothing of the body


def test_the_folder_alone_reloads_to_equal_scores(adapter):
    path, trainer, _ = adapter
    reloaded = CrossEncoder(path, device="cpu")
    expected = CrossEncoder(trainer.model, trainer.processing_class).predict(PAIRS)
    np.testing.assert_allclose(reloaded.predict(PAIRS), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    config = reloaded.config
    assert (config.pooling, config.temperature, config.rerank_max_length) == ("last", 0.5, 64)
    assert config.prompt_template == "{query} | {passage}"
    assert len(set(expected.round(4))) > 5


@pytest.mark.parametrize("part", ["score.weight", "layers.1.mlp.up_proj.lora_B"])
def test_an_adapter_without_some_of_its_weights_is_refused(adapter, tmp_path, part):
    path, _, _ = adapter
    folder = shutil.copytree(path, tmp_path / "broken")
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if part not in name}
    assert len(kept) == len(weights) - 1
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    for load in (CrossEncoder, partial(merge_adapter, output=tmp_path / "merged")):
        with pytest.raises(ValueError, match=rf"the adapter .*broken' lacks weights, which would be random: .*{part}"):
            load(folder)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_without_a_head_says_that_the_head_is_new(adapter, tmp_path, caplog):
    path, _, _ = adapter
    CrossEncoder(path)
    assert "score.weight is new" not in caplog.text
    folder = shutil.copytree(path, tmp_path / "headless")
    config = json.loads((folder / "adapter_config.json").read_text())
    headless = {**config, "modules_to_save": None, "task_type": "FEATURE_EXTRACTION"}
    (folder / "adapter_config.json").write_text(json.dumps(headless))
    CrossEncoder(folder)
    assert "score.weight is new" in caplog.text


def test_a_base_without_some_of_its_weights_is_refused(adapter, base_checkpoint, tmp_path):
    path, _, _ = adapter
    base = shutil.copytree(base_checkpoint, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1." not in name}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})
    folder = shutil.copytree(path, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    for load in (CrossEncoder, partial(merge_adapter, output=tmp_path / "merged")):
        with pytest.raises(ValueError, match=r"base.model\.safetensors lacks model\.layers\.1\."):
            load(folder)


def test_merged_checkpoint_has_equal_scores_and_no_adapter(adapter, tmp_path):
    path, _, _ = adapter
    merge_adapter(path, tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    # In float64, because the rounding of float32 products differs between processors by more than this bound.
    merged = CrossEncoder(tmp_path / "merged", device="cpu", dtype="float64")
    expected = CrossEncoder(path, device="cpu", dtype="float64").predict(PAIRS)
    np.testing.assert_allclose(merged.predict(PAIRS), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert (merged.config.pooling, merged.config.temperature) == ("last", 0.5)
    with pytest.raises(FileExistsError, match="pass overwrite"):
        merge_adapter(path, tmp_path / "merged")
    merge_adapter(path, tmp_path / "merged", overwrite=True)
    with pytest.raises(ValueError, match=r"has no adapter_config\.json: it is a whole checkpoint already"):
        merge_adapter(tmp_path / "merged", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_adapter_runs_resume_and_recipes_have_a_lora_block(base_checkpoint, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(output, **kwargs):
        torch.manual_seed(0)
        return train(
            ModelArguments(model_name_or_path=str(base_checkpoint)),
            DataArguments(train=[str(rows)], group_size=3),
            arguments(
                CrossEncoderTrainingArguments, output, max_steps=6, save_strategy="steps", save_steps=3, **kwargs
            ),
            {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        )

    whole = run(tmp_path / "whole")
    stop(tmp_path / "whole", tmp_path / "stopped", "checkpoint-3")
    resumed = run(tmp_path / "stopped")
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "stopped"))
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


def test_adapters_on_4_bit_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    base = tmp_path / "base"  # blocks of 64 weights
    LlamaForCausalLM(LlamaConfig(**tiny_config(hidden_size=64, intermediate_size=128))).save_pretrained(base)
    make_tokenizer(eos_token="<|end|>").save_pretrained(base)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    trainer = train(
        ModelArguments(model_name_or_path=str(base), load_in_4bit=True, dtype="bfloat16"),
        DataArguments(train=[str(rows)], group_size=3),
        arguments(CrossEncoderTrainingArguments, tmp_path / "out", max_steps=20),
        {"r": 4},
    )
    assert type(trainer.model.base_model.model.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    # PEFT makes these matrices as zeros, so training has moved all of them.
    assert all(weight.any() for name, weight in trainer.model.named_parameters() if "lora_B" in name)
    expected = CrossEncoder(trainer.model, trainer.processing_class).predict(PAIRS)
    np.testing.assert_allclose(
        CrossEncoder(tmp_path / "out", device="cpu").predict(PAIRS), expected, rtol=1e-4, atol=1e-4
    )
    merge_adapter(tmp_path / "out", tmp_path / "merged")
    merged = CrossEncoder(tmp_path / "merged", device="cpu", dtype="float32").predict(PAIRS)
    np.testing.assert_allclose(merged, expected, rtol=0.1, atol=0.3)  # bfloat16 under the adapter


def test_wrong_adapters(base_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="the task_type of a reranker's peft_config must be SEQ_CLS, got 'CAUSAL_LM'"):
        train_adapter(base_checkpoint, tmp_path, peft.LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"model\.load_in_4bit freezes the weights: add a lora block"):
        train(
            ModelArguments(model_name_or_path=str(base_checkpoint), load_in_4bit=True),
            DataArguments(train=["none.jsonl"]),
            arguments(CrossEncoderTrainingArguments, tmp_path / "out"),
        )

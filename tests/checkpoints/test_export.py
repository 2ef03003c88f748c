"""What all exports have in common, and the vLLM export without vLLM (test_vllm.py runs vLLM)."""

import json
import os
import subprocess

import numpy as np
import pytest
import torch
from helpers import PAIRS, make_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llama_bidir import CrossEncoder, LlamaBidirectionalConfig, LlamaBidirectionalForSequenceClassification
from llama_bidir.checkpoints import loading
from llama_bidir.checkpoints.export import FORMATS, export_reranker
from llama_bidir.cli import main
from llama_bidir.scoring import device

TRANSFORMERS_4 = os.environ.get("LLAMA_BIDIR_TRANSFORMERS4_PYTHON")


def test_the_card_of_each_format_explains_how_to_load_it(save, tmp_path):
    folder, _ = save()
    said = {
        "sentence-transformers": "from sentence_transformers",
        "vllm": "vllm serve",
        "hub": "trust_remote_code=True",
    }
    for format, line in said.items():
        output = tmp_path / format
        assert main(["export", "--model", str(folder), "--format", format, "--output", str(output)]) == 0
        card = (output / "README.md").read_text()
        assert line in card
        assert "question:{query} \\n \\n passage:{passage}" in card
    assert said.keys() | {"onnx"} == FORMATS.keys()


@pytest.mark.parametrize("format", FORMATS)
def test_an_adapter_is_merged_before_it_is_exported(base_checkpoint, tmp_path, format):
    peft = pytest.importorskip("peft")
    from llama_bidir.training.lora import add_adapter

    config = LlamaBidirectionalConfig.from_pretrained(base_checkpoint, rerank_max_length=64)
    model = make_model().from_pretrained(base_checkpoint, config=config)
    adapted = add_adapter(model, peft.LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    torch.manual_seed(3)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    reranker = CrossEncoder(adapted, AutoTokenizer.from_pretrained(base_checkpoint))
    reranker.save_pretrained(tmp_path / "adapter")
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    export_reranker(tmp_path / "adapter", tmp_path / "out", format=format)
    expected = reranker.predict(PAIRS)
    if format == "sentence-transformers":
        st = pytest.importorskip("sentence_transformers")
        scores = st.CrossEncoder(str(tmp_path / "out"), device="cpu").predict(PAIRS)
    elif format == "vllm":
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", attn_implementation="sdpa")
        ours = LlamaBidirectionalForSequenceClassification(config)
        ours.load_state_dict(merged.state_dict())
        scores = CrossEncoder(ours, reranker.tokenizer).predict(PAIRS)
    else:
        scores = CrossEncoder(tmp_path / "out", backend="onnx" if format == "onnx" else "torch").predict(PAIRS)
    np.testing.assert_allclose(scores, expected, rtol=1e-4 if format == "onnx" else 1e-5)


def test_a_base_model_is_exported_with_a_warning_that_its_scores_mean_nothing(base_checkpoint, tmp_path, caplog):
    export_reranker(base_checkpoint, tmp_path / "out", format="hub")
    [warning] = [message for message in caplog.messages if message.startswith("score.weight is new: ")]
    assert str(base_checkpoint) in warning
    assert warning.endswith("needs training before its scores mean anything")
    assert (tmp_path / "out" / "config.json").exists()


def test_an_export_never_replaces_what_it_reads_or_something_else(save, tmp_path, capsys):
    folder, _ = save()
    arguments = ["export", "--model", str(folder), "--format", "hub", "--overwrite", "--output"]
    assert main([*arguments, str(folder)]) == 2
    assert "lies in the output" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert main([*arguments, str(other)]) == 2
    assert "holds something else (it has no config.json)" in capsys.readouterr().err
    assert (other / "thesis.txt").read_text() == "mine"


def test_quantized_weights_and_another_number_of_labels_are_refused(save, tmp_path, monkeypatch):
    folder, _ = save()
    export_reranker(folder, tmp_path / "st", format="sentence-transformers")
    with pytest.raises(ValueError, match=r"num_labels is 3, but the head of .* has 1: leave num_labels out"):
        CrossEncoder(tmp_path / "st", num_labels=3)
    load = loading.load_reranker

    def load_quantized(*args):
        model = load(*args)
        model.is_quantized = True
        return model

    monkeypatch.setattr(loading, "load_reranker", load_quantized)
    with pytest.raises(ValueError, match="holds quantized weights: pass the checkpoint that they were made from"):
        export_reranker(folder, tmp_path / "hub", format="hub")
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("format", ["sentence-transformers", "vllm"])
def test_half_precision_does_not_round_the_temperature_into_the_head(save, tmp_path, format):
    folder, _ = save(temperature=0.3)
    export_reranker(folder, tmp_path / "half", format=format, dtype="bfloat16")
    files = {"sentence-transformers": ("2_Dense/model.safetensors", "linear.weight")}
    file, name = files.get(format, ("model.safetensors", "score.weight"))
    head = load_file(tmp_path / "half" / file)[name]
    exact = load_file(folder / "model.safetensors")["score.weight"].bfloat16().float() / 0.3
    torch.testing.assert_close(head, exact, rtol=1e-6, atol=0)
    if format == "sentence-transformers":
        st = pytest.importorskip("sentence_transformers")
        scores = CrossEncoder(tmp_path / "half", dtype="float32").predict(PAIRS)
        peer = st.CrossEncoder(str(tmp_path / "half"), device="cpu", model_kwargs={"dtype": "float32"})
        np.testing.assert_allclose(peer.predict(PAIRS), scores, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["hub", "sentence-transformers"])
def test_layers_that_int8_skips_are_exported_and_loaded(save, tmp_path, format):
    skipped = ["layers.1.mlp.down_proj"]
    folder, _ = save(int8_skip_modules=skipped)
    export_reranker(folder, tmp_path / "export", format=format)
    assert CrossEncoder(tmp_path / "export", dtype="float32").model.config.int8_skip_modules == skipped


def test_a_checkpoint_that_was_cast_for_this_cpu_says_so_when_it_is_saved(save, tmp_path, monkeypatch, caplog):
    folder, _ = save()
    export_reranker(folder, tmp_path / "half", format="hub", dtype="bfloat16")
    monkeypatch.setattr(device, "multiplies_bfloat16_faster", lambda: False)
    CrossEncoder(tmp_path / "half", dtype="auto").save_pretrained(tmp_path / "auto")
    assert not [record for record in caplog.records if "saved in" in record.message]
    CrossEncoder(tmp_path / "half").save_pretrained(tmp_path / "cast")
    assert (
        "saved in torch.float32, as this CPU computes; the checkpoint is stored in torch.bfloat16: load" in caplog.text
    )


def test_only_vllm_loads_the_folder_for_vllm(save, tmp_path):
    folder, _ = save(temperature=0.25)
    export_reranker(folder, tmp_path / "vllm", format="vllm")
    config = json.loads((tmp_path / "vllm" / "config.json").read_text())
    expected = {
        "model_type": "llama",
        "architectures": ["LlamaBidirectionalForSequenceClassification"],
        "pooling": "avg",
        "is_causal": False,
        "id2label": {"0": "LABEL_0"},
        "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},
    }
    assert {name: config[name] for name in expected} == expected
    assert not config.keys() & {"temperature", "prompt_template", "rerank_max_length"}
    with pytest.raises(ValueError, match="only_vllm_loads_this_folder"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "vllm")
    with safe_open(tmp_path / "vllm" / "model.safetensors", framework="pt") as weights:
        # transformers 4.57: File metadata is not ['pt', 'tf', 'flax', 'mlx'] but only_vllm_loads_this_folder
        assert weights.metadata() == {"format": "only_vllm_loads_this_folder"}
    head = AutoModelForSequenceClassification.from_pretrained(folder).score.weight
    folded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "vllm", attn_implementation="sdpa")
    torch.testing.assert_close(folded.score.weight, 4 * head)
    # The prompt beside the weights renders to the token ids of the reranker.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "vllm")
    template = (tmp_path / "vllm" / "chat_template.jinja").read_text()
    messages = [{"role": "query", "content": [{"type": "text", "text": "q"}]}, {"role": "document", "content": "p"}]
    rendered = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert rendered == "question:q \n \n passage:p"


@pytest.mark.slow
@pytest.mark.skipif(TRANSFORMERS_4 is None, reason="LLAMA_BIDIR_TRANSFORMERS4_PYTHON names no interpreter")
@pytest.mark.parametrize("name", ["AutoModelForSequenceClassification", "LlamaForSequenceClassification", "AutoModel"])
def test_transformers_4_refuses_the_folder_for_vllm(name, save, tmp_path):
    folder, _ = save()
    export_reranker(folder, tmp_path / "vllm", format="vllm")
    code = f"import transformers; transformers.{name}.from_pretrained({str(tmp_path / 'vllm')!r})"
    result = subprocess.run([str(TRANSFORMERS_4), "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "ValueError: Incompatible safetensors file" in result.stderr
    assert "only_vllm_loads_this_folder" in result.stderr


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"num_labels": 3}, "a reranker of one label, and this one has 3"), ({"is_causal": True}, "has is_causal set")],
)
def test_what_vllm_cannot_serve_is_refused(save, tmp_path, fields, message):
    folder, _ = save(**fields)
    with pytest.raises(ValueError, match=message):
        export_reranker(folder, tmp_path / "vllm", format="vllm")
    assert not (tmp_path / "vllm").exists()

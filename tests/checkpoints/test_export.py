"""Exports: equal scores in the tools that the folders are for. vLLM has a file of its own, test_vllm.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_model, make_tokenizer
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llama_bidir import (
    CrossEncoder,
    LlamaBidirectionalConfig,
    LlamaBidirectionalForSequenceClassification,
    cross_encoder,
)
from llama_bidir.checkpoints import loading
from llama_bidir.checkpoints.chat_template import make_chat_template
from llama_bidir.checkpoints.export import FORMATS, export_reranker
from llama_bidir.checkpoints.model_card import write_model_card
from llama_bidir.checkpoints.onnx import OnnxReranker
from llama_bidir.cli import main
from llama_bidir.jobs.scoring import describe_scoring
from llama_bidir.scoring import device

PAIRS = [
    ("where do bees find their way?", "Honey bees navigate by the position of the sun."),
    (" capital  {France}", ""),
    ("", "The hive was painted white."),
    ("the garden", "The garden was full of clover; nobody counted the flowers. " * 8),  # is cut
]
PASSAGE_FIRST = "<{passage}\n{{k}} {query} !"


@pytest.fixture
def save(tmp_path):
    """Saves a tiny reranker and returns its folder and scores."""

    def save(pairs=PAIRS, **fields):
        tokenizer = make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")
        reranker = CrossEncoder(make_model(rerank_max_length=64, **fields), tokenizer)
        reranker.save_pretrained(tmp_path / "reranker")
        return tmp_path / "reranker", reranker.predict(pairs)

    return save


@pytest.mark.parametrize("pooling", ["avg", "cls", "last"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_sentence_transformers_gives_the_same_scores(save, tmp_path, pooling, temperature):
    st = pytest.importorskip("sentence_transformers")
    folder, scores = save(pooling=pooling, temperature=temperature)
    export_reranker(folder, tmp_path / "st", format="sentence-transformers")
    exported = st.CrossEncoder(str(tmp_path / "st"), device="cpu")
    np.testing.assert_allclose(exported.predict(PAIRS), scores, rtol=1e-5, atol=1e-5)
    # Our own folder, whose chat template is the prompt.
    np.testing.assert_allclose(st.CrossEncoder(str(folder), device="cpu").predict(PAIRS), scores, rtol=1e-5, atol=1e-5)
    # And back, also after sentence-transformers has saved it.
    exported.save_pretrained(str(tmp_path / "again"))
    for path in (tmp_path / "st", tmp_path / "again"):
        back = CrossEncoder(path)
        np.testing.assert_allclose(back.predict(PAIRS), scores, rtol=1e-5, atol=1e-6)
        assert (back.config.pooling, back.config.rerank_max_length) == (pooling, 64)


def test_a_prompt_that_ends_otherwise_is_the_same_for_pairs_that_fit(save, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    folder, scores = save(PAIRS[:3], prompt_template=PASSAGE_FIRST)
    export_reranker(folder, tmp_path / "st", format="sentence-transformers")
    np.testing.assert_allclose(
        st.CrossEncoder(str(tmp_path / "st"), device="cpu").predict(PAIRS[:3]), scores, rtol=1e-5, atol=1e-5
    )
    assert CrossEncoder(tmp_path / "st").config.prompt_template == PASSAGE_FIRST


def test_other_modules_of_sentence_transformers_are_refused(save, tmp_path):
    folder, _ = save()
    export_reranker(folder, tmp_path / "st", format="sentence-transformers")
    dense = tmp_path / "st" / "2_Dense" / "config.json"
    dense.write_text(json.dumps({**json.loads(dense.read_text()), "activation_function": "torch.nn.Tanh"}))
    with pytest.raises(ValueError, match="the Dense head linear without bias"):
        CrossEncoder(tmp_path / "st")
    modules = tmp_path / "st" / "modules.json"
    modules.write_text(json.dumps(json.loads(modules.read_text())[:2]))
    with pytest.raises(ValueError, match="of the modules Transformer, Pooling: only Transformer, Pooling and Dense"):
        CrossEncoder(tmp_path / "st")


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
    head = AutoModelForSequenceClassification.from_pretrained(folder).score.weight
    folded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "vllm", attn_implementation="sdpa")
    torch.testing.assert_close(folded.score.weight, 4 * head)
    # The prompt beside the weights renders to the token ids of the reranker.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "vllm")
    template = (tmp_path / "vllm" / "chat_template.jinja").read_text()
    messages = [{"role": "query", "content": [{"type": "text", "text": "q"}]}, {"role": "document", "content": "p"}]
    rendered = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert rendered == "question:q \n \n passage:p"


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"num_labels": 3}, "a reranker of one label, and this one has 3"), ({"is_causal": True}, "has is_causal set")],
)
def test_what_vllm_cannot_serve_is_refused(save, tmp_path, fields, message):
    folder, _ = save(**fields)
    with pytest.raises(ValueError, match=message):
        export_reranker(folder, tmp_path / "vllm", format="vllm")
    assert not (tmp_path / "vllm").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("pooling", "fields"), [("avg", {"temperature": 0.3}), ("last", {"num_labels": 2})])
def test_onnxruntime_gives_the_same_scores(save, tmp_path, pooling, fields):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from onnx import TensorProto, load

    folder, scores = save(pooling=pooling, **fields)
    export_reranker(folder, tmp_path / "onnx", format="onnx", int8=True)
    exported = CrossEncoder(tmp_path / "onnx", backend="onnx")
    np.testing.assert_allclose(exported.predict(PAIRS), scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(exported.predict(PAIRS[0]), scores[0], rtol=1e-4, atol=1e-5)
    drift = CrossEncoder(tmp_path / "onnx", backend="onnx", model_kwargs={"file_name": "model_int8.onnx"})
    assert 1e-5 < np.abs(drift.predict(PAIRS) - scores).max() < 0.5 * np.abs(scores).max()
    weights = [
        (each.data_type, list(each.dims))
        for each in load(tmp_path / "onnx" / "model_int8.onnx", load_external_data=False).graph.initializer
    ]
    assert weights.count((TensorProto.FLOAT, [48, 32])) == 2  # the down projection of each layer
    assert weights.count((TensorProto.INT8, [32, 48])) == 4  # gate and up
    with pytest.raises(TypeError, match="is not saved again: copy its folder"):
        exported.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="backend 'onnx' takes no attn_implementation"):
        CrossEncoder(tmp_path / "onnx", backend="onnx", model_kwargs={"attn_implementation": "eager"})
    with pytest.raises(ValueError, match="backend 'onnx' computes on the CPU"):
        CrossEncoder(tmp_path / "onnx", backend="onnx", device="cuda")


def test_a_folder_without_a_graph_is_refused(save):
    pytest.importorskip("onnxruntime")
    folder, _ = save()
    with pytest.raises(FileNotFoundError, match=r"has no model\.onnx: llama-bidir export --format onnx writes one"):
        CrossEncoder(folder, backend="onnx")


def test_the_folder_for_the_hub_needs_no_package(save, tmp_path):
    folder, scores = save(temperature=0.5)
    export_reranker(folder, tmp_path / "hub", format="hub")
    code = """
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained("hub", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("hub", trust_remote_code=True)
text = model.config.prompt_template.format(query="where do bees find their way?",
    passage="Honey bees navigate by the position of the sun.")
with torch.no_grad():
    print(model(**tokenizer(text, return_tensors="pt")).logits.item())
assert "llama_bidir" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(float(result.stdout), scores[0], rtol=1e-5)
    np.testing.assert_allclose(CrossEncoder(tmp_path / "hub").predict(PAIRS), scores, rtol=1e-6)


def test_every_format_has_a_card_that_says_how_to_load_it(save, tmp_path):
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
def test_an_adapter_is_merged_on_the_way(base_checkpoint, tmp_path, format):
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


def test_an_export_never_replaces_what_it_reads_or_something_else(save, tmp_path):
    folder, _ = save()
    arguments = ["export", "--model", str(folder), "--format", "hub", "--overwrite", "--output"]
    assert main([*arguments, str(folder)]) == 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    assert main([*arguments, str(other)]) == 2
    assert (other / "thesis.txt").read_text() == "mine"
    assert main(["export", "--model", str(folder), "--format", "hub", "--int8", "--output", str(tmp_path / "x")]) == 2


def test_a_chat_template_writes_special_tokens_out():
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>")
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=None, special_tokens=ids
    )
    template = make_chat_template(tokenizer, PASSAGE_FIRST)
    messages = [{"role": "document", "content": "a passage"}, {"role": "query", "content": "a query"}]
    rendered = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True)["input_ids"]
    assert rendered == tokenizer(PASSAGE_FIRST.format(passage="a passage", query="a query"))["input_ids"]
    assert (rendered[0], rendered[-1]) == (ids[0][1], ids[1][1])
    lone = tokenizer.apply_chat_template(messages[:1], chat_template=template, tokenize=False)
    assert lone == "a passage"
    with pytest.raises(Exception, match="a pair is a message of role query and one of role document"):
        tokenizer.apply_chat_template([messages[0]] * 2, chat_template=template)


def test_vllm_puts_special_tokens_around_what_its_template_renders(tmp_path):
    tokenizer = make_tokenizer(bos_token="<s>", pad_token="<|pad|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    CrossEncoder(make_model(prompt_template=PASSAGE_FIRST), tokenizer).save_pretrained(tmp_path / "reranker")
    export_reranker(tmp_path / "reranker", tmp_path / "vllm", format="vllm")
    messages = [{"role": "query", "content": "a query"}, {"role": "document", "content": "a passage"}]
    expected = tokenizer(PASSAGE_FIRST.format(passage="a passage", query="a query"))["input_ids"]
    assert expected.count(tokenizer.bos_token_id) == 1
    for file in ("vllm/chat_template.jinja", "reranker/vllm_template.jinja"):
        saved = AutoTokenizer.from_pretrained((tmp_path / file).parent)
        template = (tmp_path / file).read_text(encoding="utf-8")
        # As vLLM does it: rendered to text, which is then tokenized as any other.
        rendered = saved.apply_chat_template(messages, chat_template=template, tokenize=False)
        assert saved(rendered)["input_ids"] == expected
    # sentence-transformers tokenizes what it renders without special tokens.
    saved = AutoTokenizer.from_pretrained(tmp_path / "reranker")
    assert saved.apply_chat_template(messages, return_dict=True)["input_ids"] == expected


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
    with pytest.raises(ValueError, match="holds quantized weights: give the checkpoint that they were made from"):
        export_reranker(folder, tmp_path / "hub", format="hub")
    assert not (tmp_path / "hub").exists()


def test_the_card_of_an_export_says_what_the_rerankers_card_says(save, tmp_path):
    folder, _ = save()
    evaluation = tmp_path / "nq.json"
    evaluation.write_text(json.dumps({"aggregated": {"nDCG@10": 0.5}}))
    metadata = {"base_model": "meta-llama/Llama-3.2-1B", "license": "llama3.2", "datasets": ["squad"], "language": "en"}
    write_model_card(folder, LlamaBidirectionalConfig(), "Llama-r", evaluation=evaluation, metadata=metadata)
    export_reranker(folder, tmp_path / "hub", format="hub", model_id="you/Llama-r")
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert {name: getattr(card.data, name) for name in metadata} == metadata
    assert [result.metric_value for result in card.data.eval_results] == [0.5]
    assert 'from_pretrained("you/Llama-r"' in card.text
    assert (tmp_path / "hub" / "NOTICE").read_text() == (folder / "NOTICE").read_text()
    evaluation.write_text(json.dumps({"aggregated": {"nDCG@10": 0.75}}))
    arguments = ["export", "--model", str(folder), "--format", "hub", "--output", str(tmp_path / "again")]
    assert main([*arguments, "--evaluation", str(evaluation)]) == 0
    assert ModelCard.load(tmp_path / "again" / "README.md").data.eval_results[0].metric_value == 0.75


def test_a_checkpoint_that_was_cast_for_this_cpu_says_so_when_it_is_saved(save, tmp_path, monkeypatch, caplog):
    folder, _ = save()
    export_reranker(folder, tmp_path / "half", format="hub", dtype="bfloat16")
    monkeypatch.setattr(device, "_multiplies_bfloat16_faster", lambda: False)
    CrossEncoder(tmp_path / "half", dtype="auto").save_pretrained(tmp_path / "auto")
    assert not [record for record in caplog.records if "saved in" in record.message]
    CrossEncoder(tmp_path / "half").save_pretrained(tmp_path / "cast")
    assert (
        "saved in torch.float32, as this CPU computes, and was stored in torch.bfloat16: load with dty" in caplog.text
    )


def test_the_prompt_of_nemo_automodel_is_recovered(save, tmp_path):
    prompt = 'Query: {query}\n\n"Text": {passage}'
    folder, _ = save()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # As NeMo AutoModel writes it; the configuration has no prompt.
    written = (
        "{%- if messages | length != 2 -%}{{- raise_exception('two') -}}{%- endif -%}{{- \"\" + "
        + json.dumps(prompt)
        + ".format(query=messages[0]['content'], passage=messages[1]['content']) + \"\" -}}"
    )
    tokenizer.chat_template = {"default": "{{ messages }}", "reranking": written}
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["prompt_template"]
    (folder / "config.json").write_text(json.dumps(config))
    recovered = CrossEncoder(folder)
    assert recovered.config.prompt_template == prompt
    export_reranker(folder, tmp_path / "hub", format="hub")
    assert CrossEncoder(tmp_path / "hub").config.prompt_template == prompt
    # A prompt that the configuration has goes before it.
    other = make_model(prompt_template=PASSAGE_FIRST)
    assert CrossEncoder(other, AutoTokenizer.from_pretrained(folder)).config.prompt_template == PASSAGE_FIRST
    # Saved by us, the prompt is in the configuration, and no template of NeMo's is left to contradict it.
    recovered.config.prompt_template = PASSAGE_FIRST
    recovered.save_pretrained(folder)
    assert CrossEncoder(folder).config.prompt_template == PASSAGE_FIRST
    assert not (Path(folder) / "additional_chat_templates").exists()


def test_a_card_has_the_measures_and_the_notice_of_the_licence(tmp_path, tokenizer, model):
    model.config.name_or_path = "meta-llama/Llama-3.2-1B"
    evaluation = tmp_path / "nq.json"
    evaluation.write_text(json.dumps({"aggregated": {"nDCG@10": 0.41234, "RR@10": 0.5}, "per_query": {}}))
    CrossEncoder(model, tokenizer).save_pretrained(tmp_path / "out", model_id="you/Llama-r", evaluation=evaluation)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.base_model) == ("llama3.2", "meta-llama/Llama-3.2-1B")
    results = [(result.dataset_name, result.metric_type, result.metric_value) for result in card.data.eval_results]
    assert results == [("nq", "nDCG@10", 0.41234), ("nq", "RR@10", 0.5)]
    assert "| nDCG@10 | 0.4123 |" in card.text
    notice = (tmp_path / "out" / "NOTICE").read_text()
    assert notice.startswith("Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright")
    assert notice.strip() in card.text
    evaluation.write_text("{}")
    with pytest.raises(ValueError, match=r"nq\.json: evaluation must be a file of llama-bidir evaluate --json"):
        CrossEncoder(model, tokenizer).save_pretrained(tmp_path / "out", evaluation=evaluation)


def test_saved_with_code(tmp_path, tokenizer, model):
    CrossEncoder(model, tokenizer).save_pretrained(tmp_path, with_code=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"configuration_llama_bidir.py", "modeling_llama_bidir.py"}
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_llama_bidir.LlamaBidirectionalModel"


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


def test_a_cached_checkpoint_loads_without_a_network(reranker_checkpoint, tmp_path):
    # As after `snapshot_download`, nobody has asked for modules.json, so that the cache cannot say that there is none.
    commit = "0" * 40
    repo = tmp_path / "models--you--cached"
    shutil.copytree(reranker_checkpoint, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    cached = CrossEncoder("you/cached", cache_folder=str(tmp_path))
    assert cached.predict(PAIRS).tolist() == CrossEncoder(reranker_checkpoint).predict(PAIRS).tolist()


def test_what_an_exported_graph_cannot_do_is_told(save, tmp_path, monkeypatch):
    folder, _ = save()
    config = LlamaBidirectionalConfig.from_pretrained(folder)
    graph = OnnxReranker.__new__(OnnxReranker)  # without onnxruntime, which is not needed to refuse
    graph.config = config
    monkeypatch.setattr(cross_encoder, "load_onnx", lambda *args, **kwargs: graph)
    reranker = CrossEncoder(folder, backend="onnx")
    with pytest.raises(ValueError, match="backend 'onnx' computes on the CPU: leave device out"):
        reranker.predict(PAIRS, device="cuda:1")
    with pytest.raises(TypeError, match="a job that resumes needs backend 'torch'"):
        describe_scoring(reranker)

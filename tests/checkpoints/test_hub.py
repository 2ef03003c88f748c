"""Sharing: push to and load from a Hub on loopback, the model card, and code beside the checkpoint."""

import json
import re

import huggingface_hub
import pytest
from helpers import lines, run_python, write
from hub_server import run_hub
from huggingface_hub import ModelCard

from llama_bidir import LlamaBidirectionalConfig
from llama_bidir.checkpoints.model_card import find_origin, write_model_card

PAIRS = [("where do bees go?", "Honey bees navigate by the sun."), ("q", "Paris.")]


@pytest.fixture
def hub():
    with run_hub() as hub:
        yield hub


def test_push_then_load_from_the_hub(hub, reranker_checkpoint, tmp_path):
    pushed = run_python(
        f"""
import json
from llama_bidir import CrossEncoder
reranker = CrossEncoder({str(reranker_checkpoint)!r})
url = reranker.push_to_hub("tester/tiny", commit_message="first", private=True)
print(json.dumps([url, reranker.predict({PAIRS!r}).tolist()]))
""",
        tmp_path,
        HF_ENDPOINT=hub.endpoint,
    )
    url, scores = json.loads(pushed)
    assert url.startswith(f"{hub.endpoint}/tester/tiny/commit/")
    files = hub.repos["tester/tiny"]
    assert set(files) >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert [commit["summary"] for commit in hub.commits] == ["first"]
    assert json.loads(files["config.json"])["temperature"] == 0.5

    loaded = run_python(
        f"""
import json
import torch
import llama_bidir
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from llama_bidir import CrossEncoder
by_name = CrossEncoder.from_pretrained("tester/tiny")
model = AutoModelForSequenceClassification.from_pretrained("tester/tiny")
by_auto = CrossEncoder(model, AutoTokenizer.from_pretrained("tester/tiny"))
print(json.dumps([reranker.predict({PAIRS!r}).tolist() for reranker in (by_name, by_auto)]))
""",
        tmp_path,
        HF_ENDPOINT=hub.endpoint,
    )
    assert json.loads(loaded) == [scores, scores]

    card = files["README.md"].decode()
    for block in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        assert "tester/tiny" in block
        assert run_python(block, tmp_path, HF_ENDPOINT=hub.endpoint).strip()


def test_trainer_pushes_model_tokenizer_and_card(hub, reranker_checkpoint, tmp_path):
    pytest.importorskip("accelerate")
    run_python(
        f"""
import datasets
from llama_bidir import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
reranker = CrossEncoder({str(reranker_checkpoint)!r})
rows = datasets.Dataset.from_list([{{"query": "q", "pos_doc": ["p"], "neg_doc": ["n"]}}] * 4)
args = CrossEncoderTrainingArguments(
    "out", max_steps=1, push_to_hub=True, hub_model_id="tester/trained", save_strategy="no", use_cpu=True
)
trainer = CrossEncoderTrainer(reranker.model, args, rows, processing_class=reranker.tokenizer, group_size=2)
trainer.train()
trainer.push_to_hub()
""",
        tmp_path,
        HF_ENDPOINT=hub.endpoint,
    )
    files = hub.repos["tester/trained"]
    assert set(files) >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    card = files["README.md"].decode()
    assert 'CrossEncoder("tester/trained")' in card
    assert "pipeline_tag: text-ranking" in card


def test_a_run_pushes_what_it_has_saved(hub, base_checkpoint, tmp_path):
    pytest.importorskip("accelerate")
    write(tmp_path / "rows.jsonl", lines(*[{"query": "q", "pos_doc": ["p"], "neg_doc": ["n"]}] * 4))
    run_python(
        f"""
from llama_bidir.training import CrossEncoderTrainingArguments, DataArguments, ModelArguments, train
train(
    ModelArguments(model_name_or_path={str(base_checkpoint)!r}),
    DataArguments(train=["rows.jsonl"], group_size=2),
    CrossEncoderTrainingArguments(
        "out", max_steps=2, push_to_hub=True, hub_model_id="tester/run", save_steps=1, use_cpu=True, report_to="none"
    ),
)
""",
        tmp_path,
        HF_ENDPOINT=hub.endpoint,
    )
    files, out = hub.repos["tester/run"], tmp_path / "out"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"):
        assert files[name] == (out / name).read_bytes(), name
    assert not [name for name in files if name.startswith("checkpoint-")]


def test_code_beside_the_checkpoint_serves_people_without_the_package(reranker_checkpoint, tmp_path):
    saved = tmp_path / "with_code"
    scores, logits = json.loads(
        run_python(
            f"""
import json
from llama_bidir import (
    CrossEncoder, LlamaBidirectionalConfig, LlamaBidirectionalForSequenceClassification, LlamaBidirectionalModel
)
LlamaBidirectionalConfig.register_for_auto_class()
LlamaBidirectionalModel.register_for_auto_class("AutoModel")
LlamaBidirectionalForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
reranker = CrossEncoder({str(reranker_checkpoint)!r})
reranker.save_pretrained({str(saved)!r})
texts = [reranker.config.prompt_template.format(query=query, passage=passage) for query, passage in {PAIRS!r}]
# With gradients, and so by the same kernels as without the package.
logits = [reranker.model(**reranker.tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
print(json.dumps([reranker.predict({PAIRS!r}, batch_size=1).tolist(), logits]))
""",
            tmp_path,
        )
    )
    assert {path.name for path in saved.glob("*.py")} == {"configuration_llama_bidir.py", "modeling_llama_bidir.py"}
    auto_map = json.loads((saved / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_llama_bidir.LlamaBidirectionalConfig",
        "AutoModelForSequenceClassification": "modeling_llama_bidir.LlamaBidirectionalForSequenceClassification",
    }
    without = json.loads(
        run_python(
            f"""
import json, sys
sys.modules["llama_bidir"] = None  # as if it were not installed
from transformers import AutoModelForSequenceClassification, AutoTokenizer
path = {str(saved)!r}
model = AutoModelForSequenceClassification.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
texts = [model.config.prompt_template.format(query=query, passage=passage) for query, passage in {PAIRS!r}]
scores = [model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
model.save_pretrained("again")
print(json.dumps([scores, type(model).__module__]))
""",
            tmp_path,
        )
    )
    assert without[0] == pytest.approx(logits, rel=1e-6)
    assert logits == pytest.approx(scores, rel=1e-5)
    assert without[1].startswith("transformers_modules.")
    assert (tmp_path / "again" / "modeling_llama_bidir.py").is_file()
    local = json.loads(
        run_python(
            f"""
import json
from llama_bidir import CrossEncoder
reranker = CrossEncoder({str(saved)!r})
reranker.save_pretrained("local")
print(json.dumps([reranker.predict({PAIRS!r}, batch_size=1).tolist(), type(reranker.model).__module__]))
""",
            tmp_path,
        )
    )
    assert local == [scores, "llama_bidir.modeling_llama_bidir"]
    assert "auto_map" not in json.loads((tmp_path / "local" / "config.json").read_text())


# Model card


def test_card_of_a_known_base_model(tmp_path):
    config = LlamaBidirectionalConfig(temperature=0.5, pooling="last", name_or_path="meta-llama/Llama-3.2-1B")
    write_model_card(tmp_path, config, "me/reranker")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-ranking")
    assert {"reranker", "cross-encoder"} <= set(data.tags)
    assert (data.base_model, data.license) == ("meta-llama/Llama-3.2-1B", "llama3.2")
    text = (tmp_path / "README.md").read_text()
    assert "| Temperature | 0.5 (logits are divided by it) |" in text
    assert r"`question:{query} \n \n passage:{passage}`" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Llama-2-7b-hf", "llama2"),
        ("meta-llama/Meta-Llama-3-8B", "llama3"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama3.1"),
        ("meta-llama/Llama-3.1-8B", "llama3.1"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3"),
        ("HuggingFaceTB/SmolLM2-135M", "apache-2.0"),
        ("someone/else", None),
    ],
)
def test_licence_of_the_base_model(name, expected):
    assert find_origin(name) == {"base_model": name, **({"license": expected} if expected else {})}


@pytest.mark.parametrize(
    ("base", "notice", "said"),
    [
        ("Llama-2-7b-hf", "Llama 2 is licensed under the LLAMA 2 Community", ()),
        ("Meta-Llama-3-8B", "Meta Llama 3 is licensed", ("Built with Meta Llama 3.", 'to begin with "Llama 3"')),
        ("Llama-3.2-1B", "Llama 3.2 is licensed under the Llama 3.2", ("Built with Llama.", 'to begin with "Llama"')),
    ],
)
def test_each_llama_licence_asks_for_something_else(tmp_path, base, notice, said):
    write_model_card(tmp_path, LlamaBidirectionalConfig(name_or_path=f"meta-llama/{base}"), "me/Llama-r")
    assert (tmp_path / "NOTICE").read_text().startswith(notice)
    text = (tmp_path / "README.md").read_text()
    assert all(words in text for words in said)
    assert ("Built with" in text) == bool(said)


def test_base_model_is_carried_from_card_to_card(tmp_path):
    config = LlamaBidirectionalConfig(name_or_path="meta-llama/Llama-3.1-8B")
    write_model_card(tmp_path, config, "me/first")
    assert find_origin(str(tmp_path)) == {"base_model": "meta-llama/Llama-3.1-8B", "license": "llama3.1"}
    (tmp_path / "README.md").unlink()
    assert find_origin(str(tmp_path)) == find_origin("") == find_origin(None) == find_origin("/gone/away") == {}


def test_a_base_model_that_cannot_be_asked_does_not_stop_a_save(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("---\nlicense: [\n---\n")
    for name in ("gone/away", "no/such/id", str(tmp_path / "folder")):
        write_model_card(tmp_path, LlamaBidirectionalConfig(name_or_path=name), "me/reranker")
        assert "license" not in ModelCard.load(tmp_path / "README.md").data.to_dict()


def test_card_of_an_unknown_base_model_says_so(tmp_path):
    write_model_card(tmp_path, LlamaBidirectionalConfig(), "me/reranker")
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert "base_model" not in data
    assert "license" not in data

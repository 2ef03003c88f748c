"""The Hub on loopback: push and load, and code beside the checkpoint."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import PAIRS, lines, run_python, write
from hub_server import run_hub

from llama_bidir import CrossEncoder
from llama_bidir.checkpoints.export import export_reranker
from llama_bidir.checkpoints.hub import CODE

TWO_PAIRS = [("where do bees go?", "Honey bees navigate by the sun."), ("q", "Paris.")]


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
print(json.dumps([url, reranker.predict({TWO_PAIRS!r}).tolist()]))
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
print(json.dumps([reranker.predict({TWO_PAIRS!r}).tolist() for reranker in (by_name, by_auto)]))
""",
        tmp_path,
        HF_ENDPOINT=hub.endpoint,
    )
    assert json.loads(loaded) == [scores, scores]

    card = files["README.md"].decode()
    for block in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        assert "tester/tiny" in block
        assert run_python(block, tmp_path, HF_ENDPOINT=hub.endpoint).strip()


def test_a_refused_push_creates_no_repository(hub, graph_folder, tmp_path):
    (tmp_path / "bad.json").write_text("{}")
    refusals = run_python(
        f"""
from llama_bidir import CrossEncoder
for arguments, options in (({{"backend": "onnx"}}, {{}}), ({{}}, {{"evaluation": "bad.json"}})):
    try:
        CrossEncoder({str(graph_folder)!r}, **arguments).push_to_hub("tester/refused", **options)
    except (TypeError, ValueError) as error:
        print(f"{{type(error).__name__}}: {{error}}")
""",
        tmp_path,
        HF_ENDPOINT=hub.endpoint,
    ).splitlines()
    assert refusals[0].startswith("TypeError: an exported reranker (backend='onnx')")
    assert refusals[1].startswith("ValueError: bad.json: evaluation must be a file")
    assert hub.repos == {}


def test_a_push_that_fails_names_the_repository(hub, reranker_checkpoint, tmp_path):
    hub.failing["/commit/"] = 400  # the client tries again for the better part of a minute after 429 or 500
    printed = run_python(
        f"""
from llama_bidir import CrossEncoder
try:
    CrossEncoder({str(reranker_checkpoint)!r}).push_to_hub("tester/tiny")
except OSError as error:
    print(error)
""",
        tmp_path,
        HF_ENDPOINT=hub.endpoint,
    )
    assert printed.startswith("not pushed to 'tester/tiny', where nothing was committed: ")
    assert hub.commits == []
    assert not hub.repos.get("tester/tiny")


def test_a_download_that_fails_names_the_repository_and_leaves_nothing_half_written(hub, reranker_checkpoint, tmp_path):
    hub.repos["tester/ready"] = {path.name: path.read_bytes() for path in reranker_checkpoint.iterdir()}
    code = f"""
from llama_bidir import CrossEncoder
try:
    print(CrossEncoder("tester/ready").predict({TWO_PAIRS!r}).tolist())
except OSError as error:
    print("tester/ready" in str(error))
"""
    hub.failing["model.safetensors"] = 400
    assert run_python(code, tmp_path, HF_ENDPOINT=hub.endpoint) == "True\n"
    hub.failing.clear()
    scores = json.loads(run_python(code, tmp_path, HF_ENDPOINT=hub.endpoint))
    assert scores == CrossEncoder(reranker_checkpoint).predict(TWO_PAIRS).tolist()


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
texts = [reranker.config.prompt_template.format(query=query, passage=passage) for query, passage in {TWO_PAIRS!r}]
# With gradients, and so by the same kernels as without the package.
logits = [reranker.model(**reranker.tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
print(json.dumps([reranker.predict({TWO_PAIRS!r}, batch_size=1).tolist(), logits]))
""",
            tmp_path,
        )
    )
    assert {path.name for path in saved.glob("*.py")} == set(CODE)
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
texts = [model.config.prompt_template.format(query=query, passage=passage) for query, passage in {TWO_PAIRS!r}]
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
print(json.dumps([reranker.predict({TWO_PAIRS!r}, batch_size=1).tolist(), type(reranker.model).__module__]))
""",
            tmp_path,
        )
    )
    assert local == [scores, "llama_bidir.modeling_llama_bidir"]
    assert "auto_map" not in json.loads((tmp_path / "local" / "config.json").read_text())


def test_saved_with_code(tmp_path, tokenizer, model):
    CrossEncoder(model, tokenizer).save_pretrained(tmp_path, with_code=True)
    names = {path.name for path in tmp_path.iterdir()}
    parts = ("configuration", "files", "modeling", "pretrained", "weights")
    assert names >= set(CODE) == {f"{part}_llama_bidir.py" for part in parts}
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_llama_bidir.LlamaBidirectionalModel"


def test_the_code_in_the_card_of_a_hub_folder_runs_without_the_package(save, tmp_path):
    folder, scores = save(temperature=0.5)
    export_reranker(folder, tmp_path / "hub", format="hub")
    exported = CrossEncoder(tmp_path / "hub")
    np.testing.assert_allclose(exported.predict(PAIRS), scores, rtol=1e-6)
    [code] = re.findall(r"```python\n(.*?)```", (tmp_path / "hub" / "README.md").read_text(), flags=re.DOTALL)
    code += 'import sys\nassert "llama_bidir" not in sys.modules\nprint(model(**inputs).logits.item())\n'
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    pair = ("how do bees find their way?", "Honey bees navigate by the position of the sun.")
    np.testing.assert_allclose(float(result.stdout.split()[-1]), exported.predict(pair), rtol=1e-5)


def test_a_cached_checkpoint_loads_without_a_network(reranker_checkpoint, tmp_path):
    # As after `snapshot_download`, nobody has asked for modules.json, so that the cache cannot say that there is none.
    commit = "0" * 40
    repo = tmp_path / "models--you--cached"
    shutil.copytree(reranker_checkpoint, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    cached = CrossEncoder("you/cached", cache_folder=str(tmp_path))
    assert cached.predict(PAIRS).tolist() == CrossEncoder(reranker_checkpoint).predict(PAIRS).tolist()

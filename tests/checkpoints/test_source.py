"""A name that is no folder: the Hub is asked once, and whatever it answers is reported soon, with the name."""

import json

import pytest
from helpers import make_model, run_python
from hub_server import COMMIT, run_hub

from llama_bidir import CrossEncoder

NOWHERE = "http://127.0.0.1:9"  # nobody listens there

MISSING = "is not a checkpoint: there is no such folder, and"
# By name of the repository: the answer of the Hub (its status, 0 for none, and its error code), and the message.
ANSWERS = {
    "tester/missing": (None, f"{MISSING} {{hub}} has no such repository, or none that this token may read"),
    "tester/private": ((401, "RepoNotFound"), f"{MISSING} {{hub}} has no such repository, or none that this token may"),
    "tester/gated": ((401, "GatedRepo"), "is a gated repository: ask for access at {hub}/tester/gated, then log in"),
    "tester/denied": ((403, "GatedRepo"), "is a gated repository: ask for access at {hub}/tester/denied, then log in"),
    "tester/revision": ((404, "RevisionNotFound"), "has no revision None"),
    "tester/failing": ((500, None), f"{MISSING} {{hub}} cannot serve a repository now, try again later: "),
    "tester/busy": ((429, None), f"{MISSING} {{hub}} cannot serve a repository now, try again later: "),
    "tester/cut": ((0, None), f"{MISSING} {{hub}} cannot be reached: "),
}
# Loads names by each of our entry points, and prints the messages of each name.
LOAD = """
import json, sys
from llama_bidir import CrossEncoder
from llama_bidir.checkpoints.export import export_reranker
from llama_bidir.checkpoints.tokenizer import load_tokenizer
from llama_bidir.training import merge_adapter
loaders = [CrossEncoder, load_tokenizer, lambda name: CrossEncoder(name, backend="onnx"),
           lambda name: export_reranker(name, "out", format="hub"), lambda name: merge_adapter(name, "out")]
messages = {}
for name in sys.argv[1:] or NAMES:
    for load in loaders:
        try:
            load(name)
        except OSError as error:
            messages.setdefault(name, []).append(str(error))
print(json.dumps(messages))
"""


@pytest.fixture
def hub():
    with run_hub() as hub:
        yield hub


def messages_for(names, path, **environment):
    pytest.importorskip("accelerate")
    pytest.importorskip("onnxruntime")
    output = run_python(LOAD.replace("NAMES", repr(list(names))), path, **environment)
    return json.loads(output.splitlines()[-1])


def test_an_answer_of_the_hub_is_reported_with_the_name(hub, tmp_path):
    hub.faults = {name: answer for name, (answer, _) in ANSWERS.items() if answer is not None}
    messages = messages_for(ANSWERS, tmp_path, HF_ENDPOINT=hub.endpoint)
    for name, (_, message) in ANSWERS.items():
        expected = message.format(hub=hub.endpoint)
        assert len(messages[name]) == 5
        assert all(repr(name) in each and expected in each for each in messages[name]), messages[name]
        # Asked once by each entry point, without the retries that take minutes.
        requests = [request for request in hub.requests if name in request]
        assert requests == [f"/{name}/resolve/main/config.json"] * 5


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {"HF_ENDPOINT": NOWHERE},
            {
                "nomodel": f"'nomodel' {MISSING} {NOWHERE} cannot be reached: ",
                "tester/nomodel": f"'tester/nomodel' {MISSING} {NOWHERE} cannot be reached: ",
                "no model": f"'no model' {MISSING} it cannot be the id of a Hub repository: ",
                "./nomodel": "'./nomodel' is not a checkpoint: there is no such folder. Pass a folder",
            },
        ),
        ({"HF_HUB_OFFLINE": "1"}, {"nomodel": f"'nomodel' {MISSING} the cache holds no such repository"}),
    ],
)
def test_no_network_is_reported_with_the_name(environment, expected, tmp_path):
    messages = messages_for(expected, tmp_path, **environment)
    for name, message in expected.items():
        assert [each[: len(message)] for each in messages[name]] == [message] * 5


def test_every_verb_names_the_model_in_one_line(tmp_path):
    verbs = {
        "rerank": "--model nomodel --corpus c.jsonl --queries q.jsonl --run r.trec --output out",
        "mine": "--model nomodel --source rows.jsonl --output out.jsonl",
        "export": "--model nomodel --format hub --output out",
        "merge": "--adapter nomodel --output out",
        "train": "quickstart --model-name-or-path nomodel --train rows.jsonl --output-dir out",
        "quickstart": "--model nomodel --output out",
    }
    (tmp_path / "c.jsonl").write_text('{"_id": "d", "text": "t"}\n')
    (tmp_path / "q.jsonl").write_text('{"_id": "q", "text": "u"}\n')
    (tmp_path / "r.trec").write_text("q Q0 d 1 1.0 x\n")
    (tmp_path / "rows.jsonl").write_text('{"query": "q", "pos_doc": ["p"], "neg_doc": ["n"]}\n')
    code = f"""
import sys
from llama_bidir.cli import main
sys.stderr = sys.stdout
for verb, arguments in {verbs!r}.items():
    print(verb, main([verb, *arguments.split()]))
"""
    lines = run_python(code, tmp_path, HF_ENDPOINT=NOWHERE).splitlines()
    for verb in verbs:
        error = lines[lines.index(f"{verb} 2") - 1]
        assert error.startswith(f"llama-bidir: error: 'nomodel' {MISSING} {NOWHERE} cannot be reached: ")


def test_a_line_that_is_cut_while_weights_are_fetched_names_the_repository(hub, reranker_checkpoint, tmp_path):
    hub.repos["tester/cut"] = {path.name: path.read_bytes() for path in reranker_checkpoint.iterdir()}
    hub.faults["cut/resolve/main/model.safetensors"] = hub.faults[f"cut/resolve/{COMMIT}/model.safetensors"] = (0, None)
    code = """
from llama_bidir import CrossEncoder
try:
    CrossEncoder("tester/cut")
except OSError as error:
    print(error)
"""
    assert "tester/cut" in run_python(code, tmp_path, HF_ENDPOINT=hub.endpoint)


CACHED = ["tester/cached", "tester/failing", "tester/busy"]
SCORE = """
from llama_bidir import CrossEncoder
for name in NAMES:
    print(CrossEncoder(name).predict(("q", "p")))
"""


def score(names, path, **environment):
    """Loads repositories by name in one process, and returns the scores of each."""
    return run_python(SCORE.replace("NAMES", repr(names)), path, **environment).splitlines()


def test_a_cached_repository_loads_when_the_hub_does_not_answer(hub, reranker_checkpoint, tmp_path):
    for name in CACHED:
        hub.repos[name] = {path.name: path.read_bytes() for path in reranker_checkpoint.iterdir()}
    expected = score(CACHED, tmp_path, HF_ENDPOINT=hub.endpoint)
    assert expected == [str(CrossEncoder(reranker_checkpoint).predict(("q", "p")))] * 3
    assert score(CACHED[:1], tmp_path, HF_ENDPOINT=NOWHERE) == expected[:1]
    assert score(CACHED[:1], tmp_path, HF_ENDPOINT=NOWHERE, HF_HUB_OFFLINE="1") == expected[:1]
    hub.requests.clear()
    hub.faults = {"tester/failing": (500, None), "tester/busy": (429, None)}
    assert score(CACHED[1:], tmp_path, HF_ENDPOINT=hub.endpoint) == expected[1:]
    asked = [len([path for path in hub.requests if name in path]) for name in CACHED]
    assert asked == [0, 2, 2]  # one for the model, one for the tokenizer


def test_a_forced_download_is_made_once(hub, reranker_checkpoint, tmp_path):
    make_model().save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    for name, folder in (("tester/single", reranker_checkpoint), ("tester/sharded", tmp_path / "sharded")):
        hub.repos[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = f"""
from transformers import AutoModelForSequenceClassification
from llama_bidir import LlamaBidirectionalForSequenceClassification
for name in {list(hub.repos)!r}:
    for cls in (LlamaBidirectionalForSequenceClassification, AutoModelForSequenceClassification):
        cls.from_pretrained(name, force_download=True)
"""
    run_python(code, tmp_path, HF_ENDPOINT=hub.endpoint)
    weights = [file for files in hub.repos.values() for file in files if file.endswith((".safetensors", ".index.json"))]
    assert len(set(weights)) == len(weights) > 3
    assert {file: hub.downloads.count(file) for file in weights} == dict.fromkeys(weights, 2)  # one per class


BAD_REPOSITORIES = {
    "tester/pickle": (
        {"model.safetensors": None, "pytorch_model.bin": b"x"},
        "holds its weights as a pickle (pytorch_model.bin)",
    ),
    "tester/index": (
        {
            "model.safetensors": None,
            "model.safetensors.index.json": b'{"metadata": {}, "weight_map": {"a": "../../x.safetensors"}}',
        },
        "names a file outside of its folder, which is refused: '../../x.safetensors'",
    ),
    "tester/pointer": ({"model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "is a git-lfs pointer"),
    "tester/list": ({"config.json": b"[]"}, "must hold a JSON object, got list"),
    "tester/silent": ({"tokenizer.json": None}, "holds no tokenizer"),
}


def test_a_repository_is_checked_like_a_folder(hub, reranker_checkpoint, tmp_path):
    good = {path.name: path.read_bytes() for path in reranker_checkpoint.iterdir()}
    for name, (files, _) in BAD_REPOSITORIES.items():
        hub.repos[name] = {file: content for file, content in {**good, **files}.items() if content is not None}
    code = f"""
from llama_bidir import CrossEncoder
for name in {list(BAD_REPOSITORIES)!r}:
    try:
        CrossEncoder(name)
    except (OSError, ValueError) as error:
        print(" ".join(str(error).split()))
"""
    messages = run_python(code, tmp_path, HF_ENDPOINT=hub.endpoint).splitlines()
    for message, (name, (_, expected)) in zip(messages, BAD_REPOSITORIES.items(), strict=True):
        assert expected in message
        assert name in message or f"models--{name.replace('/', '--')}" in message

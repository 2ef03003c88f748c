"""Pages in docs/ name tests that exist, and the examples run. tests/cli/test_quickstart.py runs the pages' code."""

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROWS, lines, write_collection

from llama_bidir import CrossEncoder
from llama_bidir.data import load_rows
from llama_bidir.evaluation import Dataset, evaluate_reranker, read_corpus, read_queries, search_bm25, write_qrels
from llama_bidir.losses import LOSSES
from llama_bidir.training import read_history

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["reliability.md", "security.md"])
def test_the_test_of_each_promise_exists(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    tables = re.findall(r"^\|.*\| test \|\n\|[-|]+\|\n((?:\|.*\|\n)+)", text, flags=re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row.split("|")[-2])
        assert named, row
        for path, name in named:
            assert f"\ndef {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), (path, name)


def run_example(name, folder, *arguments, shorter=("", "")):
    script = (ROOT / "examples" / name).read_text(encoding="utf-8")
    assert shorter[0] in script
    (folder / name).write_text(script.replace(*shorter))
    result = subprocess.run(
        [sys.executable, name, *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_plain_trainer_of_the_example_trains(base_checkpoint, tmp_path):
    (tmp_path / "rows.jsonl").write_text(lines(*ROWS[:4]))
    shorter = ("max_steps=100", "max_steps=2")
    run_example("train_with_trainer.py", tmp_path, base_checkpoint, "rows.jsonl", "out", shorter=shorter)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["rerank_max_length"]) == ("llama_bidirec", 256)


@pytest.mark.slow
def test_the_example_of_distillation(base_checkpoint, reranker_checkpoint, tmp_path):
    (tmp_path / "rows.jsonl").write_text(lines(*ROWS[:4]))
    shorter = ("num_train_epochs=2", "max_steps=2")
    run_example("distil.py", tmp_path, reranker_checkpoint, base_checkpoint, "rows.jsonl", "small", shorter=shorter)
    teacher = CrossEncoder(reranker_checkpoint)
    for row in load_rows(tmp_path / "small-rows.jsonl.gz"):
        pairs = [(row["query"], passage) for passage in row["neg_doc"]]
        assert teacher.predict(pairs).tolist() == pytest.approx(row["neg_score"], rel=1e-5)
    history = read_history(tmp_path / "small" / "history.jsonl")
    assert history[-1]["step"] == 2


@pytest.mark.slow
def test_the_example_of_reranking(reranker_checkpoint, tmp_path):
    corpus = read_corpus(write_collection(tmp_path).corpus)
    (tmp_path / "qrels").mkdir()
    qrels = {f"q{number}": {f"d{number}": 1} for number in range(12)}
    write_qrels(tmp_path / "qrels" / "test.tsv", qrels)
    printed = run_example("rerank_beir.py", tmp_path, reranker_checkpoint, tmp_path)
    queries = read_queries(tmp_path / "queries.jsonl", qrels, tmp_path / "qrels" / "test.tsv")
    dataset = Dataset(corpus, queries, qrels, search_bm25(corpus, queries, 50))
    expected = evaluate_reranker(CrossEncoder(reranker_checkpoint), dataset, depth=50)
    for measure, value in expected.after.aggregated.items():
        (line,) = [line for line in printed.splitlines() if line.startswith(measure)]
        assert line.split()[1:3] == [f"{expected.before.aggregated[measure]:.4f}", f"{value:.4f}"]


def test_the_migration_page_names_every_loss():
    losses = pytest.importorskip("sentence_transformers.cross_encoder.losses")
    text = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| loss \| here \|\n\|[-|]+\|\n((?:\|.*\|\n)+)", text, flags=re.MULTILINE)
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines()]
    named = {name for row in rows for name in row}
    assert named == {name for name in losses.__all__ if name.endswith("Loss")}
    ours = [re.match(r" `(\w+)`", row.split("|")[2]) for row in table.splitlines()]
    assert {match[1] for match in ours if match} <= LOSSES.keys()
    assert sum(match is None for match in ours) == 1  # those without an equivalent


@pytest.mark.parametrize("module", ["", ".data", ".evaluation", ".training", ".jobs.rerank", ".jobs.mining"])
def test_every_public_name_is_documented(module):
    room = importlib.import_module(f"llama_bidir{module}")
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert f"::: llama_bidir{module}\n" in reference
    for name in room.__all__:
        documented = getattr(room, name)
        if isinstance(documented, type) or callable(documented):
            assert inspect.getdoc(documented), name
            # A class that says nothing of its own would show the text of its parent.
            assert not isinstance(documented, type) or documented.__doc__, name

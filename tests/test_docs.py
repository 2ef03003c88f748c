"""Pages in docs/ name tests that exist, and the examples run. tests/cli/test_quickstart.py runs the pages' code."""

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROWS

from llama_bidir.losses import LOSSES

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


def test_the_plain_trainer_of_the_example_trains(base_checkpoint, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    script = (ROOT / "examples" / "train_with_trainer.py").read_text(encoding="utf-8")
    (tmp_path / "short.py").write_text(script.replace("max_steps=100", "max_steps=2"))
    command = [sys.executable, "short.py", str(base_checkpoint), str(rows), "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["rerank_max_length"]) == ("llama_bidirec", 256)


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

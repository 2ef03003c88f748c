"""The quickstart learns, and what the README and the pages in docs/ show afterwards runs and prints what they say."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import lines, run_python
from hub_server import run_hub

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("bm25s")
pytest.importorskip("matplotlib")

from llama_bidir import CrossEncoder
from llama_bidir.cli.quickstart.collection import make_collection
from llama_bidir.cli.quickstart.steps import run_quickstart
from llama_bidir.data import parse_row

FILES = {"corpus.jsonl", "queries.jsonl", "qrels.tsv", "run.bm25.trec", "run.before.trec", "run.after.trec"}
ROOT = Path(__file__).parents[2]


class QuickstartOutput(NamedTuple):
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def quickstart_output(tmp_path_factory: pytest.TempPathFactory) -> QuickstartOutput:
    """The folder and the output of `llama-bidir quickstart`, which runs once (about 90 seconds)."""
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    command = [sys.executable, "-m", "llama_bidir", "quickstart", "--output", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return QuickstartOutput(folder, result.stdout)


def test_the_collection_is_seeded_and_no_test_person_is_in_the_training_rows():
    train, test = make_collection(num_train_people=12, num_test_people=6, seed=1)
    assert make_collection(num_train_people=12, num_test_people=6, seed=1) == (train, test)
    assert make_collection(num_train_people=12, num_test_people=6, seed=2) != (train, test)
    assert (len(train), len(test)) == (120, 60)
    train_text = json.dumps(train)
    for row in test:
        parsed = parse_row(row, "row")
        (name,) = re.findall(r"[A-Z][a-z]{4} [A-Z][a-z]{4}", parsed.query)
        assert name not in train_text
        assert parsed.positives[0] not in parsed.negatives
        words = set(parsed.query.strip("?").lower().split())
        assert any(len(words & set(negative.lower().split())) >= 3 for negative in parsed.negatives)


@pytest.mark.slow
def test_quickstart_learns_to_rank_held_out_questions(quickstart_output):
    output, printed = quickstart_output
    ndcg = {
        name: float(line[22:].split()[0])
        for line in printed.splitlines()
        for name in ("random order", "BM25", "before fine-tuning", "after fine-tuning")
        if line.startswith(f"{name:<22}")
    }
    assert ndcg["after fine-tuning"] >= 0.90
    assert ndcg["after fine-tuning"] > ndcg["BM25"] > ndcg["random order"]
    assert {path.name for path in output.iterdir()} >= FILES | {"ndcg.png", "train.jsonl", "model", "base"}
    assert (output / "ndcg.png").read_bytes().startswith(b"\x89PNG")
    assert printed.count("  *") >= 2
    assert f'CrossEncoder("{output}/model")' in (output / "model" / "README.md").read_text()
    queries = [json.loads(line) for line in (output / "queries.jsonl").read_text().splitlines()]
    corpus = {row["_id"]: row["text"] for row in map(json.loads, (output / "corpus.jsonl").read_text().splitlines())}
    run = [line.split() for line in (output / "run.after.trec").read_text().splitlines()]
    first = [line for line in run if line[0] == queries[0]["_id"]]
    scores = CrossEncoder(output / "model").predict([(queries[0]["text"], corpus[line[2]]) for line in first])
    assert scores.tolist() == pytest.approx([float(line[4]) for line in first], rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_every_block_of_the_readme_prints_what_it_says(quickstart_output, tmp_path):
    (tmp_path / "quickstart-output").symlink_to(quickstart_output.folder)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", readme, flags=re.DOTALL)
    assert len(blocks) == 4
    with run_hub() as hub:
        for code, expected in blocks:
            printed = run_python(code, tmp_path, HF_ENDPOINT=hub.endpoint)
            if expected:
                # Scores differ slightly between machines, and the ranking does not.
                numbers = r"-?\d+\.\d+"
                assert re.sub(numbers, "#", printed) == re.sub(numbers, "#", expected)
        assert "model.safetensors" in hub.repos["you/my-reranker"]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "num_blocks"), [("scoring.md", 6), ("training.md", 1)])
def test_a_page_prints_what_it_says(page, num_blocks, quickstart_output, tmp_path):
    """Each page is one script, from top to bottom."""
    pytest.importorskip("torchao")
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, flags=re.DOTALL)
    assert len(code) == text.count("```python") == num_blocks
    shutil.copytree(quickstart_output.folder, tmp_path / "quickstart-output")
    commands = re.findall(r"^llama-bidir (calibrate .*)$", text, flags=re.MULTILINE)
    assert len(commands) == (page == "scoring.md")
    for command in commands:
        subprocess.run([sys.executable, "-m", "llama_bidir", *command.split()], cwd=tmp_path, check=True)
    printed = run_python("\n".join(block for block, _ in code), tmp_path)
    expected = "".join(output for _, output in code)
    assert printed.endswith(expected) if "trainer" in text else printed == expected


def test_quickstart_with_a_given_model_and_file(base_checkpoint, tmp_path):
    train, _ = make_collection(num_train_people=6, num_test_people=5)
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(*train))
    said = []
    result = run_quickstart(
        tmp_path / "out",
        model=str(base_checkpoint),
        train_file=path,
        training={"max_steps": 2, "disable_tqdm": True},
        echo=said.append,
    )
    assert said[0] == "54 training questions; 6 held-out questions with 11 candidate passages each"
    assert list(result.scores) == ["random order", "BM25", "before fine-tuning", "after fine-tuning"]
    assert not (tmp_path / "out" / "base").exists()
    assert CrossEncoder(tmp_path / "out" / "model").config.hidden_size == 32


@pytest.mark.parametrize(
    ("num_rows", "negatives", "message"),
    [
        (9, ["b"], "there must be at least 10 rows, because a tenth is held out; got 9"),
        (10, [], "the row of query 'q' must have a neg_doc"),
    ],
)
def test_a_file_that_cannot_be_split_is_refused(num_rows, negatives, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(*[{"query": "q", "pos_doc": ["a"], "neg_doc": negatives}] * num_rows))
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}$"):
        run_quickstart(tmp_path / "out", train_file=path)
    assert not (tmp_path / "out").exists()

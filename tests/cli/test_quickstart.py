import json
import re

import pytest
from helpers import lines

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("bm25s")
pytest.importorskip("matplotlib")

from llama_bidir import CrossEncoder
from llama_bidir.cli.quickstart.collection import make_collection
from llama_bidir.cli.quickstart.steps import run_quickstart
from llama_bidir.data import parse_row

FILES = {"corpus.jsonl", "queries.jsonl", "qrels.tsv", "run.bm25.trec", "run.before.trec", "run.after.trec"}


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

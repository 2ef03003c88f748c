"""Rows of FlagEmbedding and sentence-transformers: read as they are, trained, mined, and named in errors."""

import json

import numpy as np
import pytest
from helpers import make_model, make_tokenizer

from llama_bidir import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from llama_bidir.data import TrainingRow, load_rows, parse_row
from llama_bidir.jobs.mining import mine_file, mine_negatives

ROW = TrainingRow("q", ["a", "b"], ["c"])
CASES = {
    "FlagEmbedding": ({"query": "q", "pos": ["a", "b"], "neg": ["c"], "type": "normal"}, ROW),
    "FlagEmbedding with scores and a prompt": (
        {
            "query": "q",
            "pos": ["a", "b"],
            "neg": ["c"],
            "pos_scores": [3, 2.5],
            "neg_scores": [-1],
            "prompt": "Find it.",
        },
        TrainingRow("q", ["a", "b"], ["c"], [3.0, 2.5], [-1.0], None, "Find it."),
    ),
    "FlagEmbedding without scores": (
        {"query": "q", "pos": ["a", "b"], "neg": ["c"], "pos_scores": None, "neg_scores": None, "prompt": ""},
        ROW,
    ),
    "a triplet": ({"anchor": "q", "positive": "a", "negative": "c"}, TrainingRow("q", ["a"], ["c"])),
    "a triplet of a question": ({"query": "q", "answer": "a", "negative": "c"}, TrainingRow("q", ["a"], ["c"])),
    "many negatives": (
        {"query": "q", "positive": "a", "negative_10": "e", "negative_2": "d", "negative_1": "c", "negative_3": None},
        TrainingRow("q", ["a"], ["c", "d", "e"]),
    ),
    "a pair": ({"question": "q", "positive": "a"}, TrainingRow("q", ["a"], [])),
    "a list of negatives": (
        {"query": "q", "positive": ["a", "b"], "negatives": ["c"]},
        TrainingRow("q", ["a", "b"], ["c"]),
    ),
    "labels of numpy": (
        {"query": "q", "docs": ["a", "c", "b"], "labels": [np.int64(1), np.float32(0), np.int64(1)]},
        ROW,
    ),
    "an empty instruction of our own": (
        {"anchor": "q", "positive": "a", "instruction": ""},
        TrainingRow("q", ["a"], [], instruction=""),
    ),
    "labels": ({"query": "q", "docs": ["a", "c", "b"], "labels": [1, 0, True]}, TrainingRow("q", ["a", "b"], ["c"])),
    "graded labels": (
        {"query": "q", "docs": ["a", "c", "b"], "labels": [3, 0, 0.5]},
        TrainingRow("q", ["a", "b"], ["c"], None, None, [3.0, 0.5]),
    ),
    "arrays": (
        {"query": "q", "docs": np.array(["a", "c", "b"], dtype=object), "labels": np.array([1, 0, 1])},
        TrainingRow("q", ["a", "b"], ["c"]),
    ),
    # Ours win, and other fields are ignored as ever.
    "our own": ({"query": "q", "pos_doc": ["a", "b"], "neg_doc": ["c"], "pos": "noun", "prompt": "x", "label": 1}, ROW),
}


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_read_as_it_is(name):
    given, expected = CASES[name]
    before = dict(given)
    assert parse_row(given, "row") == expected
    assert given == before


def test_a_file_of_such_rows_is_loaded(tmp_path):
    rows = [given for name, (given, _) in CASES.items() if "numpy" not in name and name != "arrays"]
    expected = [row for name, (_, row) in CASES.items() if "numpy" not in name and name != "arrays"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_rows(path)
    assert [TrainingRow(*row.values()) for row in loaded] == expected


def test_negatives_that_are_the_query_are_left_out_of_such_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"query": "the query", "pos": ["a"], "neg": ["the  query", "c"]}) + "\n")
    assert load_rows(path)["neg_doc"][:] == [["c"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "pos": [5]}, r"rows\.jsonl:1: pos\[0\] must be a string or an object with a text"),
        ({"query": "q", "pos": []}, r"rows\.jsonl:1: pos must hold at least one passage"),
        ({"query": "q", "pos": ["a"], "neg": [None]}, r"rows\.jsonl:1: neg\[0\] must be a string"),
        (
            {"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1, 2]},
            "pos_scores must hold one number for each of",
        ),
        ({"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": ["x"]}, r"pos_scores\[0\] must be a finite number"),
        (
            {"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1]},
            "neg_score is missing although pos_scores is given",
        ),
        ({"query": "q", "pos": ["a"], "prompt": 5}, "prompt must be a string, got int 5"),
        ({"query": "q", "docs": ["a"], "labels": [1, 0]}, "docs and labels must be lists of the same length"),
        ({"query": "q", "docs": "ab", "labels": [1, 0]}, "docs and labels must be lists of the same length"),
        (
            {"query": "q", "docs": ["a", "b"], "labels": [1, -1]},
            r"labels\[1\] must be a number of at least 0, the relevance",
        ),
        ({"query": "q", "docs": ["a", "b"], "labels": [1, None]}, r"labels\[1\] must be a number of at least 0"),
        ({"query": "q", "docs": ["a", "b"], "labels": [0, 0]}, "labels must mark at least one of docs as relevant"),
        ({"query": "q", "docs": ["a", 5], "labels": [0, 1]}, r"docs\[1\] must be a string or an object with a text"),
        ({"query": "q", "docs": ["a"], "labels": [10**400]}, r"labels\[0\] must be a number of at least 0"),
        ({"query": "q", "positive": "a", "label": 1}, "a row with positive and label is a single pair"),
        ({"query": "q", "positive": "a", "labels": 0}, "a row with positive and labels is a single pair"),
        ({"query": "q", "positive": "a", "score": 0.0}, "a row with positive and score is a single pair"),
        (
            {"query": "q", "positive": "a", "negative": "b", "scores": [1, 2]},
            "scores beside positive and negative is not",
        ),
        ({"question": "q", "answer": "a"}, "pos_doc is missing"),  # a short answer is no passage
        ({"query": "q", "pos": ["a"], "prompt": 0}, "prompt must be a string, got int 0"),
        ({"anchor": 5, "positive": "a"}, r"query \(or question\) must be a string, got int 5"),
    ],
)
def test_an_error_names_the_field_of_the_file(row, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        load_rows(path)


@pytest.fixture
def reranker():
    return CrossEncoder(make_model(rerank_max_length=64), make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"))


def test_such_rows_are_mined(reranker, tmp_path):
    reranker.save_pretrained(tmp_path / "teacher")
    row = {"query": "bees", "pos": ["home", "hive"], "neg": ["the sea", "a king", "France"], "prompt": None, "id": 7}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    mine_file(str(tmp_path / "teacher"), path, tmp_path / "mined.jsonl", keep_empty=True, show_progress_bar=False)
    (written,) = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert written["pos_doc"] == ["home", "hive"]
    assert written["id"] == 7
    assert set(written["neg_doc"]) <= {"the sea", "a king", "France"}
    assert "neg" not in written
    assert len(written["pos_score"]) == 2
    (mined,) = mine_negatives(reranker, [row])
    assert mined.fields == written


def test_such_rows_are_trained(reranker, tmp_path):
    rows = [CASES["FlagEmbedding"][0], CASES["many negatives"][0], CASES["graded labels"][0]]
    trainer = CrossEncoderTrainer(
        reranker.model,
        CrossEncoderTrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none", max_steps=1),
        rows,
        processing_class=reranker.tokenizer,
        group_size=3,
        positives="all",
    )
    assert [group["labels"] for group in map(trainer.train_dataset.__getitem__, range(3))] == [
        [1.0, 1.0, 0.0],
        [1.0, 0.0, 0.0],
        [3.0, 0.5, 0.0],
    ]
    trainer.train()

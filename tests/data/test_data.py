import re

import numpy as np
import pytest
import torch

from llama_bidir.data import TrainingRow, parse_row


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "pos_doc": "p", "neg_doc": ["n"]},
        {"question": "q", "pos_doc": ["p"], "neg_doc": "n"},
        {"query": None, "question": "q", "pos_doc": ("p",), "neg_doc": ["n"], "pos_score": None},
        {"query": "q", "pos_doc": [{"text": "p"}], "neg_doc": [{"text": "n", "id": 3, "image": ""}], "other": 1},
        {"query": np.str_("q"), "pos_doc": {"text": "p", "image": None}, "neg_doc": np.array(["n"])},
        {"query": "q", "pos_doc": np.array([{"text": "p"}]), "neg_doc": np.array(["n"], dtype=object)},
    ],
)
def test_every_form_of_a_row(row):
    assert parse_row(row, "here") == TrainingRow("q", ["p"], ["n"])


@pytest.mark.parametrize(
    ("pos_doc", "pos_score", "neg_doc", "neg_score", "scores"),
    [
        ("p", 2, ["n", "m"], [0.5, -1], ([2.0], [0.5, -1.0])),
        ("p", [2], "n", 0.5, ([2.0], [0.5])),
        ({"text": "p"}, np.float32(0.25), ["n"], np.array([0.5], dtype=np.float32), ([0.25], [0.5])),
        (["p", "o"], torch.tensor([1.0, 2.0]), ["n"], [np.int64(3)], ([1.0, 2.0], [3.0])),
        ("p", 2, None, None, ([2.0], [])),
        ("p", None, [], [], (None, None)),
        ("p", None, "n", None, (None, None)),
    ],
)
def test_teacher_scores_are_aligned_with_the_passages(pos_doc, pos_score, neg_doc, neg_score, scores):
    fields = {"pos_doc": pos_doc, "pos_score": pos_score, "neg_doc": neg_doc, "neg_score": neg_score}
    row = parse_row({"query": "q", **fields}, "here")
    assert (row.positive_scores, row.negative_scores) == scores


@pytest.mark.parametrize(
    ("pos_doc", "given", "relevance"),
    [
        ("p", 3, [3.0]),
        (["p", "o"], [0.5, 2], [0.5, 2.0]),
        (["p", "o"], (2, None), [2.0, 1.0]),
        (["p", "o"], np.array([2, 1]), [2.0, 1.0]),
        (["p", "o"], None, None),
    ],
)
def test_relevance_is_aligned_with_the_positives(pos_doc, given, relevance):
    assert parse_row({"query": "q", "pos_doc": pos_doc, "pos_relevance": given}, "here").relevance == relevance


def test_negatives_are_optional():
    assert parse_row({"query": "q", "pos_doc": "p"}, "here").negatives == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "a row must be an object with query, pos_doc and neg_doc, got list []"),
        ({"pos_doc": "p"}, "query (or question) must be a string, got NoneType None"),
        ({"query": 5, "pos_doc": "p"}, "query (or question) must be a string, got int 5"),
        ({"query": "q"}, "pos_doc is missing; it must be a passage or a list of passages"),
        ({"query": "q", "pos_doc": []}, "pos_doc must hold at least one passage, got list []"),
        ({"query": "q", "pos_doc": 4}, "pos_doc must be a string or an object with a text, got int 4"),
        (
            {"query": "q", "pos_doc": "p", "neg_doc": ["n", None]},
            "neg_doc[1] must be a string or an object with a text, got NoneType None",
        ),
        (
            {"query": "q", "pos_doc": "p", "neg_doc": [{"id": 1}]},
            "neg_doc[0] must be a string or an object with a text, got dict {'id': 1}",
        ),
        (
            {"query": "q", "pos_doc": {"text": "", "image": "page.png"}},
            "pos_doc has an image and no text: images are not supported, give the passage a text",
        ),
        (
            {"query": "q", "pos_doc": ["p", {"image": np.zeros(2)}]},
            "pos_doc[1] has an image and no text: images are not supported, give the passage a text",
        ),
        (
            {"query": "q", "pos_doc": "p", "neg_doc": ["\ud800"]},
            "neg_doc[0] must be Unicode text without lone surrogates: 'utf-8' codec can't encode character '\\ud800' "
            "in position 0: surrogates not allowed",
        ),
        (
            {"query": "q", "pos_doc": "p", "neg_doc": "n", "pos_score": 1.0},
            "neg_score is missing although pos_score is given; teacher scores must cover pos_doc and neg_doc",
        ),
        (
            {"query": "q", "pos_doc": "p", "neg_doc": "n", "neg_score": 1.0},
            "pos_score is missing although neg_score is given; teacher scores must cover pos_doc and neg_doc",
        ),
        (
            {"query": "q", "pos_doc": ["p"], "pos_score": 1.0},
            "pos_score must be a list, as pos_doc is one, got float 1.0",
        ),
        (
            {"query": "q", "pos_doc": ["p", "o"], "pos_score": [1.0]},
            "pos_score must hold one number for each of the 2 passages of pos_doc, got 1",
        ),
        (
            {"query": "q", "pos_doc": "p", "pos_score": 1, "neg_score": [1]},
            "neg_score must hold one number for each of the 0 passages of neg_doc, got 1",
        ),
        ({"query": "q", "pos_doc": "p", "pos_score": True}, "pos_score must be a finite number, got bool True"),
        (
            {"query": "q", "pos_doc": ["p", "o"], "pos_relevance": [1, 0]},
            "pos_relevance[1] must be a number above 0, got 0: a passage that is not relevant is a neg_doc",
        ),
        (
            {"query": "q", "pos_doc": "p", "pos_relevance": -1.5},
            "pos_relevance must be a number above 0, got -1.5: a passage that is not relevant is a neg_doc",
        ),
        ({"query": "q", "pos_doc": "p", "pos_relevance": "2"}, "pos_relevance must be a finite number, got str '2'"),
        (
            {"query": "q", "pos_doc": ["p", "o"], "pos_relevance": [2]},
            "pos_relevance must hold one number for each of the 2 passages of pos_doc, got 1",
        ),
        ({"query": "q", "pos_doc": "p", "pos_score": "1"}, "pos_score must be a finite number, got str '1'"),
        (
            {"query": "q", "pos_doc": "p", "pos_score": [float("nan")]},
            "pos_score[0] must be a finite number, got float nan",
        ),
        (
            {"query": "q", "pos_doc": "p", "pos_score": -float("inf")},
            "pos_score must be a finite number, got float -inf",
        ),
        (
            {"query": "q", "pos_doc": ["p", "o"], "pos_score": [1, None]},
            "pos_score[1] must be a finite number, got NoneType None",
        ),
        (
            {"query": "q", "pos_doc": "p", "pos_score": 10**400},
            f"pos_score must be a finite number, got int 1{'0' * 56}...",
        ),
    ],
)
def test_malformed_rows_are_named(row, message):
    with pytest.raises(ValueError, match=f"^f:3: {re.escape(message)}$"):
        parse_row(row, "f:3")

import gzip
import json

import pytest
import torch

from llama_bidir.data import GroupCollator, load_rows, parse_row
from llama_bidir.prompts import PromptEncoder

ROW = {"query": "q", "pos_doc": ["p"], "neg_doc": ["n1", "n2"]}


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "pos_doc": "p", "neg_doc": ["n"]},
        {"question": "q", "pos_doc": ["p"], "neg_doc": "n"},
        {"query": None, "question": "q", "pos_doc": ["p"], "neg_doc": ["n"]},
        {"query": "q", "pos_doc": [{"text": "p"}], "neg_doc": [{"text": "n", "id": 3}], "other": 1},
    ],
)
def test_every_form_of_a_row(row):
    assert parse_row(row, "here") == ("q", ["p"], ["n"])


def test_negatives_are_optional():
    assert parse_row({"query": "q", "pos_doc": "p"}, "here").negatives == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], r"f:3: a row must be an object with query, pos_doc and neg_doc, got list"),
        ({"pos_doc": "p"}, r"f:3: query \(or question\) must be a string, got NoneType None"),
        ({"query": 5, "pos_doc": "p"}, r"f:3: query .* got int 5"),
        ({"query": "q"}, r"f:3: pos_doc is missing; it must be a passage or a list"),
        ({"query": "q", "pos_doc": []}, r"f:3: pos_doc must hold at least one passage"),
        ({"query": "q", "pos_doc": 4}, r"f:3: pos_doc must be a string or a list of passages, got int 4"),
        ({"query": "q", "pos_doc": "p", "neg_doc": ["n", None]}, r"f:3: neg_doc\[1\] must be a string .* got NoneType"),
        ({"query": "q", "pos_doc": "p", "neg_doc": [{"id": 1}]}, r"f:3: neg_doc\[0\] must be a string or an object"),
    ],
)
def test_malformed_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        parse_row(row, "f:3")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_are_read_from_jsonl(name, tmp_path):
    content = "".join(json.dumps({**ROW, "query": query}) + "\n\n" for query in ("q1", "q2"))
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write(content)
    dataset = load_rows(tmp_path / name)
    assert dataset["query"][:] == ["q1", "q2"]
    assert dataset[0] == {"query": "q1", "pos_doc": ["p"], "neg_doc": ["n1", "n2"]}


def test_malformed_files_are_named_with_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + '\n{"query": \n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: a line must be one JSON object"):
        load_rows(path)
    path.write_text(json.dumps(ROW) + '\n{"query": "q"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: pos_doc"):
        load_rows(path)
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"query": "\xff"}\n')
    with pytest.raises(ValueError, match=r"must be whole UTF-8 text"):
        load_rows(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="the file has no rows"):
        load_rows(path)
    whole = gzip.compress(json.dumps(ROW).encode() * 500)
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"torn\.jsonl\.gz:1: the file must be whole"):
        load_rows(tmp_path / "torn.jsonl.gz")
    (tmp_path / "torn.jsonl.gz").write_bytes(whole[:20] + b"\xff" * 20 + whole[40:])
    with pytest.raises(ValueError, match=r"torn\.jsonl\.gz:1: the file must be whole"):
        load_rows(tmp_path / "torn.jsonl.gz")
    with pytest.raises(ValueError, match=r"from a \.jsonl or \.jsonl\.gz file, got 'rows\.csv'"):
        load_rows("rows.csv")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*gone\.jsonl"):
        load_rows(tmp_path / "gone.jsonl")


def test_groups_become_exact_tensors(tokenizer):
    encoder = PromptEncoder(tokenizer, prompt_template="{query}>{passage}", max_length=64)
    tokenizer.padding_side = "right"
    rows = [
        {"query": "q", "pos_doc": ["p", "unused"], "neg_doc": ["a", "b", "c"]},
        {"query": "z", "pos_doc": ["yy"], "neg_doc": ["x"]},
    ]
    batch = GroupCollator(encoder, group_size=3)(rows)
    texts = [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert texts == ["q>p", "q>a", "q>b", "z>yy", "z>x"]
    assert torch.equal(batch["labels"], torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, -100.0]]))
    assert batch["input_ids"].shape == (5, 4)


def test_truncation_is_said_once(tokenizer, caplog):
    collator = GroupCollator(PromptEncoder(tokenizer, prompt_template="{query}>{passage}", max_length=8), group_size=2)
    for _ in range(2):
        collator([{"query": "q", "pos_doc": "p" * 20, "neg_doc": "n"}])
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "1 of the 2 pairs of a batch were longer than 8 tokens and were cut to fit"
    ]


def test_groups_without_negatives_are_refused_unless_they_are_of_one(tokenizer):
    encoder = PromptEncoder(tokenizer, prompt_template="{query}>{passage}", max_length=64)
    rows = [{"query": "q", "pos_doc": "p"}]
    with pytest.raises(ValueError, match="the row of query 'q' has no neg_doc: groups of 2 need some"):
        GroupCollator(encoder, group_size=2)(rows)
    assert GroupCollator(encoder, group_size=1)(rows)["labels"].tolist() == [[1.0]]

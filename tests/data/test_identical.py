"""Documents that are the query itself, as in ArguAna and Quora, are no negatives of it."""

import json
import logging

import numpy as np
import pytest
from helpers import lines, write

from llama_bidir.data import load_rows, parse_source
from llama_bidir.data.corpus import open_corpus
from llama_bidir.data.identical import drop_own_ids, find_identical, is_same_text

datasets = pytest.importorskip("datasets")

CORPUS = [
    {"_id": "arg-1", "title": "Zoos", "text": "Zoos protect animals."},
    {"_id": "arg-2", "title": "", "text": "Zoos harm animals."},
    {"_id": "x", "title": "Zoos", "text": "We should   ban zoos.\n"},
    {"_id": "y", "title": "We should", "text": "ban zoos."},
    {"_id": "1", "title": "", "text": "An unrelated document."},
    {"_id": "z", "title": "", "text": "So we should ban zoos."},
]
QUERIES = [
    {"_id": "arg-1", "text": "Animals are protected by zoos."},  # its own document has its identifier
    {"_id": "q", "text": "We should ban zoos."},  # x and y have its text, without and with their title
    {"_id": "1", "text": "What is related?"},  # a number, by chance
    {"_id": "arg-2", "text": "Zoos harm animals."},  # a judgement says that its own document is relevant
]
QRELS = "query-id\tcorpus-id\tscore\narg-1\targ-2\t1\nq\targ-2\t1\n1\targ-1\t1\narg-2\targ-2\t1\n"
RUN = "".join(
    f"{query['_id']} Q0 {document['_id']} {rank} {-rank} t\n"
    for query in QUERIES
    for rank, document in enumerate(CORPUS, 1)
)
TEXTS = {document["_id"]: f"{document['title']} {document['text']}".strip(" ") for document in CORPUS}
WARNING = "negatives that are the query itself, by identifier or text; ignore_identical_ids=False"
KEEPS = f"{WARNING} (--no-ignore-identical-ids) keeps them"


@pytest.fixture
def beir(folder):
    write(folder / "beir" / "corpus.jsonl", lines(*CORPUS))
    write(folder / "beir" / "queries.jsonl", lines(*QUERIES))
    write(folder / "beir" / "qrels.tsv", QRELS)
    write(folder / "beir" / "run.trec", RUN)
    return folder / "beir"


def negatives(rows):
    return {row["query"]: row["neg_doc"] for row in rows}


def expected(query, *without):
    return {query: [text for doc_id, text in TEXTS.items() if doc_id not in without]}


def test_negatives_of_a_beir_folder(beir, load, caplog):
    rows = load("beir")
    assert negatives(rows) == {
        **expected(QUERIES[0]["text"], "arg-1", "arg-2"),
        **expected(QUERIES[1]["text"], "x", "y", "arg-2"),
        **expected(QUERIES[2]["text"], "arg-1"),
        **expected(QUERIES[3]["text"], "arg-2"),
    }
    assert [row["pos_doc"] for row in rows] == [[TEXTS[name]] for name in ("arg-2", "arg-2", "arg-1", "arg-2")]
    assert caplog.messages == [f"beir: left out 3 {KEEPS}"]
    assert load("beir")[:] == rows[:]
    assert caplog.messages[1:] == caplog.messages[:1]  # also where the rows are in the cache


def test_they_are_kept_when_asked_and_do_not_count_for_the_depth(beir, load, caplog):
    kept = {
        **expected(QUERIES[0]["text"], "arg-2"),
        **expected(QUERIES[1]["text"], "arg-2"),
        **expected(QUERIES[2]["text"], "arg-1"),
        **expected(QUERIES[3]["text"], "arg-2"),
    }
    source = {"path": "beir", "ignore_identical_ids": False}
    assert negatives(load(source)) == negatives(load("beir", ignore_identical_ids=False)) == kept
    assert negatives(load(parse_source({**source, "weight": 2}))) == kept
    assert caplog.messages == []
    shallow = negatives(load({"path": "beir", "depth": 2}))
    assert shallow[QUERIES[0]["text"]] == [TEXTS["x"]]  # arg-2 is its positive
    with pytest.raises(ValueError, match=r"^rows: ignore_identical_ids must be true or false, got str 'no'$"):
        parse_source({**source, "ignore_identical_ids": "no"}, "rows")


def test_rows_of_json_lines_lose_them_with_their_scores(folder, load, caplog):
    rows = [
        {"query": "A  b", "pos_doc": "p", "neg_doc": ["c", " A b\n", "a b"], "pos_score": 1, "neg_score": [2, 3, 4]},
        {
            "query_id": "q",
            "query": "A",
            "pos_doc": "p",
            "neg_doc": [{"id": "q", "text": "c"}, {"_id": "r", "text": "d"}],
        },
        {"query_id": 7, "query": "A", "pos_doc": "A", "neg_doc": {"id": "7", "text": "c"}},
        {"query": "", "pos_doc": "p", "neg_doc": ["", "n"]},
    ]
    write(folder / "rows.jsonl", lines(*rows))
    loaded = load("rows.jsonl")
    assert [row["neg_doc"] for row in loaded] == [["c", "a b"], ["d"], ["c"], ["", "n"]]
    assert loaded[0]["neg_score"] == [2.0, 4.0]
    assert loaded[2]["pos_doc"] == ["A"]
    assert caplog.messages == [f"rows.jsonl: left out 2 {KEEPS}"]
    assert load("rows.jsonl", ignore_identical_ids=False)[0]["neg_doc"] == ["c", " A b\n", "a b"]


@pytest.mark.parametrize("layout", ["jsonl", "parquet"])
def test_rows_that_name_documents_of_a_corpus(layout, folder, load, caplog):
    ids, texts = ["a", "b", "7", "d"], ["first", "the  query", "third", "fourth"]
    write(folder / "docs" / "merlin_metadata.json", '{"class": "TextQADataset", "corpus_id": "c"}')
    if layout == "jsonl":
        write(folder / "docs" / "a.jsonl", lines(*({"id": i, "text": t} for i, t in zip(ids, texts, strict=True))))
    else:
        datasets.Dataset.from_dict({"id": ids, "text": texts}).to_parquet(folder / "docs" / "a.parquet")
    row = {"corpus_id": "c", "pos_doc": ["d"], "neg_doc": ids[:3]}
    rows = [
        {"question_id": "a", "question": "the query", **row},
        {"question_id": 7, "question": "other", **row, "pos_score": [1], "neg_score": [2, 3, 4]},
    ]
    write(folder / "rows.json", json.dumps({"corpus": [{"path": "docs"}], "data": rows}))
    assert [row["neg_doc"] for row in load("rows.json")] == [["third"], ["first", "the  query", "third"]]
    assert caplog.messages == [f"rows.json: left out 2 {KEEPS}"]
    kept = load("rows.json", ignore_identical_ids=False)
    assert [row["neg_doc"] for row in kept] == [["first", "the  query", "third"]] * 2


def test_identifiers_alone(caplog):
    run = {"a": {"a": 2.0, "b": 1.0}, "7": {"7": 1.0, "a": 0.5}, "8": {"8": 3.0}, "c": {"a": 1.0}}
    qrels = {"a": {"b": 1}, "7": {"a": 1}, "c": {"a": 1}}
    assert drop_own_ids(qrels, run) == ({"a": {"b": 1.0}, "7": {"a": 0.5}, "8": {}, "c": {"a": 1.0}}, 3)
    # A relevant document of a number's own identifier shows that the numbers coincide by chance.
    assert drop_own_ids({**qrels, "9": {"9": 1}}, run) == ({**run, "a": {"b": 1.0}}, 1)
    assert drop_own_ids({**qrels, "a": {"a": 1}}, run)[0]["a"] == run["a"]
    assert drop_own_ids({**qrels, "a": {"a": 0}}, run)[0]["a"] == {"b": 1.0}


def test_the_texts_of_a_corpus_by_hand(folder):
    corpus = open_corpus(write(folder / "corpus.jsonl", lines(*CORPUS)), folder / "cache")
    assert corpus.has_text("We should ban\tzoos.", np.arange(6)).tolist() == [False, False, True, True, False, False]
    assert corpus.has_text("", [0, 1]).tolist() == [False, False]
    assert find_identical(corpus, "arg-1", "?", [1, 0]).tolist() == [False, True]
    assert find_identical(corpus, "arg-1", "?", [1, 0], {"arg-1": 0}).tolist() == [False, True]
    assert find_identical(corpus, "1", "?", [4]).tolist() == [False]
    assert find_identical(corpus, None, "?", []).tolist() == []
    assert is_same_text(" a\xa0b", "a b")
    assert not is_same_text("a b", "A b")
    assert not is_same_text("", "")


def test_a_negative_is_never_taken_away_without_a_word(folder, caplog):
    """The dry run, which reads all sources, says it too."""
    from llama_bidir.data import Grouping
    from llama_bidir.training import DataArguments
    from llama_bidir.training.run import load_usable_rows

    write(folder / "rows.jsonl", lines({"query": "a", "pos_doc": "p", "neg_doc": ["a", "n"]}))
    with caplog.at_level(logging.WARNING):
        rows = load_usable_rows(parse_source("rows.jsonl"), DataArguments(), Grouping(group_size=2), "ranknet")
    assert rows[0]["neg_doc"] == ["n"]
    assert caplog.messages == [f"rows.jsonl: left out 1 {KEEPS}"]
    assert load_rows({"path": "rows.jsonl", "ignore_identical_ids": False})[0]["neg_doc"] == ["a", "n"]

"""Training rows of BEIR folders."""

import os
import pickle
import re

import pytest
from helpers import NO_SCORES, arrow_bytes, lines, write

from llama_bidir.data.arrow import are_valid
from llama_bidir.data.corpus import open_corpus
from llama_bidir.data.sources import parse_source

pytest.importorskip("datasets")

# The ends of messages.
CORRECT = "; correct or remove the line"
REMOVE = "; correct or remove it"
KEEP = "; keep one of the lines"
CONVERT = "; convert the file"
SAME = "; both files must be of the same dataset"

CORPUS = [
    {"_id": "d1", "title": "One", "text": "first"},
    {"_id": "d2", "title": "", "text": "second"},
    {"_id": 3, "text": "third"},
    {"_id": "d4", "title": None, "text": ""},
]
QRELS = "query-id\tcorpus-id\tscore\nq2\td2\t1\nq1\td1\t0\nq1\t3\t2\nq1\td4\t1\nq1\td4\t1\nq3\td1\t0\nq4\td1\t1\n"
RUN = "q1 Q0 d2 2 8.5 bm25\nq1 Q0 d4 3 8 bm25\nq1 Q0 d1 1 9 bm25\nq2 Q0 d2 1 3 bm25\nother Q0 gone 1 3 bm25\n"


@pytest.fixture
def beir(folder):
    folder = folder / "beir"
    write(folder / "corpus.jsonl", lines(*CORPUS))
    write(
        folder / "queries.jsonl", lines(*[{"_id": f"q{n}", "text": f"query {n}", "metadata": {}} for n in range(1, 5)])
    )
    write(folder / "qrels.tsv", QRELS)
    write(folder / "run.bm25.trec", RUN)
    return folder


BEIR_ROWS = [
    {"query": "query 2", "pos_doc": ["second"], "neg_doc": [], **NO_SCORES, "pos_relevance": None},
    {
        "query": "query 1",
        "pos_doc": ["third", ""],
        "neg_doc": ["One first", "second"],
        **NO_SCORES,
        "pos_relevance": [2.0, 1.0],
    },
    {"query": "query 4", "pos_doc": ["One first"], "neg_doc": [], **NO_SCORES, "pos_relevance": None},
]


def test_rows_are_made_of_a_beir_folder(beir, load, capfd):
    dataset = load(beir)
    assert list(dataset) == BEIR_ROWS
    assert are_valid(dataset)
    assert b"second" not in arrow_bytes(dataset)
    assert pickle.loads(pickle.dumps(dataset))[1] == BEIR_ROWS[1]
    assert capfd.readouterr().err == ""


def test_a_beir_folder_in_its_other_forms(beir, load):
    for name in ("corpus.jsonl", "queries.jsonl", "run.bm25.trec"):
        write(beir / f"{name}.gz", (beir / name).read_bytes())
        (beir / name).unlink()
    (beir / "qrels").mkdir()
    (beir / "qrels.tsv").rename(beir / "qrels" / "train.tsv")
    assert list(load(os.fspath(beir))) == BEIR_ROWS
    trec = "".join(f"{q} 0 {d} {s}\n" for q, d, s in map(str.split, QRELS.splitlines()[1:]))
    (beir / "qrels" / "train.tsv").unlink()
    write(beir / "qrels.tsv", trec)
    assert list(load(beir)) == BEIR_ROWS


def test_options_choose_the_files_and_the_depth(beir, load):
    write(beir / "run.dense.trec", "q4 Q0 3 1 0.5 dense\nq4 Q0 d2 2 0.4 dense\n")
    write(beir / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore\nq4\td4\t1\n")
    with pytest.raises(
        ValueError, match=r"^beir: there are several files of qrels: qrels.tsv, qrels/train.tsv; name one"
    ):
        load("beir")
    with pytest.raises(
        ValueError, match=r"^beir: there are several files of run: run.bm25.trec, run.dense.trec; name one with run:$"
    ):
        load({"path": "beir", "qrels": "qrels.tsv"})
    options = {"path": "beir", "qrels": "qrels/train.tsv", "run": str(beir / "run.dense.trec")}
    assert [row["neg_doc"] for row in load(options)] == [["third", "second"]]
    assert [row["neg_doc"] for row in load({**options, "depth": 1})] == [["third"]]
    assert [row["neg_doc"] for row in load(parse_source({**options, "depth": 2, "weight": 3}))] == [["third", "second"]]
    with pytest.raises(FileNotFoundError, match=r"^there is no file 'beir/qrels/test\.tsv'$"):
        load({**options, "qrels": "qrels/test.tsv"})


def test_the_rows_follow_the_run_and_the_corpus_is_cached_once(beir, load, tmp_path):
    load(beir)
    write(beir / "run.bm25.trec", RUN.replace("q1 Q0 d2 2", "q1 Q0 3 2"))
    assert load(beir)[1]["neg_doc"] == ["One first"]
    opened = open_corpus(beir / "corpus.jsonl", tmp_path / "cache")
    assert opened.ids([2, 0]) == ["3", "d1"]
    assert opened.texts([2, 0]) == ["third", "One first"]
    texts = [path for path in (tmp_path / "cache").rglob("*.arrow") if b"second" in path.read_bytes()]
    assert [str(path) for path in texts] == [file["filename"] for file in opened.dataset.cache_files]
    again = pickle.loads(pickle.dumps(opened))
    assert list(again.all_ids()) == ["d1", "d2", "3", "d4"]
    assert again.index(first=5) == {"d1": 5, "d2": 6, "3": 7, "d4": 8}


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels.tsv", "run.bm25.trec"])
def test_missing_files_of_a_beir_folder_are_named(name, beir, load):
    (beir / name).unlink()
    rules = {
        "corpus.jsonl": "corpus.jsonl or corpus.jsonl.gz",
        "queries.jsonl": "queries.jsonl or queries.jsonl.gz",
        "qrels.tsv": "qrels.tsv or qrels/train.tsv",
        "run.bm25.trec": "run*.trec or run*.trec.gz",
    }
    with pytest.raises(FileNotFoundError, match=f"^beir: there is no {re.escape(rules[name])} in the folder$"):
        load("beir")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", "", ":1: the file has no lines; it needs one JSON object per line, one for each document"),
        ("corpus.jsonl", lines(CORPUS[0], 5), ":2: a line must be one JSON object, got int 5"),
        ("corpus.jsonl", "{}x", ":1: a line must be one JSON object: Extra data at column 3"),
        ("corpus.jsonl", lines({"text": "t"}), ":1: _id must be a string or an int, got NoneType None"),
        ("corpus.jsonl", lines({"_id": "d"}), ":1: text must be a string, got NoneType None" + CORRECT),
        (
            "corpus.jsonl",
            lines({"_id": "d", "title": 5, "text": ""}),
            ":1: title must be a string, got int 5" + CORRECT,
        ),
        ("corpus.jsonl", lines(*CORPUS, CORPUS[2]), ":5: _id: the document '3' is there already, in line 3" + KEEP),
        (
            "corpus.jsonl",
            b"\xff\xfe",
            ":1: the file must be UTF-8 text: invalid start byte at byte 1 of the line" + CONVERT,
        ),
        ("queries.jsonl", "", ":1: the file has no lines; it needs one JSON object per line, one for each query"),
        ("queries.jsonl", lines({"_id": "q"}), ":1: text must be a string, got NoneType None" + CORRECT),
        (
            "queries.jsonl",
            lines(*[{"_id": "q", "text": ""}] * 2),
            ":2: _id: the query 'q' is there already, in line 1" + KEEP,
        ),
        ("qrels.tsv", "", ":1: the file has no judgements; it needs one per line"),
        ("qrels.tsv", QRELS[:25], ":1: the file has no judgements; it needs one per line"),
        (
            "qrels.tsv",
            "q1\td1\t1\n",
            ":1: a line of qrels must have 4 columns (query-id, 0, doc-id, relevance), or 3 separated by tabs under a "
            "line query-id, corpus-id, score, got str 'q1\\td1\\t1'" + REMOVE,
        ),
        (
            "qrels.tsv",
            QRELS + "q1 d1 1\n",
            ":9: a line of qrels must have 3 columns separated by tabs (query-id, corpus-id, score), got str 'q1 d1 1'"
            + REMOVE,
        ),
        ("qrels.tsv", "q1 0 d1 NaN\n", ":1: score must be a whole number, got 'NaN'" + CORRECT),
        ("qrels.tsv", "q1 0 d1 1_0\n", ":1: score must be a whole number, got '1_0'" + CORRECT),
        ("qrels.tsv", "q1 0 d1 99999999999\n", ":1: score must be a whole number of 32 bits, got '99999999999'"),
        ("qrels.tsv", "q1 0 d1 0\n", ": no query has a relevant document, one with a score of 1 or more"),
        (
            "qrels.tsv",
            QRELS + "q1\td1\t1\n",
            ":9: score: the document 'd1' of query 'q1' is judged 1 here and 0 in line 3" + KEEP,
        ),
        ("run.bm25.trec", "", ":1: the run has no entries; it needs one per line"),
        (
            "run.bm25.trec",
            RUN + "q1 d1 1\n",
            ":6: a line of a run must have 6 columns (query-id, Q0, doc-id, rank, score, tag), got str 'q1 d1 1'"
            + REMOVE,
        ),
        ("run.bm25.trec", RUN + "q1 Q0 d1 4 nan t\n", ":6: score must be a finite number, got 'nan'" + CORRECT),
        ("run.bm25.trec", RUN + "q1 Q0 d1 4 1_0 t\n", ":6: score must be a finite number, got '1_0'" + CORRECT),
        ("run.bm25.trec", RUN + "q1 Q0 d1 ٤ 1 t\n", ":6: rank must be a whole number, got '٤'" + CORRECT),
        ("run.bm25.trec", RUN + "q1 Q0 d1 1.5 4 t\n", ":6: rank must be a whole number, got '1.5'" + CORRECT),
        (
            "run.bm25.trec",
            "other Q0 d1 1 1 t\n",
            ": the run has no entry for any query of the qrels; both must be about the same queries",
        ),
    ],
)
def test_malformed_lines_of_a_beir_folder_are_named(name, content, message, beir, load):
    write(beir / name, content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'beir/{name}{message}')}$"):
        load("beir", skip_bad_rows=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("qrels.tsv", QRELS + "q9\td1\t1\n", ":9: query-id: there is no query 'q9' in beir/queries.jsonl" + SAME),
        ("qrels.tsv", QRELS + "q3\td9\t1\n", ":9: corpus-id: there is no document 'd9' in beir/corpus.jsonl" + SAME),
        (
            "run.bm25.trec",
            RUN + "q1 Q0 d9 4 1 t\n",
            ":6: doc-id: there is no document 'd9' in beir/corpus.jsonl" + SAME,
        ),
        (
            "run.bm25.trec",
            RUN + "q1 Q0 d1 4 1 t\n",
            ":6: doc-id: the query 'q1' has the document 'd1' already, in line 3" + KEEP,
        ),
    ],
)
def test_queries_with_unknown_documents_can_be_left_out(name, content, message, beir, load, caplog):
    write(beir / name, content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'beir/{name}{message}')}$"):
        load("beir")
    kept = BEIR_ROWS
    if name != "qrels.tsv":  # the only graded query is left out, and with it the column of the relevance
        ungraded = [row for row in BEIR_ROWS if row["query"] != "query 1"]
        kept = [{key: value for key, value in row.items() if key != "pos_relevance"} for row in ungraded]
    assert list(load("beir", skip_bad_rows=True)) == kept
    assert caplog.records[0].message == f"beir: left out 1 bad rows:\n  beir/{name}{message}"

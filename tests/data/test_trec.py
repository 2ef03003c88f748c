"""Lines of qrels, runs and JSON Lines as other tools write them."""

import re

import pytest
from helpers import lines, write

from llama_bidir.data.corpus import read_queries
from llama_bidir.data.trec import read_qrels, read_run, write_qrels, write_run

ROWS = "q1\td1\t1\nq2\td2\t0\n"
EXPECTED = {"q1": {"d1": 1}, "q2": {"d2": 0}}


@pytest.mark.parametrize(
    "content",
    [
        "query-id\tcorpus-id\tscore \n" + ROWS,
        " query-id \tcorpus-id\tscore\t\r\n".replace("\t\r", "\r") + ROWS.replace("\n", "\r\n"),
        "\ufeffquery-id\tcorpus-id\tscore\n" + ROWS,
        "\n \t\nQuery-ID\tCorpus-ID\tScore\n" + ROWS,
        "query_id\tcorpus_id\tscore\n" + ROWS,
        '"query-id"\t"corpus-id"\t"score"\n"q1"\t"d1"\t"1"\n"q2"\t"d2"\t0\n',
        "query-id corpus-id  score\nq1 d1 1\nq2 d2\t0\n",
        "query-id\tcorpus-id\tscore\nq1 \t d1\t1 \nq2\td2\t0\n",
    ],
)
def test_a_header_is_known_in_any_case_with_blanks_quotes_or_a_byte_order_mark(content, tmp_path):
    assert read_qrels(write(tmp_path / "qrels.tsv", content)) == EXPECTED


# Characters at which str.split or str.splitlines would divide, besides blanks.
INNER = "\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2003\u2028\u2029\u3000"


def test_columns_are_split_at_spaces_and_tabs_alone(tmp_path):
    query_ids, doc_ids = ([f"{kind}{character}1" for character in INNER] for kind in ("q", "d"))
    pairs = list(zip(query_ids, doc_ids, strict=True))
    trec = write(tmp_path / "qrels.txt", "".join(f"{query}\t 0  {doc} 1\r\n" for query, doc in pairs))
    tsv = write(tmp_path / "q.tsv", "query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t1\n" for q, d in pairs))
    expected = {query_id: {doc_id: 1} for query_id, doc_id in pairs}
    assert read_qrels(trec) == read_qrels(tsv) == expected
    run = {query_id: {doc_id: 0.5, f"{doc_id}x": 0.25} for query_id, doc_id in pairs}
    write_run(tmp_path / "run.trec", run, "t\xa0ag")
    assert read_run(tmp_path / "run.trec") == run
    write_qrels(tmp_path / "again.tsv", expected)
    assert read_qrels(tmp_path / "again.tsv") == expected


def test_blanks_around_an_identifier_are_dropped_in_every_format(tmp_path):
    queries = write(tmp_path / "queries.jsonl", lines({"_id": " q1\t", "text": " a "}, {"_id": "q\xa0", "text": "b"}))
    assert read_queries(queries) == {"q1": " a ", "q\xa0": "b"}
    assert read_qrels(write(tmp_path / "q.tsv", "query-id\tcorpus-id\tscore\n q1 \td 1 \t1\n")) == {"q1": {"d 1": 1}}


@pytest.mark.parametrize("word", ["q 1", "q\t1", "q\n1", "q\r1", " q1", ""])
def test_an_identifier_that_a_run_could_not_hold_is_named(word, tmp_path):
    for run, tag in (({word: {"d": 1.0}}, "t"), ({"q": {word: 1.0}}, "t"), ({"q": {"d": 1.0}}, word)):
        message = f"{word!r}, of query {next(iter(run))!r}, is not one word, but blanks separate the columns of a run"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            write_run(tmp_path / "run.trec", run, tag)


@pytest.mark.parametrize("identifier", ["q\t1", "q\n1", "q1 ", ""])
def test_an_identifier_that_qrels_could_not_hold_is_named(identifier, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"qrels.tsv: the identifier {identifier!r} cannot be a column")):
        write_qrels(tmp_path / "qrels.tsv", {"q": {identifier: 1}})
    assert not (tmp_path / "qrels.tsv").exists()


@pytest.mark.parametrize("score", ["1_0", "\u0661", "1.0"])
def test_numbers_are_plain(score, tmp_path):
    with pytest.raises(ValueError, match=r"q\.txt:1: score must be a whole number, got"):
        read_qrels(write(tmp_path / "q.txt", f"q1 0 d1 {score}\n"))
    if score != "1.0":
        with pytest.raises(ValueError, match=r"run\.trec:1: score must be a finite number, got"):
            read_run(write(tmp_path / "run.trec", f"q1 Q0 d1 1 {score} t\n"))


def test_a_repeated_key_of_a_json_object_is_named(tmp_path, load):
    pytest.importorskip("datasets")
    row = '{"query": "q", "pos_doc": "a", "neg_doc": ["b"], "pos_doc": "c"}\n'
    rows = write(tmp_path / "rows.jsonl", lines({"query": "q", "pos_doc": "a"}) + row)
    message = f"{rows}:2: a line must be one JSON object: the key 'pos_doc' comes twice"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load(rows)
    queries = write(tmp_path / "queries.jsonl", '{"_id": "q", "text": "a", "metadata": {"x": 1, "x": 2}}\n')
    with pytest.raises(ValueError, match=re.escape(f"{queries}:1: a line must be one JSON object: the key 'x' comes")):
        read_queries(queries)
    whole = write(tmp_path / "rows.json", '{"corpus": [], "data": [], "data": []}')
    message = f"{whole}: the file must hold one JSON object: the key 'data' comes twice"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load(whole)

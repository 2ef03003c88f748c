import json
import math
import re

import pytest

from llama_bidir.evaluation import (
    evaluate_queries,
    evaluate_run,
    rank_documents,
    read_documents,
    read_qrels,
    read_queries,
    read_run,
    score_bm25,
    search_bm25,
    write_corpus,
    write_qrels,
    write_queries,
    write_run,
)
from llama_bidir.evaluation.bm25 import BM25

ir_measures = pytest.importorskip("ir_measures")
pytest.importorskip("bm25s")

QRELS = {"q1": {"d1": 1}, "q2": {"d2": 1}, "q3": {"d3": 1}}
RUN = {"q1": {"d1": 0.5, "d9": 0.1}, "q2": {"d9": 2.0, "d2": -1.0}}


def test_measures_by_hand_count_queries_that_the_run_lacks():
    measures = evaluate_run(QRELS, RUN, ["nDCG@10", "RR@10", "P@1"])
    assert measures["nDCG@10"] == pytest.approx((1 + 1 / math.log2(3) + 0) / 3)
    assert measures["RR@10"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert measures["P@1"] == pytest.approx(1 / 3)


def test_ties_go_to_the_greater_identifier_in_every_measure_as_in_trec_eval():
    for relevant, expected in (("d1", 1.0), ("d0", 0.0)):
        for order in (["d0", "d1"], ["d1", "d0"]):
            run = {"q": dict.fromkeys(order, 0.0)}
            measures = evaluate_run({"q": {relevant: 1}}, run, ["P@1", "RR@1", "nDCG@1", "Success@1", "RR", "AP"])
            assert [measures[name] for name in ("P@1", "RR@1", "nDCG@1", "Success@1")] == [expected] * 4
            assert (measures["RR"], measures["AP"]) == ((1 + expected) / 2, (1 + expected) / 2)
            by_trec_eval = ir_measures.pytrec_eval.calc_aggregate([ir_measures.AP], {"q": {relevant: 1}}, run)
            assert measures["AP"] == by_trec_eval[ir_measures.AP]
    assert rank_documents({"a": 1, "c": 1, "b": 2, "é": 1}) == ["b", "é", "c", "a"]
    with pytest.raises(ValueError, match=r"^the score of document 'a' is NaN and has no rank: leave the document out$"):
        rank_documents({"a": math.nan})


def test_values_of_each_query():
    run = {**RUN, "unjudged": {"d1": 1.0}, "q3": {}}
    aggregated, per_query = evaluate_queries(QRELS, run, "RR@10, Judged@1 NumRet ERR@10 AP(rel=2, judged_only=False)@5")
    assert per_query["RR@10"] == {"q1": 1.0, "q2": 0.5, "q3": 0.0}
    assert per_query["Judged@1"] == {"q1": 1.0, "q2": 0.0, "q3": 0.0}
    assert per_query["NumRet"] == {"q1": 2.0, "q2": 2.0, "q3": 0.0}
    assert aggregated["NumRet"] == 4  # a count is summed, as ir_measures does
    assert list(aggregated) == ["RR@10", "Judged@1", "NumRet", "ERR@10", "AP(rel=2)@5"]
    assert aggregated["RR@10"] == evaluate_run(QRELS, run, "RR@10")["RR@10"] == 0.5


def test_a_run_without_a_judged_query_is_all_zero():
    assert evaluate_run(QRELS, {"other": {"d1": 1.0}}) == {"nDCG@10": 0, "RR@10": 0, "R@100": 0}


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ("nDGC@10", "unknown measure 'nDGC@10'; the nearest is 'nDCG@10'"),
        ("ndcg@10", "unknown measure 'ndcg@10'; the nearest is 'nDCG@10'"),
        ("map(rel=2)@10", "unknown measure 'map(rel=2)@10'; the nearest is 'MAP(rel=2)@10'"),
        ("recall@5", "unknown measure 'recall@5'; the nearest is 'Recall@5'"),
        ("P", "measure 'P' needs its cutoff, as in P@10"),
        ("nDCG@0", "measure 'nDCG@0': the cutoff must be an int from 1 to 2147483647"),
        ("R@True", "measure 'R@True': the cutoff must be an int from 1 to 2147483647"),
        ("nDCG@99999999999", "measure 'nDCG@99999999999': the cutoff must be an int from 1 to 2147483647"),
        ("nDCG@x", "measure 'nDCG@x' must be written like nDCG@10 or AP(rel=2)@100"),
        ("@10", "measure '@10' must be written like nDCG@10 or AP(rel=2)@100"),
        ("AP" + "(" * 200, f"measure 'AP{'(' * 200}' must be written like nDCG@10 or AP(rel=2)@100"),
        (
            "RR(k=3)",
            "measure 'RR(k=3)': unsupported params found: ['k']; the parameters of RR are cutoff, rel, judged_only",
        ),
        ("RBP", "measure 'RBP': no tool of ir_measures computes it with these parameters"),
        ("P(rel=0)@10", "ir_measures could not compute P(rel=0)@10: Argument relevance_level should be positive."),
        (" ", "measures must name at least one, such as nDCG@10"),
        ([], "measures must name at least one, such as nDCG@10"),
    ],
)
def test_bad_measures_are_named(measures, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evaluate_run(QRELS, RUN, measures)


def test_a_measure_of_a_tool_that_is_missing(monkeypatch):
    monkeypatch.setattr(ir_measures.pyndeval, "is_available", lambda: False)
    with pytest.raises(ImportError, match=r"'alpha_nDCG@10' needs a tool that is not installed: pip install ir-"):
        evaluate_run(QRELS, RUN, "alpha_nDCG@10")


def test_there_must_be_judgements():
    with pytest.raises(ValueError, match=r"^qrels must judge at least one query, got none$"):
        evaluate_run({}, RUN)


def test_bm25_by_hand():
    corpus = {"a": "bees fly home", "b": "bees sleep", "c": "cats sleep"}
    run = score_bm25(corpus, {"q": "flying fly bees unknown", "empty": "unknown"}, {"q": ["c", "a"], "empty": ["b"]})

    def term(documents_with_term, length):
        idf = math.log(1 + (3 - documents_with_term + 0.5) / (documents_with_term + 0.5))
        return idf / (1 + 1.2 * (1 - 0.75 + 0.75 * length / (7 / 3)))

    assert list(run["q"]) == ["c", "a"]
    assert run["q"]["a"] == pytest.approx(term(1, 3) + term(2, 3), rel=1e-5)
    assert (run["q"]["c"], run["empty"]["b"]) == (0.0, 0.0)
    found = search_bm25(corpus, {"q": "fly bees", "empty": "unknown"}, 1)
    assert found == {"q": {"a": run["q"]["a"]}, "empty": {}}
    assert list(search_bm25(corpus, {"q": "fly bees"})["q"]) == ["a", "b"]


def test_bm25_ranks_by_score_and_then_in_the_order_of_the_texts():
    bm25 = BM25(["bees fly", "cats", "bees fly", "bees"])
    scores = bm25.score("bees").tolist()
    assert scores[3] > scores[0] == scores[2] > scores[1] == 0
    assert bm25.search("bees", 2) == ([3, 0], [scores[3], scores[0]])
    assert bm25.search("bees", 9) == ([3, 0, 2], [scores[3], scores[0], scores[2]])
    assert bm25.search("dogs", 2) == BM25(["", "the"]).search("the bees", 2) == ([], [])


def test_files_are_what_trec_and_beir_tools_read(tmp_path):
    write_run(tmp_path / "run.trec", RUN, "tag")
    assert (tmp_path / "run.trec").read_text().splitlines() == [
        "q1 Q0 d1 1 0.5 tag",
        "q1 Q0 d9 2 0.1 tag",
        "q2 Q0 d9 1 2.0 tag",
        "q2 Q0 d2 2 -1.0 tag",
    ]
    write_run(tmp_path / "ties.trec", {"q": {"a": 1, "c": 2.5, "b": 1}}, "tag")
    assert (tmp_path / "ties.trec").read_text() == "q Q0 c 1 2.5 tag\nq Q0 a 2 1.0 tag\nq Q0 b 3 1.0 tag\n"
    write_qrels(tmp_path / "qrels.tsv", QRELS)
    assert (tmp_path / "qrels.tsv").read_text().splitlines()[:2] == ["query-id\tcorpus-id\tscore", "q1\td1\t1"]
    write_corpus(tmp_path / "corpus.jsonl", {"d1": "Zürich\n"})
    write_queries(tmp_path / "queries.jsonl", {"q1": "where?"})
    assert json.loads((tmp_path / "corpus.jsonl").read_text()) == {"_id": "d1", "title": "", "text": "Zürich\n"}
    assert json.loads((tmp_path / "queries.jsonl").read_text()) == {"_id": "q1", "text": "where?"}
    scored = ir_measures.calc_aggregate(
        [ir_measures.parse_measure("P@1")],
        [ir_measures.Qrel(query_id, doc_id, 1) for query_id, docs in QRELS.items() for doc_id in docs],
        ir_measures.read_trec_run(str(tmp_path / "run.trec")),
    )
    assert next(iter(scored.values())) == pytest.approx(1 / 3)


def test_files_are_read_as_they_were_written(tmp_path):
    write_run(tmp_path / "run.trec", RUN, "tag")
    write_qrels(tmp_path / "qrels.tsv", QRELS)
    write_corpus(tmp_path / "corpus.jsonl", {"d1": "one", "d2": "two", "d9": "nine"})
    write_queries(tmp_path / "queries.jsonl", {"q3": "3", "q2": "2", "q1": "1", "q0": "0"})
    assert read_run(tmp_path / "run.trec") == RUN
    assert read_qrels(tmp_path / "qrels.tsv") == QRELS
    queries = read_queries(tmp_path / "queries.jsonl", QRELS, tmp_path / "qrels.tsv")
    assert list(queries.items()) == [("q1", "1"), ("q2", "2"), ("q3", "3")]
    assert read_documents(tmp_path / "corpus.jsonl", {"d9"}, {tmp_path / "run.trec": RUN}) == {"d9": "nine"}


@pytest.mark.parametrize(
    ("write", "content", "arguments"),
    [
        (write_run, {"q1": {"d1": 1.0}, "q2": {"\ud800": 1.0}}, ["tag"]),
        (write_qrels, {"q1": {"d1": 1}, "q2": {"\ud800": 1}}, []),
        (write_corpus, {"d1": "text", "d2": "\ud800"}, []),
        (write_queries, {"q1": "text", "q2": "\ud800"}, []),
    ],
)
def test_a_file_stays_as_it_is_when_the_new_content_cannot_be_written(write, content, arguments, tmp_path):
    path = tmp_path / "file"
    path.write_text("former")
    with pytest.raises(ValueError, match="surrogates not allowed"):
        write(path, content, *arguments)
    assert path.read_text() == "former"

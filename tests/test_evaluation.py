import json
import math

import pytest

from llama_bidir.evaluation import evaluate_run, score_bm25, write_corpus, write_qrels, write_queries, write_run

ir_measures = pytest.importorskip("ir_measures")
pytest.importorskip("bm25s")

QRELS = {"q1": {"d1": 1}, "q2": {"d2": 1}, "q3": {"d3": 1}}
RUN = {"q1": {"d1": 0.5, "d9": 0.1}, "q2": {"d9": 2.0, "d2": -1.0}}


def test_measures_by_hand_count_queries_that_the_run_lacks():
    measures = evaluate_run(QRELS, RUN, ["nDCG@10", "RR@10", "P@1"])
    assert measures["nDCG@10"] == pytest.approx((1 + 1 / math.log2(3) + 0) / 3)
    assert measures["RR@10"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert measures["P@1"] == pytest.approx(1 / 3)


def test_ties_keep_the_order_of_the_run_in_every_measure():
    for order, expected in ((["d0", "d1"], 1.0), (["d1", "d0"], 0.0)):
        run = {"q": dict.fromkeys(order, 0.0)}
        measures = evaluate_run({"q": {"d0": 1}}, run, ["P@1", "RR@1", "nDCG@1", "Success@1"])
        assert measures == dict.fromkeys(measures, expected)


def test_bm25_by_hand():
    corpus = {"a": "bees fly home", "b": "bees sleep", "c": "cats sleep"}
    run = score_bm25(corpus, {"q": "flying fly bees unknown", "empty": "unknown"}, {"q": ["c", "a"], "empty": ["b"]})

    def term(documents_with_term, length):
        idf = math.log(1 + (3 - documents_with_term + 0.5) / (documents_with_term + 0.5))
        return idf / (1 + 1.2 * (1 - 0.75 + 0.75 * length / (7 / 3)))

    assert list(run["q"]) == ["c", "a"]
    assert run["q"]["a"] == pytest.approx(term(1, 3) + term(2, 3), rel=1e-5)
    assert (run["q"]["c"], run["empty"]["b"]) == (0.0, 0.0)


def test_files_are_what_trec_and_beir_tools_read(tmp_path):
    write_run(tmp_path / "run.trec", RUN, "tag")
    assert (tmp_path / "run.trec").read_text().splitlines() == [
        "q1 Q0 d1 1 0.5 tag",
        "q1 Q0 d9 2 0.1 tag",
        "q2 Q0 d9 1 2.0 tag",
        "q2 Q0 d2 2 -1.0 tag",
    ]
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

"""evaluate_reranker and the adapter to mteb."""

import math
import re
import shutil
from typing import Any

import numpy as np
import pytest
from helpers import CRANFIELD, lines, make_model, make_tokenizer, write

from llama_bidir import CrossEncoder
from llama_bidir.evaluation import Dataset, MTEBCrossEncoder, evaluate_reranker, evaluate_run, load_dataset

pytest.importorskip("ir_measures")

CORPUS = {f"d{number}": "bees fly home to the hive " * number for number in range(1, 7)}
QUERIES = {"q1": "where do bees fly?", "q2": "who built the hive?", "q3": "why?", "unjudged": "?"}
QRELS = {"q1": {"d1": 1, "d6": 2}, "q2": {"d4": 1}, "q3": {"d1": 1}}
RUN = {
    "q1": {"d5": 9.0, "d2": 8.0, "d3": 7.0, "d1": 6.0, "d6": 5.0},
    "q2": {"d5": 1.5, "d4": 1.5, "d3": 0.0},
    "unjudged": {"d1": 1.0},
}
DATASET = Dataset(CORPUS, QUERIES, QRELS, RUN)


@pytest.fixture(scope="module")
def cross_encoder() -> CrossEncoder:
    return CrossEncoder(make_model(), make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"), device="cpu")


def test_the_top_is_reranked_and_the_rest_stays_below(cross_encoder):
    result = evaluate_reranker(cross_encoder, DATASET, depth=3, measures="nDCG@10 RR@10")
    scores = dict(
        zip(
            ("d5", "d2", "d3"),
            cross_encoder.predict([(QUERIES["q1"], CORPUS[f"d{n}"]) for n in (5, 2, 3)]),
            strict=True,
        )
    )
    assert list(result.run) == ["q1", "q2", "q3"]
    assert {doc_id: result.run["q1"][doc_id] for doc_id in scores} == pytest.approx(scores)
    ranked = sorted(result.run["q1"], key=lambda doc_id: -result.run["q1"][doc_id])
    assert ranked == [*sorted(scores, key=lambda doc_id: -scores[doc_id]), "d1", "d6"]
    assert result.run["q3"] == {}
    assert result.num_pairs == 6
    assert result.seconds > 0
    assert result.run_before == {"q1": RUN["q1"], "q2": RUN["q2"], "q3": {}}
    assert result.before.aggregated == evaluate_run(QRELS, RUN, ["nDCG@10", "RR@10"])
    assert result.after.aggregated == evaluate_run(QRELS, result.run, ["nDCG@10", "RR@10"])
    assert [each.measure for each in result.comparisons] == ["nDCG@10", "RR@10"]
    assert result.comparisons[0].difference == pytest.approx(
        result.after.aggregated["nDCG@10"] - result.before.aggregated["nDCG@10"]
    )


def test_a_depth_of_none_reranks_all_and_one_changes_nothing(cross_encoder):
    assert evaluate_reranker(cross_encoder, DATASET, depth=None).num_pairs == 8
    one = evaluate_reranker(cross_encoder, DATASET._asdict(), depth=1)
    assert one.num_pairs == 2
    assert one.after == one.before


def test_documents_below_the_depth_have_the_next_lower_scores_and_top_k_is_refused(cross_encoder):
    scores = list(evaluate_reranker(cross_encoder, DATASET, depth=3).run["q1"].values())
    assert scores[3:] == [np.nextafter(np.float32(scores[2]), np.float32(-np.inf)), scores[4]]
    assert scores[4] == np.nextafter(np.float32(scores[3]), np.float32(-np.inf))
    with pytest.raises(ValueError, match="top_k would drop documents of the run: give depth"):
        evaluate_reranker(cross_encoder, DATASET, top_k=2)


def test_a_folder_gives_the_same_as_a_dataset(cross_encoder, tmp_path):
    write(tmp_path / "corpus.jsonl.gz", lines(*[{"_id": key, "text": text} for key, text in CORPUS.items()]))
    write(tmp_path / "queries.jsonl", lines(*[{"_id": key, "text": text} for key, text in QUERIES.items()]))
    judgements = [f"{query}\t{doc}\t{value}\n" for query, docs in QRELS.items() for doc, value in docs.items()]
    header = "query-id\tcorpus-id\tscore\n"
    write(tmp_path / "qrels" / "train.tsv", header + "q1\td1\t1\n")
    write(tmp_path / "qrels" / "test.tsv", header + "".join(judgements))
    entries = [f"{query} Q0 {doc} 1 {score} t\n" for query, docs in RUN.items() for doc, score in docs.items()]
    write(tmp_path / "run.trec", "".join(entries))
    result = evaluate_reranker(cross_encoder, tmp_path, depth=3)
    expected = evaluate_reranker(cross_encoder, DATASET, depth=3)
    assert result._replace(seconds=0) == expected._replace(seconds=0)
    assert set(load_dataset(tmp_path, depth=2).corpus) == {"d2", "d4", "d5"}
    assert evaluate_reranker(cross_encoder, tmp_path, qrels="qrels/train.tsv").after.per_query["RR@10"].keys() == {"q1"}
    write(tmp_path / "run.trec", "q1 Q0 d1 1 2 t\nq1 Q0 gone 2 1 t\n")
    message = f"{tmp_path}/run.trec:2: doc-id: there is no document 'gone' in {tmp_path}/corpus.jsonl.gz; both files "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        evaluate_reranker(cross_encoder, tmp_path)
    assert evaluate_reranker(cross_encoder, tmp_path, depth=1).num_pairs == 1


def test_judged_queries_without_a_text_are_left_out(cross_encoder, tmp_path, caplog):
    expected = evaluate_reranker(cross_encoder, DATASET._replace(qrels={"q1": QRELS["q1"], "q3": QRELS["q3"]}))
    queries = {"q1": QUERIES["q1"], "q3": QUERIES["q3"]}
    result = evaluate_reranker(cross_encoder, DATASET._replace(queries=queries))
    assert result._replace(seconds=0) == expected._replace(seconds=0)
    write_folder(tmp_path, DATASET._replace(queries=queries))
    from_folder = evaluate_reranker(cross_encoder, tmp_path)
    assert from_folder._replace(seconds=0) == expected._replace(seconds=0)
    assert caplog.messages == [
        "the qrels: left out 1 judged queries that queries lacks: q2",
        f"{tmp_path}/qrels.tsv: left out 1 judged queries that {tmp_path}/queries.jsonl lacks: q2",
    ]


def write_folder(folder, dataset):
    write(folder / "corpus.jsonl", lines(*[{"_id": key, "text": text} for key, text in dataset.corpus.items()]))
    write(folder / "queries.jsonl", lines(*[{"_id": key, "text": text} for key, text in dataset.queries.items()]))
    judgements = [f"{query}\t{doc}\t{value}\n" for query, docs in dataset.qrels.items() for doc, value in docs.items()]
    write(folder / "qrels.tsv", "query-id\tcorpus-id\tscore\n" + "".join(judgements))
    entries = [f"{query} Q0 {doc} 1 {score} t\n" for query, docs in dataset.run.items() for doc, score in docs.items()]
    write(folder / "run.trec", "".join(entries))


def test_documents_that_are_their_query_are_left_out_before_and_after(cross_encoder, tmp_path, caplog):
    own = Dataset(
        {**CORPUS, "a": "bees", "copy": " why? ", "7": "seven"},
        {"a": "an argument", "q3": "why?", "7": "a number"},
        {"a": {"d1": 1}, "q3": {"d1": 1}, "7": {"d2": 1}},
        {
            "a": {"a": 9.0, "d1": 8.0, "d2": 7.0},
            "q3": {"d2": 9.0, "copy": 8.0, "d1": 7.0, "d3": 6.0},
            "7": {"7": 9.0, "d2": 8.0},
        },
    )
    result = evaluate_reranker(cross_encoder, own, depth=2, measures="RR@10")
    assert result.run_before == {
        "a": {"d1": 8.0, "d2": 7.0},
        "q3": {"d2": 9.0, "d1": 7.0, "d3": 6.0},
        "7": {"7": 9.0, "d2": 8.0},
    }
    assert result.before.per_query["RR@10"] == {"a": 1.0, "q3": 0.5, "7": 0.5}
    assert {query_id: set(docs) for query_id, docs in result.run.items()} == {
        query_id: set(docs) for query_id, docs in result.run_before.items()
    }
    assert result.num_pairs == 6  # the next documents move up within the depth
    write_folder(tmp_path, own)
    from_folder = evaluate_reranker(cross_encoder, tmp_path, depth=2, measures="RR@10")
    assert from_folder._replace(seconds=0) == result._replace(seconds=0)
    assert set(load_dataset(tmp_path, depth=2).corpus) == {"d1", "d2", "7"}
    tail = "left out 2 candidates that are the query itself, by identifier or text; ignore_identical_ids=False"
    tail += " (--no-ignore-identical-ids) keeps them"
    assert caplog.messages == [f"the run: {tail}", *[f"{tmp_path}/run.trec: {tail}"] * 2]
    kept = evaluate_reranker(cross_encoder, tmp_path, depth=2, measures="RR@10", ignore_identical_ids=False)
    assert kept.before.per_query["RR@10"] == {"a": 0.5, "q3": 1 / 3, "7": 0.5}
    judged = own._replace(qrels={**own.qrels, "a": {"a": 1}})
    assert evaluate_reranker(cross_encoder, judged, measures="RR@10").before.per_query["RR@10"]["a"] == 1.0


@pytest.mark.parametrize(
    ("dataset", "options", "error", "message"),
    [
        (
            5,
            {},
            TypeError,
            "dataset must be a BEIR folder, a Dataset, or a mapping with corpus, queries, qrels, run; got int",
        ),
        ({"run": {}}, {}, TypeError, "dataset must be a BEIR folder, a Dataset, or a mapping with corpus"),
        (DATASET, {"run": "x"}, ValueError, "qrels and run name files of a folder, but the dataset is not one"),
        (DATASET, {"depth": 0}, ValueError, "depth must be None or an int above 0, got 0"),
        (DATASET._replace(queries={}), {}, ValueError, "the query 'q1' is judged but has no text: add it to queries"),
        (DATASET._replace(corpus={}), {}, ValueError, "the document 'd5' of query 'q1' has no text: add it to corpus"),
        (DATASET._replace(run={"x": {"d1": 1.0}}), {}, ValueError, "the run has no entry for any query of the qrels"),
        (DATASET, {"measures": "nDCG@ten"}, ValueError, "measure 'nDCG@ten' must be written like nDCG@10"),
    ],
)
def test_bad_datasets_are_named(dataset, options, error, message, cross_encoder):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        evaluate_reranker(cross_encoder, dataset, **options)


def test_a_folder_with_real_judgements_and_a_real_run(cross_encoder, tmp_path):
    shutil.copytree(CRANFIELD, tmp_path, dirs_exist_ok=True)
    for name, count in (("corpus.jsonl", 1400), ("queries.jsonl", 225)):
        write(
            tmp_path / name, lines(*({"_id": str(number), "text": f"bee {number}"} for number in range(1, count + 1)))
        )
    result = evaluate_reranker(cross_encoder, tmp_path, depth=5)
    assert (round(result.before.aggregated["nDCG@10"], 4), result.num_pairs) == (0.4072, 625)
    assert result.after.aggregated["R@100"] == result.before.aggregated["R@100"]


def test_the_adapter_scores_batches_of_text(cross_encoder):
    adapter = MTEBCrossEncoder(cross_encoder, name="me/tiny", revision="1")
    batches = [{"text": ["a", "b"]}, {"text": ["c"]}], [{"text": ["x"]}, {"text": ["y", "z"]}]
    options: dict[str, Any] = {"task_metadata": None, "hf_split": "test", "hf_subset": "default", "batch_size": 2}
    scores = adapter.predict(*batches, **options)
    assert scores == pytest.approx(cross_encoder.predict([("a", "x"), ("b", "y"), ("c", "z")]))
    with pytest.raises(ValueError, match=r"shorter"):
        adapter.predict(batches[0], batches[1][:1], **options)
    with pytest.raises(ValueError, match=r"^a batch must have text, got image: the reranker reads no other input$"):
        adapter.predict([{"image": [0]}], batches[1], **options)
    with pytest.raises(ValueError, match=r"^name must be 'organization/name', got 'tiny'$"):
        MTEBCrossEncoder(cross_encoder, name="tiny")


def test_mteb_evaluates_a_reranker_on_a_task_made_here(cross_encoder):
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset as Rows
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

    class TinyReranking(AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            name="TinyReranking",
            description="Bees.",
            reference=None,
            type="Reranking",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            dataset={"path": "made/here", "revision": "1"},
            date=None,
            domains=None,
            task_subtypes=None,
            license=None,
            annotations_creators=None,
            dialect=None,
            sample_creation=None,
            bibtex_citation=None,
        )

        def load_data(self, **kwargs: Any) -> None:
            split = RetrievalSplitData(
                corpus=Rows.from_list([{"id": key, "title": "", "text": text} for key, text in CORPUS.items()]),
                queries=Rows.from_list([{"id": key, "text": QUERIES[key]} for key in ("q1", "q2")]),
                relevant_docs={key: QRELS[key] for key in ("q1", "q2")},
                top_ranked={key: list(RUN[key]) for key in ("q1", "q2")},
            )
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    result = mteb.evaluate(MTEBCrossEncoder(cross_encoder, name="me/tiny"), TinyReranking(), cache=None)
    assert result.model_name == "me/tiny"
    scores = result.task_results[0].scores["test"][0]
    qrels = {key: QRELS[key] for key in ("q1", "q2")}
    expected = evaluate_reranker(cross_encoder, DATASET._replace(qrels=qrels), measures="nDCG@10 AP")
    assert scores["ndcg_at_10"] == pytest.approx(expected.after.aggregated["nDCG@10"], abs=1e-5)
    assert not math.isclose(scores["ndcg_at_10"], expected.before.aggregated["nDCG@10"], abs_tol=1e-3)

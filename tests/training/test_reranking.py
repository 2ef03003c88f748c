"""Collections that are reranked at each evaluation: the measures are those of `evaluate_reranker`."""

import json
import multiprocessing
from functools import partial

import pytest
from helpers import ROWS, arguments, lines, make_model, make_tokenizer, write
from transformers import EarlyStoppingCallback

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from llama_bidir import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from llama_bidir.evaluation import evaluate_reranker
from llama_bidir.training import DataArguments, ModelArguments, train
from llama_bidir.training.history import plot_history, read_history
from llama_bidir.training.plan import plan
from llama_bidir.training.recipes import load_recipe
from llama_bidir.training.reranking import load_rerank_sets

MEASURES = {"ndcg@10": "nDCG@10", "mrr@10": "RR@10"}


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """Five queries: graded, with a relevant document beyond the depth, with one outside the run, and without a run."""
    folder = tmp_path_factory.mktemp("collection")
    texts = list(dict.fromkeys(text for row in ROWS[:8] for text in (*row["pos_doc"], *row["neg_doc"])))
    write(folder / "corpus.jsonl", lines(*({"_id": f"d{number}", "text": text} for number, text in enumerate(texts))))
    write(
        folder / "queries.jsonl",
        lines(*({"_id": f"q{number}", "text": ROWS[number]["query"]} for number in range(5))),
    )
    judged = [("q0", "d1", 2), ("q0", "d2", 1), ("q1", "d3", 1), ("q2", "d6", 1), ("q3", "d0", 1), ("q4", "d2", 1)]
    write(folder / "qrels.tsv", "query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{d}\t{s}\n" for q, d, s in judged))
    run = [(query, rank, (query + rank) % 6) for query in range(4) for rank in range(5)]
    write(folder / "run.trec", "".join(f"q{q} Q0 d{d} {rank + 1} {9 - rank} x\n" for q, rank, d in run))
    return folder


def make_trainer(path, sets, *, eval_rows=None, **fields):
    return CrossEncoderTrainer(
        make_model(),
        arguments(CrossEncoderTrainingArguments, path, **fields),
        ROWS,
        eval_rows,
        make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"),
        group_size=4,
        rerank_sets=sets,
    )


@pytest.mark.parametrize("fields", [{}, {"packing": False}, {"max_pairs_per_forward": 2}], ids=str)
@pytest.mark.parametrize("has_rows", [False, True])
def test_the_measures_are_those_of_an_evaluation(fields, has_rows, collection, tmp_path):
    sets = load_rerank_sets([{"name": "tiny", "path": str(collection), "depth": 3}])
    trainer = make_trainer(
        tmp_path, sets, eval_rows=ROWS[:5] if has_rows else None, per_device_eval_batch_size=2, **fields
    )
    trainer.train()
    metrics = trainer.evaluate()
    reranker = CrossEncoder(trainer.model, trainer.processing_class)
    expected = evaluate_reranker(reranker, collection, depth=3, measures=MEASURES.values())
    for name, measure in MEASURES.items():
        assert metrics[f"eval_tiny_{name}"] == expected.after.aggregated[measure]
        assert metrics[f"eval_tiny_run_{name}"] == expected.before.aggregated[measure]
    assert expected.after.aggregated["nDCG@10"] != expected.before.aggregated["nDCG@10"]
    assert ("eval_loss" in metrics) == has_rows
    logged = [entry for entry in trainer.state.log_history if "eval_tiny_ndcg@10" in entry]
    assert logged[-1]["eval_tiny_ndcg@10"] == metrics["eval_tiny_ndcg@10"]
    assert ("eval_loss" in logged[-1]) == has_rows
    assert "eval_tiny_ndcg@10" not in trainer.evaluate(ROWS[:3])  # rows of the caller's own


def test_named_eval_sets_are_reranked_once(collection, tmp_path):
    sets = load_rerank_sets([{"name": "tiny", "path": str(collection)}])
    trainer = make_trainer(tmp_path, sets, eval_rows={"a": ROWS[:3], "b": ROWS[3:5]})
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_tiny_ndcg@10"} <= metrics.keys()
    assert sum("eval_tiny_ndcg@10" in entry for entry in trainer.state.log_history) == 1


@pytest.mark.parametrize("has_rows", [False, True])
def test_a_measure_chooses_the_best_checkpoint(has_rows, collection, base_checkpoint, tmp_path, no_plot):
    rows = write(tmp_path / "rows.jsonl", lines(*ROWS))
    evaluated = f"eval: [{rows}]" if has_rows else ""
    recipe = f"""
    model: {{model_name_or_path: {base_checkpoint}}}
    data:
      train: [{rows}]
      {evaluated}
      group_size: 4
      eval_rerank: [{{name: tiny, path: {collection}, run: run.trec, depth: 4, queries: 4}}]
    training: {{output_dir: {tmp_path / "out"}, max_steps: 6, eval_steps: 2, save_strategy: steps, save_steps: 2,
      learning_rate: 1e-2, load_best_model_at_end: true, metric_for_best_model: eval_tiny_ndcg@10, report_to: none,
      per_device_train_batch_size: 4, use_cpu: true}}
    """
    write(tmp_path / "recipe.yaml", recipe)
    loaded = load_recipe(tmp_path / "recipe.yaml")
    assert str(collection) in plan(*loaded)
    trainer = train(*loaded)
    history = read_history(tmp_path / "out" / "history.jsonl")
    measured = [entry["eval_tiny_ndcg@10"] for entry in history if "eval_tiny_ndcg@10" in entry]
    assert len(measured) == 3
    assert trainer.state.best_metric == max(measured)
    plot_history(history, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_early_stopping_sees_the_measure(collection, tmp_path):
    sets = load_rerank_sets([{"name": "tiny", "path": str(collection)}])
    trainer = make_trainer(
        tmp_path,
        sets,
        max_steps=20,
        learning_rate=0.0,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_tiny_ndcg@10",
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    assert trainer.state.global_step == 3  # nothing gets better


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nq", r"data\.eval_rerank\[1\] must be a mapping with name and path, got str 'nq'"),
        ({"name": "a", "path": ".", "deep": 3}, r"data\.eval_rerank\[1\]: unknown key 'deep'; the nearest .* 'depth'"),
        ({"path": "."}, r"data\.eval_rerank\[1\] needs a name, such as nq, and the path of a BEIR folder"),
        ({"name": "tiny", "path": "."}, r"data\.eval_rerank\[1\]: there is a set named 'tiny' already"),
        ({"name": "tiny_run", "path": "."}, r"data\.eval_rerank\[1\]: the name 'tiny_run' ends in 'run', which names"),
        ({"name": "a", "path": ".", "run": 5}, r"data\.eval_rerank\[1\]: run must be the path of a file, got int 5"),
        ({"name": "a", "path": ".", "depth": 0}, r"data\.eval_rerank\[1\]: depth must be an int above 0, got 0"),
        ({"name": "a", "path": ".", "queries": -1}, r"data\.eval_rerank\[1\]: queries must be None or an int above 0"),
    ],
)
def test_wrong_entries_are_named(entry, message, collection):
    with pytest.raises(ValueError, match=f"^{message}"):
        load_rerank_sets([{"name": "tiny", "path": str(collection)}, entry])


def test_the_names_of_all_sets_differ(collection, tmp_path):
    sets = load_rerank_sets([{"name": "a", "path": str(collection)}])
    for twice, rows in ((sets * 2, None), (sets, {"a": ROWS[:3]})):
        with pytest.raises(ValueError, match="there is a set named 'a' already"):
            make_trainer(tmp_path, twice, eval_rows=rows)


def test_worker_processes_are_kept(collection, tmp_path):
    sets = load_rerank_sets([{"name": "tiny", "path": str(collection)}])
    trainer = make_trainer(tmp_path, sets, dataloader_num_workers=1, dataloader_persistent_workers=True)
    counts = []
    for _ in range(3):
        trainer.evaluate()
        counts.append(len(multiprocessing.active_children()))
    assert counts == [counts[0]] * 3


@pytest.mark.parametrize("entry", ["beir/nq", {"path": "beir/nq"}])
def test_wrong_entries_of_a_recipe_are_named(entry, base_checkpoint, tmp_path):
    data = DataArguments(train=["rows.jsonl"], eval_rerank=[entry])
    training = arguments(CrossEncoderTrainingArguments, tmp_path / "out")
    for function in (partial(train, overwrite=True), plan):
        with pytest.raises(ValueError, match=r"^data\.eval_rerank\[0\] "):
            function(ModelArguments(model_name_or_path=str(base_checkpoint)), data, training)


def test_a_missing_run_is_named_before_the_weights_load(collection, tmp_path):
    rows = write(tmp_path / "rows.jsonl", json.dumps(ROWS[0]))
    data = DataArguments(
        train=[str(rows)], eval_rerank=[{"name": "tiny", "path": str(collection), "run": "run.bm25.trec"}]
    )
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    (base / "model.safetensors").write_bytes(b"no weights")
    training = arguments(CrossEncoderTrainingArguments, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"run\.bm25\.trec"):
        train(ModelArguments(model_name_or_path=str(base)), data, training)
    make_model().save_pretrained(base)
    with pytest.raises(FileNotFoundError, match=r"^data\.eval_rerank: there is no file .*run\.bm25\.trec"):
        plan(ModelArguments(model_name_or_path=str(base)), data, training)

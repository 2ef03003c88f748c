"""Calibrating a reranker: what is saved, what probabilities mean, and where they go."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import make_model, make_tokenizer
from transformers import AutoTokenizer

from llama_bidir import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    LlamaBidirectionalConfig,
    LlamaBidirectionalForSequenceClassification,
)
from llama_bidir.checkpoints.export import export_reranker
from llama_bidir.cli import main
from llama_bidir.evaluation import Dataset, evaluate_reranker
from llama_bidir.evaluation.calibration import fit_calibration
from llama_bidir.jobs.calibration import PLOT_NAME, calibrate_reranker
from llama_bidir.jobs.job import Job, run_job
from llama_bidir.jobs.rerank import RerankTask

WORDS = ["bees", "honey", "garden", "France", "Seine", "clover", "hive", "sun", "white", "flowers"]


@pytest.fixture
def reranker(tmp_path):
    reranker = CrossEncoder(make_model(rerank_max_length=64), make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"))
    reranker.save_pretrained(tmp_path / "model")
    return reranker


@pytest.fixture
def rows(reranker, tmp_path):
    """Rows whose labels are drawn by a known probability: sigmoid(2 * score - 1)."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 4)) for _ in range(1200)]
    pairs = [(texts[number // 6], text) for number, text in enumerate(texts)]
    scores = reranker.predict(pairs)
    labels = rng.random(len(pairs)) < 1 / (1 + np.exp(-(2 * scores - 1)))
    found = []
    for start in range(0, len(pairs), 6):
        group = range(start, start + 6)
        row = {"query": pairs[start][0]}
        for name, kind in (("pos_doc", True), ("neg_doc", False)):
            row[name] = [pairs[number][1] for number in group if labels[number] == kind]
        if row["pos_doc"]:
            found.append(row)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


PAIRS = [("bees", "honey"), ("France", "the Seine " * 40), ("", "")]


def test_a_reranker_is_calibrated_in_place(reranker, rows, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert main(["calibrate", "--model", str(tmp_path / "model"), "--data", str(rows)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["probability", "log", "loss", "calibration", "error"]
    assert lines[-1] == f"reranker: {tmp_path / 'model'}"
    after = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert after.keys() - before.keys() == {PLOT_NAME}
    assert sorted(name for name in before if before[name] != after[name]) == ["README.md", "config.json"]
    card = after["README.md"].decode()
    assert card.count("| Probability of relevance | sigmoid(") == 1
    kept = [line for line in card.splitlines(keepends=True) if "Probability of relevance" not in line]
    assert "".join(kept) == before["README.md"].decode()
    stored = json.loads(after["config.json"])
    calibration = stored.pop("calibration")
    assert {**stored, "calibration": None} == json.loads(before["config.json"])
    again = CrossEncoder(tmp_path / "model")
    scores = again.predict(PAIRS)
    np.testing.assert_array_equal(scores, reranker.predict(PAIRS))
    probabilities = again.predict(PAIRS, activation_fn="probability")
    expected = 1 / (1 + np.exp(-(calibration["slope"] * scores.astype(np.float64) + calibration["offset"])))
    np.testing.assert_allclose(probabilities, expected, rtol=1e-6)
    assert probabilities.dtype == np.float32
    # A second calibration does not replace the first one unasked.
    assert main(["calibrate", "--model", str(tmp_path / "model"), "--data", str(rows)]) == 2
    assert "is calibrated: pass overwrite (--overwrite) to replace its calibration" in capsys.readouterr().err
    assert main(["calibrate", "--model", str(tmp_path / "model"), "--data", str(rows), "--overwrite"]) == 0


def test_probabilities_mean_what_they_say(reranker, rows, tmp_path):
    result = calibrate_reranker(tmp_path / "model", rows)
    assert result.are_held_out
    assert result.slope == pytest.approx(2, rel=0.4)
    assert result.log_loss["after"] < result.log_loss["before"]
    assert result.calibration_error["after"] < result.calibration_error["before"]
    # The fit uses the even rows, and the measures the odd ones.
    read = [json.loads(line) for line in rows.read_text().splitlines()]
    pairs = [(row["query"], text) for row in read[::2] for text in row["pos_doc"] + row["neg_doc"]]
    labels = [kind == "pos_doc" for row in read[::2] for kind in ("pos_doc", "neg_doc") for _ in row[kind]]
    slope, offset = fit_calibration(reranker.predict(pairs), np.array(labels))
    assert (result.slope, result.offset) == pytest.approx((slope, offset), rel=1e-3)
    assert result.num_fitted == len(pairs)
    assert result.num_fitted + result.num_measured == sum(len(row["pos_doc"] + row["neg_doc"]) for row in read)


def test_the_order_stays_even_where_probabilities_round_to_one(reranker, tmp_path):
    reranker.config.calibration = {"slope": 500.0, "offset": 2000.0}
    documents = ["honey", "the Seine", "clover", "hive", "the garden"]
    ranked = reranker.rank("bees", documents, activation_fn="probability")
    assert [result["score"] for result in ranked] == [1.0] * 5
    assert [result["corpus_id"] for result in ranked] == [
        each["corpus_id"] for each in reranker.rank("bees", documents)
    ]


def test_probability_can_be_the_default_of_a_reranker(reranker, tmp_path):
    reranker.config.calibration = {"slope": 2.0, "offset": -1.0}
    always = CrossEncoder(reranker.model, reranker.tokenizer, activation_fn="probability")
    expected = reranker.predict(PAIRS, activation_fn="probability")
    np.testing.assert_array_equal(always.predict(PAIRS), expected)
    np.testing.assert_array_equal(np.concatenate([*always.predict_chunks([PAIRS])]), expected)


def test_what_is_not_calibrated_has_no_probability(reranker):
    with pytest.raises(
        ValueError, match="needs a calibrated reranker, and this one is not: fit it with `llama-bidir cal"
    ):
        reranker.predict(PAIRS, activation_fn="probability")
    with pytest.raises(ValueError, match="needs a calibrated reranker"):
        CrossEncoder(reranker.model, reranker.tokenizer, activation_fn="probability")
    with pytest.raises(ValueError, match="must be a function, 'probability' or None, got 'sigmoid'"):
        reranker.rank("q", ["p"], activation_fn="sigmoid")
    with pytest.raises(TypeError, match="must be a function, 'probability' or None, got 5"):
        reranker.predict(PAIRS, activation_fn=5)


@pytest.mark.parametrize(
    "calibration",
    [
        {"slope": 0, "offset": 1},
        {"slope": -1.0, "offset": 0},
        {"slope": 1},
        {"slope": float("nan"), "offset": 0},
        [1, 2],
    ],
)
def test_a_wrong_calibration_is_refused(calibration):
    with pytest.raises(ValueError, match="calibration must be None, or map slope to a finite number above 0"):
        LlamaBidirectionalConfig(calibration=calibration)


@pytest.mark.parametrize("kind", ["saved", "hub", "sentence-transformers", "onnx"])
def test_a_calibration_survives_a_round_trip(reranker, tmp_path, kind):
    reranker.config.calibration = {"slope": 2.0, "offset": -1.0}
    reranker.save_pretrained(tmp_path / "saved")
    folder, options = tmp_path / "saved", {}
    if kind == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        options = {"backend": "onnx"}
    if kind != "saved":
        folder = tmp_path / kind
        export_reranker(tmp_path / "saved", folder, format=kind)
    again = CrossEncoder(folder, **options)
    assert again.config.calibration == {"slope": 2.0, "offset": -1.0}
    expected = reranker.predict(PAIRS, activation_fn="probability")
    np.testing.assert_allclose(again.predict(PAIRS, activation_fn="probability"), expected, rtol=1e-5)
    assert "| Probability of relevance | sigmoid(2 * score + -1) |" in (folder / "README.md").read_text()
    if kind == "onnx":
        inputs = reranker.tokenizer(["question:bees \n \n passage:honey"], return_tensors="np")
        graph = runtime.InferenceSession(folder / "model.onnx")
        given = {name: inputs[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
        np.testing.assert_allclose(graph.run(["probability"], given)[0], [[expected[0]]], rtol=1e-4)


def test_a_calibration_survives_lora_and_merge(base_checkpoint, rows, tmp_path):
    peft = pytest.importorskip("peft")
    model = LlamaBidirectionalForSequenceClassification.from_pretrained(base_checkpoint, rerank_max_length=64)
    lora = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["score"], task_type="SEQ_CLS")
    adapted = CrossEncoder(peft.get_peft_model(model, lora).eval(), AutoTokenizer.from_pretrained(base_checkpoint))
    adapted.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "config.json").read_text())
    (tmp_path / "adapter" / "config.json").write_text(
        json.dumps({**config, "calibration": {"slope": 2.0, "offset": -1.0}})
    )
    adapted.config.calibration = {"slope": 2.0, "offset": -1.0}
    expected = adapted.predict(PAIRS, activation_fn="probability")
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    for folder in ("adapter", "merged"):
        again = CrossEncoder(tmp_path / folder)
        np.testing.assert_allclose(again.predict(PAIRS, activation_fn="probability"), expected, rtol=1e-5)


def test_another_folder_gets_the_whole_reranker_and_keeps_its_dtype(reranker, rows, tmp_path):
    reranker.model.to(torch.bfloat16)
    reranker.save_pretrained(tmp_path / "half")
    before = {path.name: path.read_bytes() for path in (tmp_path / "half").iterdir()}
    result = calibrate_reranker(tmp_path / "half", rows, output=tmp_path / "new", num_rows=40)
    assert {path.name: path.read_bytes() for path in (tmp_path / "half").iterdir()} == before
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == before["model.safetensors"]
    saved = LlamaBidirectionalConfig.from_pretrained(tmp_path / "new").calibration
    assert saved == {"slope": result.slope, "offset": result.offset}
    with pytest.raises(FileExistsError, match="exists: pass overwrite"):
        calibrate_reranker(tmp_path / "half", rows, output=tmp_path / "new")


def test_a_second_calibration_replaces_the_first_one_everywhere(reranker, rows, tmp_path):
    for number in (40, 60):
        result = calibrate_reranker(tmp_path / "model", rows, output=tmp_path / "new", num_rows=number, overwrite=True)
        card = (tmp_path / "new" / "README.md").read_text()
        assert card.count("Probability of relevance") == 1
        assert f"sigmoid({result.slope:.6g} * score" in card
        assert LlamaBidirectionalConfig.from_pretrained(tmp_path / "new").calibration["slope"] == result.slope


def test_rankings_are_those_of_the_logits(reranker, tmp_path):
    """Where probabilities are rounded to 1, evaluation and jobs still rank by the logits."""
    texts = {f"d{number}": f"{word} {number}" for number, word in enumerate(WORDS)}
    run = {"q": {doc_id: -float(place) for place, doc_id in enumerate(texts)}}
    dataset = Dataset(texts, {"q": "bees"}, {"q": {"d7": 1}}, run)
    reranker.config.calibration = {"slope": 500.0, "offset": 5000.0}
    always = CrossEncoder(reranker.model, reranker.tokenizer, activation_fn="probability")
    expected = evaluate_reranker(reranker, dataset)
    for found in (
        evaluate_reranker(always, dataset),
        evaluate_reranker(reranker, dataset, activation_fn="probability"),
    ):
        assert found.after.aggregated == expected.after.aggregated
        assert found.run == expected.run
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in texts.items()))
    (tmp_path / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "bees"}) + "\n")
    (tmp_path / "in.trec").write_text("".join(f"q Q0 {i} {n} {-n} bm25\n" for n, i in enumerate(texts, start=1)))
    orders = []
    for name, scorer in (("a", reranker), ("b", always)):
        files = {part: tmp_path / f"{part}.jsonl" for part in ("corpus", "queries")}
        job = Job(RerankTask(**files, run=tmp_path / "in.trec"), tmp_path / f"{name}.trec")
        run_job(job, scorer, show_progress_bar=False)
        orders.append([line.split()[2] for line in (tmp_path / f"{name}.trec").read_text().splitlines()])
    assert orders[0] == orders[1]


def test_training_drops_a_calibration(reranker, rows, tmp_path, caplog):
    reranker.config.calibration = {"slope": 2.0, "offset": -1.0}
    CrossEncoderTrainer(
        reranker.model,
        CrossEncoderTrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none"),
        [json.loads(rows.read_text().splitlines()[0])],
        processing_class=reranker.tokenizer,
        group_size=2,
    )
    assert reranker.config.calibration is None
    assert "the reranker loses its calibration: calibrate it again" in caplog.text


def test_what_calibrate_refuses(reranker, rows, tmp_path, capsys):
    model, data = str(tmp_path / "model"), str(rows)
    one_kind = tmp_path / "one.jsonl"
    one_kind.write_text(json.dumps({"query": "q", "pos_doc": ["a", "b"]}) + "\n")
    shutil.copytree(model, tmp_path / "labels")
    make_model(num_labels=2).save_pretrained(tmp_path / "labels")
    cases = {
        "one.jsonl: calibration needs relevant and irrelevant pairs, but all 2 are relevant": [model, str(one_kind)],
        "calibration needs one score per pair, but the model has 2 labels": [str(tmp_path / "labels"), data],
        "'nobody/nothing' is not a folder with a config.json to save in: pass output": ["nobody/nothing", data],
    }
    for message, arguments in cases.items():
        assert main(["calibrate", "--model", arguments[0], "--data", arguments[1]]) == 2
        (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("llama-bidir: error")]
        assert message in line
    assert json.loads((tmp_path / "model" / "config.json").read_text())["calibration"] is None

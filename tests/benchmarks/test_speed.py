"""How measurements of speed, memory and training are compared."""

import os
import time

import numpy as np
import pytest
import torch
from helpers import make_model, make_tokenizer
from transformers import LlamaConfig

from benchmarks.implementations import choose
from benchmarks.machine import matmul_speed, peak_above
from benchmarks.models import copy_checkpoint
from benchmarks.peers import Scorer
from benchmarks.report import add_memory, write_markdown
from benchmarks.speed import compare, fastest_size, relative_error, time_workload
from benchmarks.trainers import PACKED, PADDED, PLAIN_LOOP, UNPADDED, Group, Run, Task
from benchmarks.training import add_ratios, summarize
from benchmarks.workloads import Workload
from llama_bidir import CrossEncoder


def row(implementation, dtype, *seconds):
    return {
        "implementation": implementation,
        "dtype": dtype,
        "seconds": min(seconds),
        "seconds_of_rounds": list(seconds),
    }


def test_the_error_is_relative_to_the_spread_of_the_scores():
    expected = np.array([1.0, 3.0, 5.0, 7.0])  # standard deviation: sqrt(5)
    scores = expected + np.array([1.0, -1.0, 3.0, -3.0])  # rms: sqrt(5)
    assert relative_error(scores, expected) == pytest.approx(1.0)


def test_ratios_are_to_sentence_transformers_and_to_the_fastest_peer_of_no_lower_precision():
    ours, theirs, openvino, runtime = "llama-bidir", "sentence-transformers", "openvino", "onnxruntime"
    rows = compare(
        [
            row(ours, "float32", 4.0, 5.0, 6.0),
            row(ours, "int8", 2.0, 2.0, 2.0),
            row(theirs, "float32", 12.0, 10.0, 12.0),
            row(theirs, "bfloat16", 5.0, 6.0, 8.0),
            row(openvino, "float32", 6.0, 8.0, 7.0),
            row(runtime, "int8", 3.0, 3.0, 5.0),
            row("stock-llama", "float32", 1.0, 1.0, 1.0),
        ]
    )
    shown = {(entry["implementation"], entry["dtype"]): entry for entry in rows}
    assert (shown[ours, "float32"]["ratio"], shown[ours, "float32"]["median_ratio"]) == (2.5, 2.0)
    # There is no int8 of sentence-transformers: its first dtype counts.
    assert (shown[ours, "int8"]["ratio"], shown[ours, "int8"]["median_ratio"]) == (5.0, 6.0)
    assert shown[theirs, "bfloat16"]["ratio"] == 1.0
    assert shown[ours, "float32"]["peer"] == "openvino float32"
    assert (shown[ours, "float32"]["peer_ratio"], shown[ours, "float32"]["median_peer_ratio"]) == (1.5, 1.5)
    assert shown[ours, "int8"]["peer"] == "onnxruntime int8"
    assert shown[runtime, "int8"]["peer"] == "sentence-transformers bfloat16"
    assert shown[theirs, "float32"]["peer"] == "openvino float32"


def test_rows_of_different_rounds_have_no_median_ratio():
    earlier = {**row("sentence-transformers", "float32", 6.0, 8.0), "date": "2026-01-01"}
    added, _ = compare([row("llama-bidir", "float32", 3.0, 2.0, 4.0), earlier])
    assert (added["ratio"], added["median_ratio"]) == (3.0, None)
    assert (added["peer_ratio"], added["median_peer_ratio"]) == (3.0, None)


def test_one_implementation_has_no_ratios():
    (alone,) = compare([row("llama-bidir", "float32", 1.0)])
    assert (alone["ratio"], alone["peer"], alone["peer_ratio"]) == (None, None, None)


def test_the_fastest_batch_size_that_fits_counts():
    calls = []

    def score(pairs, size):
        calls.append((len(pairs), size))
        if size == 32:
            raise torch.OutOfMemoryError
        time.sleep({8: 0.02, 16: 0.0}[size])
        return np.zeros(len(pairs))

    pairs = [("q", "p")] * 100
    assert fastest_size(Scorer(None, score, "", (8, 16, 32, 512)), pairs, "cpu") == 16
    assert calls == [(64, 8), (64, 16), (64, 32)]
    assert fastest_size(Scorer(None, score, "", (512,)), pairs, "cpu") == 512
    assert fastest_size(Scorer(None, score, ""), pairs, "cpu") is None


def test_an_implementation_that_fails_in_a_round_is_left_out(base_checkpoint):
    def fail(pairs, size):
        raise RuntimeError("no such kernel")

    good = Scorer(None, lambda pairs, size: np.array([1.0, 3.0]), "at {} pairs", (8,))
    skipped = []
    rows = time_workload(
        {("llama-bidir", "float32"): good, ("openvino", "int8"): Scorer(None, fail, "")},
        Workload("nq", [("a", "b"), ("c", "d")]),
        folder=str(base_checkpoint),
        expected=np.array([1.0, 2.0]),
        rounds=2,
        device="cpu",
        skip=lambda name, reason: skipped.append((name, reason)),
    )
    assert skipped == [(("openvino", "int8"), "RuntimeError: no such kernel")]
    assert [(entry["implementation"], entry["setting"]) for entry in rows] == [("llama-bidir", "at 8 pairs")]
    assert len(rows[0]["seconds_of_rounds"]) == 2
    assert rows[0]["error"] == pytest.approx(np.sqrt(0.5) / 0.5)


def test_a_device_has_its_own_implementations():
    names = ["openvino", "llama-bidir", "vllm"]
    assert choose(names, ["bfloat16", "int8"], "cpu") == [
        ("openvino", "bfloat16"),
        ("llama-bidir", "bfloat16"),
        ("llama-bidir", "int8"),
    ]
    assert choose(names, ["bfloat16"], "cuda") == [("llama-bidir", "bfloat16"), ("vllm", "bfloat16")]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
def test_the_peak_of_a_call_does_not_count_for_the_next_one():
    large, _ = peak_above(lambda: bytearray(64 * 2**20).count(1), "cpu")
    small, result = peak_above(lambda: 7, "cpu")
    assert large >= 63 * 2**20
    assert small < 16 * 2**20
    assert result == 7


def test_tables_take_memory_from_the_separate_process_and_leave_empty_columns_out(tmp_path):
    subject = {"hardware": "card", "model": "10m", "dtype": "float32", "workload": "nq", "pairs": 5}
    speed = [{**subject, "implementation": name, "seconds": 0.5, "pairs_per_second": 10.0} for name in ("a", "b")]
    memory = [{**subject, "implementation": "a", "above_bytes": 3 * 2**20}]
    assert [entry["above_bytes"] for entry in add_memory(speed, memory)] == [3 * 2**20, None]
    write_markdown(tmp_path / "tables.md", {"speed": speed, "memory": memory})
    lines = (tmp_path / "tables.md").read_text().splitlines()
    assert lines[2] == "| model | dtype | workload | implementation | pairs | ms | pairs/s | above MiB |"
    assert lines[4] == "| 10m | float32 | nq | a | 5 | 500.0 | 10.0 | 3 |"
    assert lines[5] == "| 10m | float32 | nq | b | 5 | 500.0 | 10.0 |  |"


def test_training_is_compared_with_the_fastest_peer():
    batches = [[Group("q", ["a", "b"], [10, 20]), Group("q", ["a", "b"], [30, 40])]] * 3
    task = Task("", batches, 2, 512, "float32")
    seconds = {PACKED: 1.0, PADDED: 2.0, PLAIN_LOOP: 4.0, UNPADDED: 1.6}
    runs = {name: [Run(value, [], 0, 5)] for name, value in seconds.items()}
    rows = {entry["implementation"]: entry for entry in summarize(runs, task)}
    assert rows[PACKED]["groups_per_second"] == 4.0
    assert rows[PACKED]["tokens_per_second"] == 200.0
    # Batches of four pairs of at most 40 tokens.
    assert [rows[name]["padding"] for name in (PACKED, PADDED, UNPADDED)] == [0.0, 1 - 100 / 160, 0.0]
    assert (rows[PACKED]["peer"], rows[PACKED]["ratio_to_peer"], rows[PACKED]["ratio_to_padded"]) == (UNPADDED, 1.6, 2)
    one_by_one = [summarize({name: rounds}, task)[0] for name, rounds in runs.items()]
    ratios = {entry["implementation"]: entry["ratio_to_peer"] for entry in add_ratios(one_by_one)}
    assert ratios == pytest.approx({PACKED: 1.6, PADDED: 0.8, PLAIN_LOOP: 0.4, UNPADDED: 1.0})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_speed_of_matrix_products_is_measured_in_each_dtype(dtype):
    config = LlamaConfig(hidden_size=32, intermediate_size=32)
    assert matmul_speed(config, dtype, "cpu") > 0


@pytest.mark.parametrize(
    ("fields", "subfolder"), [({}, True), ({"prompt_template": "{query} {passage}"}, False), ({"num_labels": 2}, False)]
)
def test_a_trained_reranker_is_compared_only_if_the_peers_compute_its_scores(tmp_path, fields, subfolder):
    source, folder = tmp_path / "source", tmp_path / "folder"
    CrossEncoder(make_model(**fields), make_tokenizer(pad_token="<|pad|>")).save_pretrained(source)
    folder.mkdir()
    if subfolder:
        (source / "onnx").mkdir()
        copy_checkpoint(source, folder)
        assert not (folder / "onnx").exists()
        assert not (folder / "chat_template.jinja").exists()
        assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    else:
        with pytest.raises(ValueError, match="the default prompt and one label"):
            copy_checkpoint(source, folder)

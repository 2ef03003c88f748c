"""The study of ranking quality: its cells, its rows and its tables."""

import gzip
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from benchmarks import study
from benchmarks.cells import Cells
from benchmarks.findings import by_setting, compare_sets, compare_settings, effect, pooled, same_seeds
from benchmarks.study import BASE, Cell, decode_values, encode_values, write_rows
from llama_bidir import CrossEncoder
from llama_bidir.training.recipes import load_recipe

CELL = Cell(layers=1, steps=10, groups=2, learning_rate=1e-3, max_length=32)
QUALITIES = np.array([[0.2, 0.4, 0.9, 0.5], [0.6, 0.6, 1.0, 0.7]])  # of a causal and of a bidirectional run


def row(cell, values):
    values = {f"q{number}": value for number, value in enumerate(values)}
    bm25 = encode_values(dict.fromkeys(values, 0.5))
    sets = {"nq": {"nDCG@10": np.mean([*values.values()]), "per_query": encode_values(values), "bm25_per_query": bm25}}
    return {**asdict(cell), "sets": sets, "training_seconds": 120.0}


@pytest.mark.parametrize("device", BASE)
def test_cells_differ_and_begin_with_the_mask(device):
    base = BASE[device]
    cells = study.cells(base, study.SCORED_ROWS[device])
    assert len({cell.name for cell in cells}) == len(set(cells)) == len(cells)
    assert [cell.loss for cell in cells if cell.layers < base.layers] == ["listwise_cross_entropy", "mse", "kl_div"]
    whole = [cell.layers for cell in cells if cell.layers > base.layers]
    assert whole == ([30] if device == "cpu" else [])
    assert [cell.negatives for cell in cells if cell.needs_teacher] == [
        "mined",
        *["mined"] * len(whole),
        "mixed",
        "mixed",
    ]
    assert [(cell.mask, cell.pooling, cell.seed) for cell in cells[:6]] == [
        (mask, pooling, seed) for seed in range(3) for mask, pooling in (("bidirectional", "avg"), ("causal", "last"))
    ]
    assert all(cell.groups * cell.group_size == base.groups * base.group_size for cell in cells)


def test_a_cell_is_a_recipe(tmp_path):
    causal = replace(CELL, mask="causal", pooling="last", tuning="lora")
    path = tmp_path / "recipe.json"
    recipe = causal.recipe(
        tmp_path / "base", {tmp_path / "a.jsonl": 0.5}, tmp_path / "held-out.jsonl", tmp_path / "out"
    )
    path.with_suffix(".yaml").write_text(json.dumps(recipe))
    loaded = load_recipe(path.with_suffix(".yaml"))
    assert (loaded.model.is_causal, loaded.model.pooling, loaded.training.warmup_steps) == (True, "last", 1)
    assert loaded.data.train == [{"path": str(tmp_path / "a.jsonl"), "weight": 0.5}]
    assert loaded.lora == {"r": 16, "lora_alpha": 32}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "MIXES", {"mix": {"a": 1.0, "b": 2.0}})
    monkeypatch.setattr(study, "HELD_OUT_GROUPS", 8)
    for name, count in (("a", 20), ("b", 30)):
        with gzip.open(tmp_path / f"{name}-train.jsonl.gz", "wt") as file:
            for number in range(count):
                passages = {"pos_doc": [f"{name}{number} +"], "neg_doc": [f"{name}{number} -", f"{name}{number} --"]}
                file.write(json.dumps({"query": f"{name}{number}", **passages}) + "\n")
    return tmp_path


@pytest.mark.parametrize("negatives", ["bm25", "mixed"])
def test_held_out_rows_are_not_trained_on(data, negatives):
    cell = replace(CELL, mix="mix", negatives=negatives)
    weights, held_out = write_rows(cell, data, data / "rows", None)
    assert [(path.name, weight) for path, weight in weights.items()] == [("a.jsonl", 1.0), ("b.jsonl", 2.0)]
    trained = [json.loads(line) for path in weights for line in path.read_text().splitlines()]
    held = [json.loads(line) for line in held_out.read_text().splitlines()]
    queries = [each["query"] for each in held]
    assert [query[0] for query in queries] == ["a"] * 2 + ["b"] * 6  # in proportion to 20 x 1 and 30 x 2
    assert sorted(queries + [each["query"] for each in trained]) == sorted(
        [f"a{number}" for number in range(20)] + [f"b{number}" for number in range(30)]
    )
    for each in trained:
        own, others = each["neg_doc"][:2], each["neg_doc"][2:]
        assert own == [f"{each['query']} -", f"{each['query']} --"]
        assert len(others) == (2 if negatives == "mixed" else 0)
        # Random negatives are positives of other rows of the same set.
        assert all(other[0] == each["query"][0] and other.endswith(" +") for other in others)
        assert each["pos_doc"][0] not in others
    assert all(len(each["neg_doc"]) == 2 for each in held)


def test_a_teacher_scores_rows_once(data, reranker_checkpoint, monkeypatch):
    scored = replace(CELL, mix="mix", loss="mse", rows=9)
    weights, _ = write_rows(scored, data, data / "rows", reranker_checkpoint)
    assert [*weights.values()] == [1.0, 1.0]
    rows = [json.loads(line) for path in weights for line in path.read_text().splitlines()]
    assert [row["query"][0] for row in rows] == ["a"] * 2 + ["b"] * 7
    for row in rows:
        assert 0 < len(row["neg_doc"]) == len(row["neg_score"]) <= 4  # less those of the same words
        expected = CrossEncoder(reranker_checkpoint).predict([(row["query"], text) for text in row["neg_doc"]])
        np.testing.assert_allclose(row["neg_score"], expected, rtol=1e-5)
    mined, _ = write_rows(replace(scored, loss="ranknet", negatives="mined"), data, data / "rows", reranker_checkpoint)
    kept = [json.loads(line) for path in mined for line in path.read_text().splitlines()]
    assert 0 < len(kept) <= 9
    assert all(score < row["pos_score"][0] for row in kept for score in row["neg_score"])
    # The second time, the files are there.
    monkeypatch.setattr(study, "CrossEncoder", None)
    assert write_rows(scored, data, data / "rows", reranker_checkpoint)[0] == weights


def test_a_row_of_any_machine_counts(tmp_path):
    for hardware, is_missing in (("one", True), ("another", False)):
        cells = Cells(tmp_path / "cells.json", "quality", {"hardware": hardware}, asdict(CELL), by_hardware=False)
        assert cells.is_missing(**asdict(CELL)) == is_missing
        cells.add([asdict(CELL)])


def test_values_of_queries_survive_the_file():
    values = {"a": 1.0, "b": 0.0, "c": 0.63093, "d": 0.5}
    assert encode_values(values) == "1 0 0.6309 0.5"
    assert decode_values(encode_values(values)) == [1.0, 0.0, 0.6309, 0.5]


def test_an_effect_is_that_of_scipy():
    before, after = QUALITIES
    found = effect(after, before)
    # Differences 0.4, 0.2, 0.1, 0.2: mean 0.225, standard error 0.0629; Student's t has 3.182 for three degrees.
    assert found.difference == pytest.approx(0.225)
    assert (found.low, found.high) == pytest.approx((0.225 - 3.1824 * 0.06292, 0.225 + 3.1824 * 0.06292), abs=1e-4)
    assert found.p_value == pytest.approx(2 / 16, abs=0.02)  # two of the sixteen assignments of signs


def test_runs_are_compared_seed_by_seed():
    causal = replace(CELL, mask="causal", pooling="last")
    rows = [row(replace(CELL, seed=seed), QUALITIES[1] - 0.1 * seed) for seed in range(3)] + [row(causal, QUALITIES[0])]
    groups = by_setting(rows)
    assert [(setting.mask, len(group)) for setting, group in groups.items()] == [("bidirectional", 3), ("causal", 1)]
    run, baseline = same_seeds(groups[CELL], groups[causal])
    assert [each["seed"] for each in (*run, *baseline)] == [0, 0]
    np.testing.assert_allclose(pooled(groups[CELL]), QUALITIES[1] - 0.1)  # the mean over the seeds
    lines = compare_sets(run, baseline, ("after", "before"), "per_query")
    assert lines[2].startswith("| nq | 4 | 0.500 | 0.725 | +0.225 (+0.025 to +0.425) | 0.12")
    assert lines[-1] == "| mean of the sets | | 0.500 | 0.725 | +0.225 | |"
    table = compare_settings(groups, CELL)
    assert table[2] == "| none | 3 | 0.625 | | | 2 |"
    assert table[3].startswith("| mask causal, pooling last | 1 | 0.500 | -0.225 (-0.425 to -0.025) | 0.12")
    assert math.isclose(float(table[3].split("|")[-2]), 2)

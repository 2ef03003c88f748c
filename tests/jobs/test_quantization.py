"""quantize: equal scores in floating point, smaller errors in int8, for every site that is smoothed."""

import json

import numpy as np
import pytest
import torch
from helpers import PAIRS, ROWS, lines, make_model, make_tokenizer, names, write

from llama_bidir import CrossEncoder
from llama_bidir.checkpoints.smoothing import find_sites, smooth
from llama_bidir.cli import main
from llama_bidir.jobs import quantization
from llama_bidir.jobs.quantization import choose_skipped, quantize_reranker, read_calibration_pairs
from llama_bidir.scoring.int8 import check_int8_device, in_int8

try:
    check_int8_device(torch.device("cpu"))
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)


def outlier_model(**fields):
    """A model with a few channels that are 32 times as large as the others in each activation, as trained ones have."""
    model = make_model(attention_bias=True, mlp_bias=True, **fields)
    for layer in model.model.layers:
        with torch.no_grad():
            layer.input_layernorm.weight[3] = 32
            layer.post_attention_layernorm.weight[[5, 17]] = 32
            layer.self_attn.v_proj.weight[2] *= 32
            layer.self_attn.v_proj.bias[2] = 8
            layer.mlp.up_proj.weight[[1, 30]] *= 32
            for part, channels in (("q", [3]), ("k", [3]), ("v", [3])):
                layer.self_attn.get_submodule(f"{part}_proj").weight[:, channels] /= 32
            for projection in (layer.mlp.gate_proj, layer.mlp.up_proj):
                projection.weight[:, [5, 17]] /= 32
    return model


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    folder = tmp_path / "reranker"
    outlier_model().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "pairs.jsonl", lines(*({"query": query, "passage": passage} for query, passage in PAIRS)))


def test_scores_stay_and_int8_rounds_less(checkpoint, data, tmp_path):
    result = quantize_reranker(checkpoint, data, tmp_path / "out")
    assert result.errors["after"] < result.errors["before"] / 2
    assert result.num_pairs == len(PAIRS)
    for dtype in ("float32", "bfloat16"):
        before, after = (CrossEncoder(each, device="cpu", dtype=dtype) for each in (checkpoint, tmp_path / "out"))
        assert np.array_equal(after.predict(PAIRS), before.predict(PAIRS)), dtype
    stored = CrossEncoder(tmp_path / "out", device="cpu", dtype="auto").model
    assert stored.dtype == torch.bfloat16  # nothing is rounded, so nothing needs more bits
    assert stored.config.int8_skip_modules == result.skip_modules
    exact = CrossEncoder(checkpoint, device="cpu", dtype="float32").predict(PAIRS)
    error = CrossEncoder(tmp_path / "out", device="cpu", dtype="int8").predict(PAIRS) - exact
    assert np.sqrt(np.mean(error**2)) / exact.std() == pytest.approx(result.errors["after"], rel=1e-3)


def test_int8_skips_what_changes_the_scores_most(tokenizer, monkeypatch):
    reranker = CrossEncoder(outlier_model(), tokenizer, device="cpu")
    expected, errors = reranker.predict(PAIRS), {}
    for layer in (0, 1):
        attention = [f"layers.{layer}.self_attn.{part}_proj" for part in "qkv"]
        for site in (attention, [f"layers.{layer}.mlp.down_proj"]):
            with in_int8(reranker.model.model, site):
                errors[tuple(site)] = quantization._error(reranker.predict(PAIRS), expected)
    assert np.array_equal(reranker.predict(PAIRS), expected)  # the layers are back
    order = sorted(errors, key=lambda site: -errors[site])
    left = np.sqrt(sum(errors[site] ** 2 for site in order[2:]))
    monkeypatch.setattr(quantization, "TARGET_ERROR", left * 1.001)
    assert choose_skipped(reranker, PAIRS) == [*order[0], *order[1]]
    monkeypatch.setattr(quantization, "TARGET_ERROR", 1.0)
    assert choose_skipped(reranker, PAIRS) == []


def test_each_site_is_smoothed_by_powers_of_two(tokenizer):
    model, smoothed = outlier_model(), outlier_model()
    ids = [torch.tensor([tokenizer(" ".join(pair))["input_ids"]]) for pair in PAIRS]

    @torch.no_grad()
    def calibrate():
        for each in ids:
            smoothed.model(input_ids=each)

    smooth(smoothed.model, calibrate)
    sites = list(find_sites(smoothed.model))
    assert [len(site.consumers) for site in sites] == [3, 1, 2, 1] * 2
    for site in sites:
        for name in site.consumers:
            ratio = smoothed.model.get_submodule(name).weight / model.model.get_submodule(name).weight
            exponents = ratio.log2()
            assert torch.equal(exponents, exponents.round())
            by_output = exponents - exponents[0]  # not 0 for a layer that produces the input of the next site
            assert (by_output == by_output[:, :1]).all()  # one factor per input channel and one per output channel
            assert (ratio != 1).any(), name
    for each in ids:
        with torch.no_grad():
            assert torch.equal(smoothed(input_ids=each).logits, model(input_ids=each).logits)


def test_rows_are_calibration_pairs_too(tmp_path, load):
    rows = write(tmp_path / "rows.jsonl", lines(*ROWS))
    pairs = list(read_calibration_pairs(rows, 1000))
    assert len(pairs) == len(ROWS)
    for (query, passage), row in zip(pairs, ROWS, strict=True):
        assert query == row["query"]
        assert passage in [*row["pos_doc"], *row["neg_doc"]]
    assert len({passage in row["pos_doc"] for (_, passage), row in zip(pairs, ROWS, strict=True)}) == 2
    for half in (pairs[::2], pairs[1::2]):
        positives = {passage for row in ROWS for passage in row["pos_doc"]}
        assert {passage in positives for _, passage in half} >= {True}
    middle = ROWS[len(ROWS) // 2]
    assert list(read_calibration_pairs(rows, 2)) == [pairs[0], (middle["query"], middle["pos_doc"][0])]


def test_rows_keep_their_instructions(tmp_path):
    rows = [{**row, "instruction": f"Find {number}." if number % 2 else None} for number, row in enumerate(ROWS)]
    pairs = list(read_calibration_pairs(write(tmp_path / "rows.jsonl", lines(*rows)), 1000))
    assert [pair[2:] for pair in pairs] == [(f"Find {number}.",) if number % 2 else () for number in range(len(ROWS))]
    reranker = CrossEncoder(
        make_model(prompt_template="{instruction} {query} {passage}", rerank_max_length=48),
        make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"),
    )
    expected = [reranker.predict([pair[:2]], instruction="".join(pair[2:]) or None)[0] for pair in pairs]
    np.testing.assert_allclose(quantization._score(reranker, pairs), expected, rtol=1e-5)
    plain = write(tmp_path / "pairs.jsonl", lines({"query": "q", "passage": "p", "instruction": "Find it."}))
    assert list(read_calibration_pairs(plain, 1)) == [("q", "p", "Find it.")]


def test_half_of_many_pairs_is_held_out():
    pairs = [(str(number), "") for number in range(64)]
    calibration, held_out = quantization._split(pairs, 32)
    assert not set(calibration) & set(held_out)
    assert len(calibration) == len(held_out) == 32
    assert quantization._split(pairs[:31], 32) == (pairs[:31], pairs[:31])
    assert quantization._split(pairs[:8], 4) == (pairs[:8:2], pairs[1:8:2])
    assert quantization._split(pairs[:7], 4) == (pairs[:7], pairs[:7])


def test_the_command_prints_what_changed(checkpoint, data, tmp_path, capsys):
    arguments = ["quantize", "--model", str(checkpoint), "--data", str(data), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["scores", "error", "on", "4", "calibration", "pairs"]
    assert [line.split("  ")[0] for line in printed[1:4]] == ["float32", "int8, before", "int8, after"]
    assert printed[4].startswith("int8 skips ")
    assert printed[5] == f"reranker: {tmp_path / 'out'}"
    assert main(arguments) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"query": "a", "passage": "b"}\n{"query": "a"}\n', r"pairs\.jsonl:2: passage must be a string, got None"),
        ('{"query": 1, "passage": "b"}\n', r"pairs\.jsonl:1: query must be a string, got int 1"),
        ("[]\n", r"pairs\.jsonl:1: a line must be one JSON object"),
        ("", r"the file has no rows"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(checkpoint, tmp_path, content, message):
    with pytest.raises((ValueError, TypeError), match=message):
        quantize_reranker(checkpoint, write(tmp_path / "pairs.jsonl", content), tmp_path / "out")
    assert names(tmp_path) == ["pairs.jsonl", "reranker"]


def test_pairs_of_one_score_are_refused(checkpoint, tmp_path):
    data = write(tmp_path / "pairs.jsonl", lines({"query": "a", "passage": "b"}))
    with pytest.raises(ValueError, match="the pairs all have the same score: give at least two pairs with different"):
        quantize_reranker(checkpoint, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_in_another_dtype_is_kept(tokenizer, data, tmp_path):
    folder = tmp_path / "mixed"
    model = outlier_model()
    model.model.to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    quantize_reranker(folder, data, tmp_path / "out")
    before, after = (CrossEncoder(each, device="cpu", dtype="float32") for each in (folder, tmp_path / "out"))
    assert np.array_equal(after.predict(PAIRS), before.predict(PAIRS))


def test_weights_beyond_the_range_of_their_dtype_are_refused(checkpoint, data, tmp_path, monkeypatch):
    smooth_model = quantization._smooth

    def lose(cross_encoder, pairs):
        smooth_model(cross_encoder, pairs)
        cross_encoder.model.model.layers[0].mlp.up_proj.weight.data[0] *= 2

    monkeypatch.setattr(quantization, "_smooth", lose)
    with pytest.raises(RuntimeError, match="the scores of the new checkpoint differ by up to"):
        quantize_reranker(checkpoint, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_collection_shows_the_ranking(checkpoint, data, tmp_path):
    folder = tmp_path / "collection"
    write(folder / "corpus.jsonl", lines(*({"_id": f"d{n}", "text": passage} for n, (_, passage) in enumerate(PAIRS))))
    write(folder / "queries.jsonl", lines({"_id": "q", "text": PAIRS[0][0]}))
    write(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\nq\td0\t1\n")
    write(folder / "run.trec", "".join(f"q Q0 d{n} {n + 1} {9 - n} bm25\n" for n in range(len(PAIRS))))
    result = quantize_reranker(checkpoint, data, tmp_path / "out", collection=folder)
    assert list(result.measures) == ["float32", "before", "after"]
    passages = [passage for _, passage in PAIRS]
    ranked = CrossEncoder(checkpoint, device="cpu", dtype="float32").rank(PAIRS[0][0], passages)
    rank = [each["corpus_id"] for each in ranked].index(0) + 1
    assert result.measures["float32"] == pytest.approx(1 / np.log2(rank + 1))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["int8_skip_modules"] == result.skip_modules

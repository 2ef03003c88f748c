"""ONNX: the graph that onnxruntime runs."""

import copy
import pickle

import numpy as np
import pytest
from helpers import PAIRS
from transformers import AutoTokenizer

from llama_bidir import CrossEncoder
from llama_bidir.checkpoints.export import export_reranker
from llama_bidir.jobs.scoring import describe_scoring


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pooling", "fields"),
    [("avg", {"temperature": 0.3}), ("last", {"num_labels": 2, "int8_skip_modules": ["layers.1.self_attn.k_proj"]})],
)
def test_onnxruntime_gives_the_same_scores(save, tmp_path, pooling, fields):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    folder, scores = save(pooling=pooling, **fields)
    export_reranker(folder, tmp_path / "onnx", format="onnx", int8=True)
    exported = CrossEncoder(tmp_path / "onnx", backend="onnx")
    np.testing.assert_allclose(exported.predict(PAIRS), scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(exported.predict(PAIRS[0]), scores[0], rtol=1e-4, atol=1e-5)
    int8 = CrossEncoder(tmp_path / "onnx", backend="onnx", model_kwargs={"file_name": "model_int8.onnx"})
    assert np.abs(int8.predict(PAIRS) - scores).max() > 1e-5  # it is not the other graph
    exact, rounded = (
        {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(tmp_path / "onnx" / file).graph.initializer}
        for file in ("model.onnx", "model_int8.onnx")
    )
    int8_weights = [name.removesuffix("_quantized") for name in rounded if name.endswith("_quantized")]
    int8_weights.remove("reranker.model.embed_tokens.weight")  # unsigned, with one scale
    # Of each layer all but the down projection, and without what the configuration skips.
    assert len(int8_weights) == 2 * 6 - len(fields.get("int8_skip_modules", []))
    assert [weight.shape for weight in rounded.values() if weight.dtype == np.float32].count((48, 32)) == 2
    for name in int8_weights:
        assert rounded[f"{name}_quantized"].dtype == np.int8
        assert not rounded[f"{name}_zero_point"].any()
        scale = rounded[f"{name}_scale"]  # by output channel
        error = np.abs(rounded[f"{name}_quantized"].astype(np.float32) * scale - exact[name])
        assert (error <= 0.501 * scale).all()


def test_a_folder_without_a_graph_is_refused(save):
    pytest.importorskip("onnxruntime")
    folder, _ = save()
    with pytest.raises(FileNotFoundError, match=r"has no model\.onnx: llama-bidir export --format onnx writes one"):
        CrossEncoder(folder, backend="onnx")


def test_a_graph_scores_padded_batches_and_says_what_it_cannot_do(graph_folder, tmp_path):
    reranker = CrossEncoder(graph_folder, backend="onnx")
    tokenizer, template = AutoTokenizer.from_pretrained(graph_folder), reranker.config.prompt_template
    texts = [template.format(query=query, passage=passage) for query, passage in PAIRS]
    sums = [sum(ids) for ids in tokenizer(texts, truncation=True, max_length=64)["input_ids"]]
    assert reranker.predict(PAIRS).tolist() == sums
    with pytest.raises(ValueError, match="backend 'onnx' computes on the CPU: leave device out, got 'cuda:1'"):
        reranker.predict(PAIRS, device="cuda:1")
    with pytest.raises(TypeError, match="a job that resumes needs backend 'torch'"):
        describe_scoring(reranker)
    with pytest.raises(TypeError, match="is not saved again: copy its folder"):
        reranker.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="backend 'onnx' takes no attn_implementation"):
        CrossEncoder(graph_folder, backend="onnx", model_kwargs={"attn_implementation": "eager"})
    with pytest.raises(ValueError, match="backend 'onnx' computes on the CPU"):
        CrossEncoder(graph_folder, backend="onnx", device="cuda")


def test_copies_open_the_graph_again(graph_folder):
    reranker = CrossEncoder(graph_folder, backend="onnx")
    for copied in (pickle.loads(pickle.dumps(reranker)), copy.deepcopy(reranker)):
        assert copied.model is not reranker.model
        np.testing.assert_array_equal(copied.predict(PAIRS), reranker.predict(PAIRS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tensorrt"}, "format must be one of sentence-transformers, vllm, onnx, hub, got 'tensorrt'"),
        ({"format": "onnx", "dtype": "bfloat16"}, "an ONNX graph is written in float32: leave dtype out, got 'bfloat1"),
        ({"format": "hub", "int8": True}, "int8 is an option of the format onnx, not of hub"),
    ],
)
def test_options_of_another_format_are_refused_before_the_model_is_loaded(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_reranker(tmp_path / "missing", tmp_path / "out", **options)

"""ONNX: the graph that onnxruntime runs."""

import numpy as np
import pytest
from helpers import PAIRS

from llama_bidir import CrossEncoder, LlamaBidirectionalConfig
from llama_bidir.checkpoints import loading
from llama_bidir.checkpoints.export import export_reranker
from llama_bidir.checkpoints.onnx import OnnxReranker
from llama_bidir.jobs.scoring import describe_scoring


@pytest.mark.slow
@pytest.mark.parametrize(("pooling", "fields"), [("avg", {"temperature": 0.3}), ("last", {"num_labels": 2})])
def test_onnxruntime_gives_the_same_scores(save, tmp_path, pooling, fields):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from onnx import TensorProto, load

    folder, scores = save(pooling=pooling, **fields)
    export_reranker(folder, tmp_path / "onnx", format="onnx", int8=True)
    exported = CrossEncoder(tmp_path / "onnx", backend="onnx")
    np.testing.assert_allclose(exported.predict(PAIRS), scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(exported.predict(PAIRS[0]), scores[0], rtol=1e-4, atol=1e-5)
    drift = CrossEncoder(tmp_path / "onnx", backend="onnx", model_kwargs={"file_name": "model_int8.onnx"})
    assert 1e-5 < np.abs(drift.predict(PAIRS) - scores).max() < 0.5 * np.abs(scores).max()
    weights = [
        (each.data_type, list(each.dims))
        for each in load(tmp_path / "onnx" / "model_int8.onnx", load_external_data=False).graph.initializer
    ]
    assert weights.count((TensorProto.FLOAT, [48, 32])) == 2  # the down projection of each layer
    assert weights.count((TensorProto.INT8, [32, 48])) == 4  # gate and up
    with pytest.raises(TypeError, match="is not saved again: copy its folder"):
        exported.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="backend 'onnx' takes no attn_implementation"):
        CrossEncoder(tmp_path / "onnx", backend="onnx", model_kwargs={"attn_implementation": "eager"})
    with pytest.raises(ValueError, match="backend 'onnx' computes on the CPU"):
        CrossEncoder(tmp_path / "onnx", backend="onnx", device="cuda")


def test_a_folder_without_a_graph_is_refused(save):
    pytest.importorskip("onnxruntime")
    folder, _ = save()
    with pytest.raises(FileNotFoundError, match=r"has no model\.onnx: llama-bidir export --format onnx writes one"):
        CrossEncoder(folder, backend="onnx")


def test_what_an_exported_graph_cannot_do_is_told(save, tmp_path, monkeypatch):
    folder, _ = save()
    config = LlamaBidirectionalConfig.from_pretrained(folder)
    graph = OnnxReranker.__new__(OnnxReranker)  # without onnxruntime, which is not needed to refuse
    graph.config = config
    monkeypatch.setattr(loading, "load_onnx", lambda *args, **kwargs: graph)
    reranker = CrossEncoder(folder, backend="onnx")
    with pytest.raises(ValueError, match="backend 'onnx' computes on the CPU: leave device out"):
        reranker.predict(PAIRS, device="cuda:1")
    with pytest.raises(TypeError, match="a job that resumes needs backend 'torch'"):
        describe_scoring(reranker)

"""Fixtures of the tests of checkpoints."""

import pytest
from helpers import PAIRS, make_model, make_tokenizer

from llama_bidir import CrossEncoder


@pytest.fixture
def save(tmp_path):
    """Saves a tiny reranker and returns its folder and scores."""

    def save(pairs=PAIRS, **fields):
        tokenizer = make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")
        reranker = CrossEncoder(make_model(rerank_max_length=64, **fields), tokenizer)
        reranker.save_pretrained(tmp_path / "reranker")
        return tmp_path / "reranker", reranker.predict(pairs)

    return save


@pytest.fixture
def graph_folder(save):
    """A folder with an ONNX graph that sums the token ids of each sequence, so that its scores are known."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor, make_tensor_value_info

    integers, floats = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    nodes = [
        make_node("Mul", ["input_ids", "attention_mask"], ["ids"]),
        make_node("ReduceSum", ["ids", "axis"], ["sums"], keepdims=1),
        make_node("Cast", ["sums"], ["logits"], to=floats),
    ]
    inputs = [make_tensor_value_info(name, integers, ["batch", "length"]) for name in ("input_ids", "attention_mask")]
    outputs = [make_tensor_value_info("logits", floats, ["batch", 1])]
    graph = make_graph(nodes, "sums", inputs, outputs, [make_tensor("axis", integers, [1], [1])])
    folder, _ = save()
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", 18)], ir_version=9), folder / "model.onnx")
    return folder

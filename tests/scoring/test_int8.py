"""dtype int8: exact products of rounded values, scores that do not depend on neighbours, and what is refused."""

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers import PAIRS, make_model
from torch import nn

from llama_bidir import CrossEncoder
from llama_bidir.jobs.scoring import describe_scoring
from llama_bidir.scoring import forward, int8
from llama_bidir.scoring.forward import is_plain
from llama_bidir.scoring.int8 import Int8Linear, SkippedLinear, quantize_rows

try:
    int8.check_int8_device(torch.device("cpu"))
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture
def reranker(model, tokenizer):
    return CrossEncoder(model, tokenizer, max_length=64, device="cpu", dtype="int8")


def test_rows_are_rounded_to_their_own_scale():
    rows = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-3, 254e-3, -127e-3]])
    values, scales = quantize_rows(rows)
    # 1 / (2 / 127) = 63.5, which rounds to the even 64; 0.5 / (2 / 127) = 31.75
    assert values.tolist() == [[64, -127, 32], [0, 0, 0], [0, 127, -64]]
    torch.testing.assert_close(scales[[0, 2], 0], torch.tensor([2 / 127, 254e-3 / 127]))


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 1e-30, 1e-20, 3e38])
def test_rows_of_any_magnitude_have_finite_products(magnitude):
    rows = torch.tensor([[magnitude, -magnitude]])
    values, scales = quantize_rows(rows)
    assert scales.item() > 0
    assert (values * scales - rows).abs().max() <= max(magnitude / 254, 1e-30)
    assert values[0].tolist() == ([127, -127] if magnitude >= 1e-30 else [0, 0])


@pytest.mark.parametrize("num_rows", [1, 3, 700])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_layer_multiplies_the_rounded_values_exactly(num_rows, has_bias):
    torch.manual_seed(0)
    layer, rows = nn.Linear(96, 40, bias=has_bias), torch.randn(num_rows, 96)
    (values, scales), (weight, weight_scales) = quantize_rows(rows), quantize_rows(layer.weight.detach())
    expected = (values.double() @ weight.double().t()) * scales.double() * weight_scales[:, 0].double()
    if has_bias:
        expected += layer.bias.detach().double()
    output = Int8Linear(layer.weight, layer.bias)(rows[None])
    assert output.shape == (1, num_rows, 40)
    torch.testing.assert_close(output[0].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True, "mlp_bias": True}, {"pooling": "last"}])
def test_scores_are_near_those_of_float32(tokenizer, fields):
    model = make_model(**fields)
    exact = CrossEncoder(model, tokenizer, max_length=64, device="cpu").predict(PAIRS)
    scores = CrossEncoder(model, tokenizer, max_length=64, device="cpu", dtype="int8").predict(PAIRS)
    error = np.sqrt(np.mean((scores - exact) ** 2)) / exact.std()
    assert 0 < error < 0.1


@pytest.mark.parametrize(
    "skipped",
    [
        [],
        ["layers.0.self_attn.q_proj", "layers.0.mlp.gate_proj", "layers.1.self_attn.v_proj", "layers.1.mlp.down_proj"],
    ],
)
@pytest.mark.parametrize(("in_bfloat16", "tolerance"), [(False, 1e-4), (True, 0.05)])
def test_scoring_computes_what_the_layers_do(tokenizer, monkeypatch, in_bfloat16, tolerance, skipped):
    monkeypatch.setattr(int8, "multiplies_bfloat16_faster", lambda: in_bfloat16)
    model = make_model(int8_skip_modules=skipped)
    reranker = CrossEncoder(model, tokenizer, max_length=64, device="cpu", dtype="int8")
    monkeypatch.setattr(forward, "_attends_in_bfloat16", lambda: in_bfloat16)
    scores = reranker.predict(PAIRS)
    assert is_plain(reranker.model)
    reranker.model.register_forward_hook(lambda *arguments: None)
    assert not is_plain(reranker.model)  # so transformers' modules compute it, with attention in float32
    assert np.abs(reranker.predict(PAIRS) - scores).max() / np.abs(scores).max() < tolerance


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_a_score_does_not_depend_on_its_neighbours(reranker, batch_size):
    scores = reranker.predict(PAIRS * 9)
    alone = np.array([reranker.predict(pair) for pair in PAIRS])
    np.testing.assert_allclose(scores, np.tile(alone, 9), rtol=1e-5)
    np.testing.assert_allclose(reranker.predict(PAIRS, batch_size), alone, rtol=1e-5)


def test_the_callers_model_stays_in_float32(model, tokenizer):
    before = copy.deepcopy(model.state_dict())
    CrossEncoder(model, tokenizer, device="cpu", dtype="int8").predict(PAIRS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not int8.is_int8(model)


def test_layers_that_the_configuration_names_are_skipped(tokenizer, tmp_path):
    make_model(int8_skip_modules=["layers.1.mlp.down_proj"]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reranker = CrossEncoder(tmp_path, device="cpu", dtype="int8")
    kinds = {name: type(module) for name, module in reranker.model.model.named_modules() if name.endswith("_proj")}
    assert len(kinds) == 14
    assert [name for name, kind in kinds.items() if kind is SkippedLinear] == ["layers.1.mlp.down_proj"]
    assert [name for name, kind in kinds.items() if kind is not Int8Linear] == ["layers.1.mlp.down_proj"]
    exact = CrossEncoder(tmp_path, device="cpu", dtype="float32").predict(PAIRS)
    assert np.sqrt(np.mean((reranker.predict(PAIRS) - exact) ** 2)) / exact.std() < 0.1


def test_a_checkpoint_that_was_not_made_for_int8_says_so(reranker_checkpoint, tmp_path, tokenizer, caplog):
    CrossEncoder(reranker_checkpoint, device="cpu", dtype="int8")
    assert "was not made for int8, which may change its ranking: `llama-bidir quantize` writes" in caplog.text
    caplog.clear()
    make_model(int8_skip_modules=[]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    CrossEncoder(tmp_path, device="cpu", dtype=torch.int8)
    assert caplog.text == ""


def test_an_adapter_is_merged_first(tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(make_model(), config)
    merged = copy.deepcopy(adapted).merge_and_unload()
    expected = CrossEncoder(merged, tokenizer, device="cpu", dtype="int8").predict(PAIRS)
    found = CrossEncoder(adapted, tokenizer, device="cpu", dtype="int8")
    np.testing.assert_allclose(found.predict(PAIRS), expected, rtol=1e-5)
    assert type(found.model.model.layers[0].self_attn.q_proj) is Int8Linear


def test_an_adapter_within_the_model_is_refused(tokenizer):
    peft = pytest.importorskip("peft")
    model = make_model()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj is a Linear or belongs to one: merge the adapter"
    ):
        CrossEncoder(model, tokenizer, device="cpu", dtype="int8")


def test_model_kwargs_choose_it_too(reranker_checkpoint, monkeypatch):
    for dtype in ("int8", torch.int8):
        reranker = CrossEncoder(reranker_checkpoint, device="cpu", model_kwargs={"dtype": dtype})
        assert int8.is_int8(reranker.model)
    monkeypatch.setattr(int8, "cpu_capabilities", lambda: {"avx2": True})
    with pytest.raises(ValueError, match="needs instructions for products of int8"):
        CrossEncoder(reranker_checkpoint, device="cpu", model_kwargs={"dtype": "int8"})


def test_a_copy_in_another_process_scores_equally(reranker):
    scores = reranker.predict(PAIRS)
    assert np.array_equal(pickle.loads(pickle.dumps(reranker)).predict(PAIRS), scores)
    assert np.array_equal(copy.deepcopy(reranker).predict(PAIRS), scores)


def test_worker_processes_score_in_int8(reranker):
    scores = reranker.predict(PAIRS)
    np.testing.assert_allclose(reranker.predict(PAIRS, device=["cpu", "cpu"]), scores, rtol=1e-5)
    reranker.close()


def test_a_job_knows_its_int8_weights(reranker, model, tokenizer):
    assert "dtype='int8'" in repr(reranker)
    scoring = describe_scoring(reranker)
    assert scoring["dtype"] == "int8"
    changed = copy.deepcopy(reranker)
    changed.model.model.layers[1].mlp.up_proj.weight[3, 2] += 1
    assert describe_scoring(changed)["weights"] != scoring["weights"]


def test_it_cannot_be_saved_or_changed_back(reranker, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="a reranker in int8 is not saved, because other tools could not read"):
        reranker.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"the model is in int8 and cannot be changed to torch\.float32"):
        CrossEncoder(reranker.model, tokenizer, device="cpu", dtype="float32")
    assert CrossEncoder(reranker.model, tokenizer, device="cpu", dtype="int8").model is reranker.model


def test_moving_keeps_the_scales(reranker):
    layer = reranker.model.model.layers[0].mlp.up_proj
    weight, scales = layer.weight.clone(), layer.scales.clone()
    reranker.model.to(torch.bfloat16)
    assert layer.scales.dtype == torch.float32
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.scales, scales)


def test_a_cpu_without_instructions_is_refused(model, tokenizer, reranker_checkpoint, monkeypatch):
    monkeypatch.setattr(int8, "cpu_capabilities", lambda: {"avx2": True})
    for arguments in ((model, tokenizer), (reranker_checkpoint,)):
        with pytest.raises(ValueError, match="needs instructions for products of int8, and cpu has none"):
            CrossEncoder(*arguments, device="cpu", dtype="int8")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("layers.0.mlp.down_proj", "must be None or a list of linear layers"),
        (["layers.0.mlp"], r"such as 'layers\.2\.mlp\.down_proj', got 'layers\.0\.mlp'"),
        ([3], r"got \[3\]"),
    ],
)
def test_wrong_names_of_layers_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        make_model(int8_skip_modules=names)

"""On a CUDA device: packed attention, the pipeline that feeds it, and a training step."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from helpers import make_model, make_tokenizer

from llama_bidir import CrossEncoder
from llama_bidir.scoring.engine import LocalEngine
from llama_bidir.scoring.forward import is_plain, packed_logits
from llama_bidir.scoring.packing import PACKED_ATTENTION, pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SEQUENCES = [[number % 320 for number in range(length)] for length in (1, 7, 64, 65, 129, 3)]
PAIRS = [(f"query {number % 7}", f"{'bees ' * (number % 11)}{number}") for number in range(60)]
# Of values near 1: eight times the rounding of bfloat16.
HALF_PRECISION = 3e-2


@pytest.fixture
def reranker():
    model = make_model(hidden_size=256, intermediate_size=384, initializer_range=0.05)
    return CrossEncoder(model, make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"), device="cuda")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_attention_equals_sequences_alone(dtype, is_causal):
    model = make_model(hidden_size=256, initializer_range=0.05, is_causal=is_causal).to("cuda", dtype)
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        expected = torch.cat([model(torch.tensor([ids], device="cuda")).logits for ids in SEQUENCES])
        model.set_attn_implementation(PACKED_ATTENTION)
        logits = model(**pack(SEQUENCES, "cuda")).logits
    bound = 1e-5 if dtype == torch.float32 else HALF_PRECISION * expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=bound)


def test_half_precision_is_as_close_to_float32_packed_as_padded():
    errors = {"packed": [], "alone": []}
    for seed in range(4):
        exact = make_model(seed=seed, hidden_size=256, initializer_range=0.05).to("cuda")
        half = copy.deepcopy(exact).to(torch.bfloat16)
        with torch.inference_mode():
            alone = [torch.tensor([ids], device="cuda") for ids in SEQUENCES]
            expected = torch.cat([exact(ids).logits for ids in alone])
            errors["alone"].append(torch.cat([half(ids).logits for ids in alone]) - expected)
            half.set_attn_implementation(PACKED_ATTENTION)
            errors["packed"].append(half(**pack(SEQUENCES, "cuda")).logits - expected)
    rms = {name: torch.cat(values).square().mean().sqrt().item() for name, values in errors.items()}
    assert 0 < rms["packed"] < 1.5 * rms["alone"]


def test_gradients_of_packed_input_equal_those_of_sequences_alone():
    model = make_model(hidden_size=256, initializer_range=0.05).to("cuda")
    model.set_attn_implementation("sdpa")
    torch.cat([model(torch.tensor([ids], device="cuda")).logits for ids in SEQUENCES]).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation(PACKED_ATTENTION)
    with torch.autocast("cuda", dtype=torch.bfloat16):  # as of a Trainer with bf16=True: attention by varlen
        model(**pack(SEQUENCES, "cuda")).logits.sum().backward()
    for name, parameter in model.named_parameters():
        error = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert error < HALF_PRECISION, name


def test_scores_equal_those_of_a_cpu(reranker):
    scores = reranker.predict(PAIRS)
    np.testing.assert_array_equal(reranker.predict(PAIRS), scores)
    np.testing.assert_allclose(reranker.predict(PAIRS[::-1], batch_size=7)[::-1], scores, rtol=1e-5, atol=1e-6)
    on_cpu = CrossEncoder(copy.deepcopy(reranker.model).to("cpu"), reranker.tokenizer, device="cpu").predict(PAIRS)
    np.testing.assert_allclose(scores, on_cpu, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fast_forward_is_as_exact_as_the_model(reranker, dtype):
    model = reranker.model
    model.set_attn_implementation(PACKED_ATTENTION)
    batch = pack([list(range(length)) for length in range(1, 200)], "cuda")
    with torch.inference_mode():
        exact = model(**batch).logits
        torch.testing.assert_close(packed_logits(model, batch), exact, rtol=1e-5, atol=1e-6)
        model.to(dtype)
        of_the_model = (model(**batch).logits - exact).square().mean()
        error = (packed_logits(model, batch) - exact).square().mean()
    assert 0 < error < 2 * of_the_model


def test_no_batch_waits_for_the_device(reranker):
    model = reranker.model.to(torch.bfloat16)
    engine = LocalEngine(model)
    assert is_plain(model)
    for forward in (partial(packed_logits, model), engine._call):
        model.set_attn_implementation(PACKED_ATTENTION)
        engine._forward(SEQUENCES, forward)
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine._forward(SEQUENCES, forward)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_batch_that_does_not_fit_is_halved(reranker, caplog):
    expected = reranker.predict(PAIRS)
    reranker.predict(PAIRS * 20, max_tokens_per_batch=16384)
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + 48 * 2**20
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        pairs = [(query, f"{passage} {number}") for number in range(40) for query, passage in PAIRS]
        scores = reranker.predict(pairs, max_tokens_per_batch=100_000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "has no memory for" in caplog.text
    np.testing.assert_allclose(scores, reranker.predict(pairs, max_tokens_per_batch=500), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(reranker.predict(PAIRS), expected, rtol=1e-5, atol=1e-6)


def test_two_workers_on_one_device(reranker, tmp_path):
    reranker.save_pretrained(tmp_path)
    expected = reranker.predict(PAIRS)
    scores = CrossEncoder(tmp_path, device=["cuda:0", "cuda:0"]).predict(PAIRS)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_compiled_scores(reranker):
    expected = reranker.predict(PAIRS)
    reranker.model.compile(dynamic=True)
    np.testing.assert_allclose(reranker.predict(PAIRS), expected, rtol=1e-4, atol=1e-5)

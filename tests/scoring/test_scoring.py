"""The pipeline behind `predict`: chunks, memory, windows, precision, CPU kernels."""

import copy
import logging
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import SEQUENCES, TEXTS, make_model, make_tokenizer
from torch import nn
from transformers import TorchAoConfig

from llama_bidir import CrossEncoder
from llama_bidir.prompts import PromptEncoder
from llama_bidir.scoring import forward
from llama_bidir.scoring.device import cpu_dtype
from llama_bidir.scoring.engine import LocalEngine, side_by_side
from llama_bidir.scoring.packing import PACKED_ATTENTION, pack
from llama_bidir.scoring.pipeline import map_ahead, split_into_chunks

PAIRS = [(f"query {number % 7}", f"{'bees ' * (number % 11)}{number}") for number in range(60)]


@pytest.fixture
def reranker(model, tokenizer):
    return CrossEncoder(model, tokenizer, device="cpu")


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(LocalEngine, "chunk_pairs", 8)


def test_chunks_hold_every_pair_once_and_end_where_texts_are_long(monkeypatch):
    monkeypatch.setattr("llama_bidir.scoring.pipeline.CHUNK_CHARACTERS", 10)
    pairs = [("a", "b"), ("c", "d"), ("e", "f"), ("g", "h"), ("i" * 9, "j"), ("k", "l")]
    assert list(split_into_chunks(iter(pairs), 3)) == [pairs[:3], pairs[3:5], pairs[5:]]
    assert list(split_into_chunks([], 3)) == []
    pairs = [("q", str(number)) for number in range(12)]
    assert [len(chunk) for chunk in split_into_chunks(pairs, 5, first_chunk_pairs=1)] == [1, 2, 4, 5]
    assert [len(chunk) for chunk in split_into_chunks(pairs, 5, first_chunk_pairs=9)] == [5, 5, 2]


def test_scores_do_not_depend_on_chunks(reranker, small_chunks, monkeypatch):
    chunked = reranker.predict(PAIRS)
    monkeypatch.setattr(LocalEngine, "chunk_pairs", 1000)
    np.testing.assert_allclose(chunked, reranker.predict(PAIRS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_generator_is_read_as_it_is_scored(reranker, small_chunks, monkeypatch, ahead):
    """At most the chunk in work and the one that is tokenized meanwhile are in memory."""
    monkeypatch.setattr(LocalEngine, "tokenizes_ahead", ahead)
    read, distances = 0, []

    def stream():
        nonlocal read
        for pair in PAIRS:
            read += 1
            yield pair

    engine = reranker.engine()
    compute, scored = engine._forward, 0

    def counting_forward(ids, *args):
        nonlocal scored
        distances.append(read - scored)
        scored += len(ids)
        return compute(ids, *args)

    monkeypatch.setattr(engine, "_forward", counting_forward)
    scores = reranker.predict(stream())
    assert np.array_equal(scores, reranker.predict(PAIRS))
    assert max(distances) <= (24 if ahead else 11)  # chunks of 8, and 3 pairs that tell whether it is a single one


def test_a_wrong_pair_in_a_generator_is_named(reranker, small_chunks):
    with pytest.raises(TypeError, match="the passage of pair 37 must be a string, got NoneType None"):
        reranker.predict(("q", None) if number == 37 else pair for number, pair in enumerate(PAIRS))


def test_map_ahead_keeps_order_and_errors_and_works_on_a_thread():
    names = set()

    def double(number):
        names.add(threading.current_thread().name)
        if number == 5:
            raise KeyError("five")
        return 2 * number

    assert list(map_ahead(double, [])) == []
    assert list(map_ahead(double, iter(range(5)))) == [0, 2, 4, 6, 8]
    stream = map_ahead(double, range(9))
    assert [next(stream) for _ in range(5)] == [0, 2, 4, 6, 8]
    with pytest.raises(KeyError, match="five"):
        next(stream)
    assert names == {"tokenizer_0"}


def test_twins_tie_and_runs_repeat(reranker):
    pairs = [PAIRS[5], *PAIRS, PAIRS[5], *PAIRS]
    scores = reranker.predict(pairs)
    assert scores[0] == scores[6] == scores[61]
    assert np.array_equal(scores[1:61], scores[62:])
    assert np.array_equal(reranker.predict(pairs), scores)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_halves_the_budget_and_goes_on(tokenizer, implementation, error, monkeypatch, caplog):
    reranker = CrossEncoder(make_model(attn_implementation=implementation), tokenizer, device="cpu")
    expected = reranker.predict(PAIRS)
    engine = reranker.engine()
    compute, sizes = engine._forward, []

    def small_memory(ids, *args):
        size = len(ids) * max(map(len, ids))
        sizes.append(size)
        if len(ids) > 1 and size > 200:
            raise error
        return compute(ids, *args)

    monkeypatch.setattr(engine, "_forward", small_memory)
    np.testing.assert_allclose(reranker.predict(PAIRS), expected, rtol=1e-5, atol=1e-6)
    assert re.search(r"cpu has no memory for \d+ tokens at once: continuing with half of it", caplog.text)
    sizes.clear()
    caplog.clear()
    reranker.predict(PAIRS)
    assert max(sizes) <= 200  # remembered
    assert caplog.text == ""
    long = [*PAIRS[:5], ("q", "0123456789" * 24)]
    assert reranker.predict(long)[5] == pytest.approx(reranker.predict(long[5:])[0], rel=1e-5)


def test_other_errors_and_pairs_that_never_fit_are_raised(reranker, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(reranker.engine(), "_forward", fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"one pair of \d+ tokens does not fit in the memory of cpu"):
        reranker.predict(PAIRS)

    def break_down(*args):
        raise RuntimeError("broken")

    monkeypatch.setattr(reranker.engine(), "_forward", break_down)
    with pytest.raises(RuntimeError, match=r"^broken$"):
        reranker.predict(PAIRS)


def test_windows_by_hand():
    letters = make_tokenizer()
    encoder = PromptEncoder(letters, prompt_template="{query}|{passage}|", max_length=3 + 16)
    passage = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"  # one token a character in this vocabulary

    def windows(long_document, passage=passage):
        encoded = encoder.encode([("q", passage), ("q", "x")], long_document=long_document)
        assert encoded.num_windows[1] == 1
        assert len(encoded.input_ids) == sum(encoded.num_windows)
        return [letters.decode(ids)[2:-1] for ids in encoded.input_ids[:-1]], encoded.is_truncated

    assert windows("truncate") == (["ABCDEFGHIJKLMNOP"], [True, False])
    # 16 tokens of room, of which 4 overlap; the last window ends with the passage.
    assert windows("max") == (["ABCDEFGHIJKLMNOP", "MNOPQRSTUVWXYZ01", "UVWXYZ0123456789"], [False, False])
    assert windows("first_max") == (
        ["ABCDEFGHIJKLMNOP", "ABMNOPQRSTUVWXYZ", "ABWXYZ0123456789"],
        [False, False],
    )
    assert windows("max", passage[:17]) == (["ABCDEFGHIJKLMNOP", "BCDEFGHIJKLMNOPQ"], [False, False])
    assert windows("max", passage[:16]) == (["ABCDEFGHIJKLMNOP"], [False, False])


def test_every_token_of_a_passage_is_in_a_window(tokenizer):
    encoder = PromptEncoder(tokenizer, prompt_template="{query} {passage}", max_length=32)
    for length in range(1, 400, 13):
        passage = "".join(chr(97 + (7 * number) % 26) for number in range(length))
        for mode in ("max", "first_max"):
            sequences = encoder.encode([("q", passage)], long_document=mode).input_ids
            whole = tokenizer(f"q {passage}").input_ids
            assert all(len(ids) <= 32 for ids in sequences)
            assert {token for ids in sequences for token in ids} == set(whole)


@pytest.mark.parametrize("mode", ["max", "first_max"])
def test_the_best_window_counts_and_windows_are_reported(reranker, mode, caplog):
    reranker.config.rerank_max_length = 64
    long = " ".join(TEXTS)
    encoder = PromptEncoder(reranker.tokenizer, prompt_template=reranker.config.prompt_template, max_length=64)
    windows = encoder.encode([("bees", long)], long_document=mode).input_ids
    with torch.no_grad():
        expected = max(reranker.model(torch.tensor([ids])).logits.item() for ids in windows)
    pairs = [("q", "p"), ("bees", long), ("q", "x")]
    scores = reranker.predict(pairs, long_document=mode)
    assert scores[1] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(scores[[0, 2]], reranker.predict(pairs)[[0, 2]], rtol=1e-5)
    assert (
        f"1 of 3 pairs were longer than 64 tokens and were scored in {len(windows)} windows, the best of which counts"
        in caplog.text
    )
    ranking = reranker.rank("bees", [long, "x"], long_document=mode)
    assert {result["corpus_id"]: result["score"] for result in ranking}[0] == pytest.approx(expected, rel=1e-5)
    assert CrossEncoder(reranker.model, reranker.tokenizer, long_document=mode).predict(pairs)[1] == scores[1]


def test_wrong_modes_and_budgets_are_named(reranker):
    with pytest.raises(ValueError, match="long_document must be one of 'truncate', 'max' or 'first_max', got 'mean'"):
        reranker.predict(PAIRS, long_document="mean")
    with pytest.raises(ValueError, match="max_tokens_per_batch must be None or an int above 0, got 0"):
        CrossEncoder(reranker.model, reranker.tokenizer, max_tokens_per_batch=0)


def test_long_pairs_score_as_with_a_padded_model(tokenizer):
    """8,192 tokens: a mask or a matrix of attention weights would take 1 GB a layer here."""
    reranker = CrossEncoder(make_model(max_position_embeddings=8192), tokenizer, device="cpu", max_length=8192)
    pairs = [("bees", "the hive was white " * 2500), ("bees", "clover " * 400), ("q", "p")]
    scores = reranker.predict(pairs)
    for (query, passage), score in zip(pairs, scores, strict=True):
        text = reranker.config.prompt_template.format(query=query, passage=passage)
        inputs = tokenizer(text, truncation=True, max_length=8192, return_tensors="pt")
        with torch.no_grad():
            assert score == pytest.approx(reranker.model(**inputs).logits.item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("capabilities", "stored", "expected"),
    [
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16, torch.float32),
        ({"amx_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16, torch.bfloat16),
        ({"avx512_bf16": False, "avx2": True}, torch.bfloat16, torch.float32),
        ({"avx512_bf16": True}, torch.float32, torch.float32),
        ({"avx512_bf16": True}, torch.float16, torch.float32),
    ],
)
def test_dtype_on_a_cpu(capabilities, stored, expected, monkeypatch, tmp_path, tokenizer, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert cpu_dtype(stored) == expected
    make_model().to(stored).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="llama_bidir.checkpoints.loading"):
        reranker = CrossEncoder(tmp_path, tokenizer, device="cpu")
    assert reranker.model.dtype == expected
    assert reranker.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert [record.message for record in caplog.records] == [f"scoring in {expected} on this CPU"]
    assert CrossEncoder(tmp_path, tokenizer, device="cpu", dtype="auto").model.dtype == stored


@pytest.fixture(params=["blas", "onednn"])
def either_blas(request, monkeypatch):
    """As on an Intel CPU, and as on one that is not."""
    if request.param == "onednn" and forward._onednn_linear is None:
        pytest.skip("needs a torch with oneDNN")
    monkeypatch.setattr(forward, "_onednn_is_faster", lambda: request.param == "onednn")


@pytest.mark.parametrize("name", ["Intel Xeon", "AMD EPYC"])
def test_onednn_is_left_out_where_the_blas_is_tuned(name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(forward, "_onednn_linear", object())
    assert forward._onednn_is_faster.__wrapped__() == (name != "Intel Xeon")


@pytest.mark.parametrize(
    "fields",
    [{}, {"attention_bias": True, "mlp_bias": True}, {"is_causal": True}, {"pooling": "last", "temperature": 3}],
)
def test_the_fast_forward_computes_what_the_model_computes(fields, either_blas):
    model = make_model(**fields)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            nn.init.normal_(parameter, std=0.5)
    assert forward.is_plain(model)
    with torch.inference_mode():
        expected = torch.cat([model(torch.tensor([ids])).logits for ids in SEQUENCES])
        torch.testing.assert_close(forward.packed_logits(model, pack(SEQUENCES)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fast_forward_in_half_precision_is_as_exact_as_the_model(dtype):
    sequences = torch.randint(0, 320, (8, 30)).tolist()
    squared = []
    for seed in range(6):
        exact, half = make_model(seed=seed), make_model(seed=seed).to(dtype)
        with torch.inference_mode():
            expected = exact(torch.tensor(sequences)).logits
            logits = (half(torch.tensor(sequences)).logits, forward.packed_logits(half, pack(sequences)))
        squared.append([(each - expected).square().mean() for each in logits])
    of_the_model, error = torch.tensor(squared).mean(dim=0).tolist()
    assert 0 < error < 1.5 * of_the_model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["plain", "hooked"])
def test_a_model_is_the_same_after_it_was_used(tokenizer, attention, kind):
    model = make_model(attn_implementation=attention, attention_dropout=0.5).to(torch.bfloat16).train()
    model.model.layers[1].eval()
    if kind == "hooked":
        model.model.layers[0].register_forward_hook(lambda module, inputs, output: None)

    def state():
        return [
            model.config.to_dict(),
            model.config._attn_implementation,
            [(type(module), module.training, vars(module).keys()) for module in model.modules()],
            [(name, parameter.dtype, parameter.requires_grad) for name, parameter in model.named_parameters()],
        ]

    before = state()
    reranker = CrossEncoder(model, tokenizer, device="cpu")
    np.testing.assert_array_equal(reranker.predict(PAIRS), reranker.predict(PAIRS))
    in_float32 = CrossEncoder(model, tokenizer, device="cpu", dtype="float32")
    assert in_float32.model.dtype == torch.float32
    in_float32.predict(PAIRS)
    assert state() == before


@pytest.mark.parametrize("module", ["mlp.down_proj", "input_layernorm", "self_attn", "mlp.act_fn", ""])
@pytest.mark.parametrize("kind", ["hook", "pre-hook", "forward"])
def test_modules_that_do_more_than_their_class_says_are_called(tokenizer, module, kind, either_blas):
    reranker = CrossEncoder(make_model(), tokenizer, device="cpu")
    expected = reranker.predict(PAIRS)
    seen = []
    changed = reranker.model.model.layers[0].get_submodule(module)
    if kind == "hook":
        changed.register_forward_hook(lambda *args: seen.append(1))
    elif kind == "pre-hook":
        changed.register_forward_pre_hook(lambda *args: seen.append(1))
    else:  # as accelerate does it
        changed.forward = lambda *args, forward=changed.forward, **kwargs: seen.append(1) or forward(*args, **kwargs)
    assert reranker.engine().is_packed
    np.testing.assert_allclose(reranker.predict(PAIRS), expected, rtol=1e-5, atol=1e-6)
    assert seen


def test_a_configuration_that_was_changed_later_is_followed(tokenizer):
    for change in (
        lambda model: setattr(model.config, "num_hidden_layers", 1),
        lambda model: setattr(model.model.layers[0].self_attn, "is_causal", True),
    ):
        model = make_model()
        reranker = CrossEncoder(model, tokenizer, device="cpu")
        change(model)
        ids = PromptEncoder.from_config(tokenizer, reranker.config).encode(PAIRS).input_ids
        model.set_attn_implementation(PACKED_ATTENTION)
        with torch.inference_mode():
            expected = torch.cat([model(**pack([each])).logits for each in ids]).squeeze(-1)
        model.set_attn_implementation("sdpa")
        assert not forward.is_plain(model)
        np.testing.assert_allclose(reranker.predict(PAIRS), expected, rtol=1e-5, atol=1e-6)


def test_two_rerankers_on_one_model_in_threads(tokenizer):
    model = make_model(num_hidden_layers=4, attention_dropout=0.5).train()
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: None)  # so that its own forward is used
    rerankers = [CrossEncoder(model, tokenizer, device="cpu") for _ in range(2)]
    expected = rerankers[0].predict(PAIRS)
    with ThreadPoolExecutor(2) as threads:
        scores = list(threads.map(lambda number: rerankers[number % 2].predict(PAIRS), range(40)))
    for each in scores:
        np.testing.assert_array_equal(each, expected)
    assert model.config._attn_implementation == "sdpa"
    assert all(module.training for module in model.modules())


def test_autocast_and_other_activations_go_through_the_model(tokenizer):
    pairs = PAIRS[:3]
    for model in (make_model(hidden_act="gelu"), make_model()):
        reranker = CrossEncoder(model, tokenizer, device="cpu")
        ids = PromptEncoder.from_config(tokenizer, reranker.config).encode(pairs).input_ids
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=model.config.hidden_act == "silu"):
            assert not forward.is_plain(model)
            with torch.inference_mode():
                expected = torch.cat([model(torch.tensor([each])).logits for each in ids]).squeeze(-1)
            np.testing.assert_allclose(reranker.predict(pairs), expected, rtol=1e-2, atol=1e-2)


def test_caches_of_onednn_are_bounded_unless_the_user_says_how_large_they_are(model, tokenizer, monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("LRU_CACHE_CAPACITY")
    CrossEncoder(model, tokenizer, device="cpu")
    assert (os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"], os.environ["LRU_CACHE_CAPACITY"]) == ("7", "64")


@pytest.mark.parametrize("targets", [["up_proj"], ["q_proj", "v_proj", "o_proj"], "all-linear"])
def test_adapters_stay_in_what_is_computed(tokenizer, targets):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False, target_modules=targets, lora_dropout=0.5)
    model = peft.get_peft_model(make_model(), lora)
    reranker = CrossEncoder(model, tokenizer, device="cpu")
    ids = PromptEncoder.from_config(tokenizer, reranker.config).encode(PAIRS).input_ids
    scores = reranker.predict(PAIRS)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    model.eval()
    with torch.inference_mode():
        expected = torch.cat([model(torch.tensor([each])).logits for each in ids]).squeeze(-1)
        with model.disable_adapter():
            assert not torch.allclose(model(torch.tensor([ids[0]])).logits, expected[:1], rtol=1e-3)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_int8_weights_by_torchao(tmp_path, tokenizer):
    torchao = pytest.importorskip("torchao.quantization")
    model = make_model(hidden_size=64, intermediate_size=96)
    model.save_pretrained(tmp_path)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig(), modules_to_not_convert=["score"])
    reranker = CrossEncoder(tmp_path, tokenizer, device="cpu", model_kwargs={"quantization_config": config})
    assert type(reranker.model.model.layers[0].mlp.up_proj.weight) is not nn.Parameter
    assert type(reranker.model.score.weight) is nn.Parameter
    exact = CrossEncoder(model, tokenizer, device="cpu").predict(PAIRS)
    scores = reranker.predict(PAIRS)
    assert 1e-5 < np.abs(scores - exact).max() < 0.5 * exact.std()


def test_threads_divide_the_cores_and_give_them_back():
    total = torch.get_num_threads()
    seen = list(side_by_side(lambda item: (item, torch.get_num_threads()), range(5), num_calls=2, num_threads=4))
    assert seen == [(item, 2) for item in range(5)]
    assert torch.get_num_threads() == total
    started, may_go_on = [], threading.Event()

    def fail(item):
        started.append(item)
        if item == 0:
            raise KeyError(item)
        may_go_on.wait(timeout=10)

    threading.Timer(0.5, may_go_on.set).start()
    with pytest.raises(KeyError, match="0"):
        list(side_by_side(fail, range(100), num_calls=2, num_threads=2))
    torch.set_num_threads(total)
    assert len(started) <= 3


def test_few_short_pairs_are_one_batch(reranker, monkeypatch):
    sizes = []
    compute = reranker.engine()._forward
    monkeypatch.setattr(reranker.engine(), "_forward", lambda ids, *args: sizes.append(len(ids)) or compute(ids, *args))
    monkeypatch.setattr(reranker.engine(), "_num_threads", 4)
    reranker.engine().logits([[1, 2, 3]] * 5)
    assert sizes == [5]
    reranker.engine().logits([[1, 2, 3] * 10] * 16)
    assert sorted(sizes[1:]) == [4, 4, 4, 4]


def test_a_new_model_is_the_one_that_scores(reranker):
    other = make_model(seed=7).train()
    expected = CrossEncoder(copy.deepcopy(other), reranker.tokenizer, device="cpu").predict(PAIRS)
    assert np.abs(reranker.predict(PAIRS) - expected).max() > 1e-2
    reranker.model = other
    np.testing.assert_array_equal(reranker.predict(PAIRS), expected)
    assert reranker.engine().is_packed


def test_hooks_of_inner_layers_are_called(reranker):
    calls = []
    layer = reranker.model.model.layers[0].mlp.gate_proj
    layer.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[-1]))
    reranker.predict(PAIRS[:1])
    assert calls == [48]


def test_compiled_model_gives_the_same_scores(reranker):
    expected = reranker.predict(PAIRS)
    reranker.model.compile(backend="eager", dynamic=True)
    np.testing.assert_allclose(reranker.predict(PAIRS), expected, rtol=1e-5, atol=1e-6)

import random
from itertools import pairwise

import pytest
import torch
from helpers import SEQUENCES, logits_by_layout, make_model
from packaging.version import Version
from transformers import LlamaConfig

from llama_bidir.scoring import packing
from llama_bidir.scoring.buffers import Buffers
from llama_bidir.scoring.packing import (
    PACKED_ATTENTION,
    _attend_by_matmul,
    balanced_batches,
    batches_by_tokens,
    pack,
    pad,
    token_budget,
)


def test_pack_by_hand():
    packed = pack([[5, 6], [7], [8, 9, 10]])
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert packed["cu_seq_lens_q"].tolist() == packed["cu_seq_lens_k"].tolist() == [0, 2, 3, 6]
    assert packed["cu_seq_lens_q"].dtype == torch.int32
    assert (packed["max_length_q"], packed["max_length_k"]) == (3, 3)


@pytest.mark.parametrize(
    ("max_tokens", "max_sequences", "expected"),
    [
        (10, None, [[1, 3], [4, 0], [2]]),
        (100, None, [[1, 3, 4, 0, 2]]),
        (1, None, [[1], [3], [4], [0], [2]]),
        (100, 2, [[1, 3], [4, 0], [2]]),
    ],
)
def test_batches_hold_each_sequence_once_the_longest_first(max_tokens, max_sequences, expected):
    lengths = [4, 5, 3, 5, 5]
    expected_order = sorted(range(5), key=lambda index: -lengths[index])
    batches = list(batches_by_tokens(lengths, max_tokens=max_tokens, max_sequences=max_sequences))
    assert [index for batch in batches for index in batch] == expected_order
    assert batches == expected


def test_no_sequences_are_no_batches():
    assert list(batches_by_tokens([], max_tokens=8)) == []


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pooling", ["avg", "cls", "last"])
def test_packed_attention_equals_padded_sdpa(pooling, is_causal):
    sequences = [*SEQUENCES, [9, 9, 9, 9, 9], [4] * 17]
    expected = logits_by_layout(make_model(pooling=pooling, is_causal=is_causal), sequences)["alone"]
    model = make_model(pooling=pooling, is_causal=is_causal)
    model.set_attn_implementation(PACKED_ATTENTION)
    assert model.config._attn_implementation == PACKED_ATTENTION
    for name, logits in logits_by_layout(model, sequences).items():
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(model(**pack(sequences)).logits, expected, rtol=1e-5, atol=1e-5)


def test_gradients_of_packed_input_equal_those_of_padded_input():
    batch = pack(SEQUENCES)
    gradients = []
    for implementation in ("sdpa", PACKED_ATTENTION):
        model = make_model(attn_implementation=implementation).train()
        model(**batch).logits.square().sum().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_no_mask_is_made_for_packed_input(monkeypatch):
    """A mask would be quadratic in the stream."""
    seen = []
    model = make_model(attn_implementation=PACKED_ATTENTION)
    layer = model.model.layers[0]
    monkeypatch.setattr(
        layer, "forward", lambda hidden, attention_mask, **kwargs: seen.append(attention_mask) or hidden
    )
    with torch.no_grad():
        model(**pack(SEQUENCES))
    assert seen == [None]


def fake_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
    """`varlen_attn`, which has no kernel on a CPU."""
    assert options == ({"enable_gqa": True} if Version("2.12") <= packing._TORCH else {})
    assert (max_q, cu_seq_q.dtype) == (int(cu_seq_q.diff().max()), torch.int32)
    outputs = []
    for start, end in pairwise(cu_seq_q.tolist()):
        q, k, v = (states[start:end].transpose(0, 1) for states in (query, key, value))
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("torch_version", ["2.11.0", "2.13.0"])
def test_layout_of_the_varlen_kernel(monkeypatch, torch_version):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    model = make_model(attn_implementation=PACKED_ATTENTION)
    inputs = pack(SEQUENCES)
    with torch.no_grad():
        expected = model(**inputs).logits
        monkeypatch.setattr(varlen, "varlen_attn", fake_varlen_attn)
        monkeypatch.setattr("llama_bidir.scoring.packing._TORCH", Version(torch_version))
        monkeypatch.setattr("llama_bidir.scoring.packing._has_varlen_kernel", lambda device, dtype: True)
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
        causal = make_model(attn_implementation=PACKED_ATTENTION, is_causal=True)
        one_by_one = [causal(**pack([ids])).logits for ids in SEQUENCES]
        torch.testing.assert_close(causal(**inputs).logits, torch.cat(one_by_one), rtol=1e-5, atol=1e-6)


def test_bfloat16_attention_by_matmul_is_as_close_to_float32_as_the_fused_kernel(monkeypatch):
    sequences = [*SEQUENCES, [4] * 17, [7, 8, 9] * 30]
    inputs = pack(sequences)
    errors = {}
    for length in (0, 512):
        monkeypatch.setattr("llama_bidir.scoring.packing.MATMUL_LENGTH", length)
        squared = []
        for seed in range(8):
            model = make_model(seed=seed, attn_implementation=PACKED_ATTENTION)
            with torch.inference_mode():
                expected = model(**inputs).logits
                squared.append((model.to(torch.bfloat16)(**inputs).logits - expected).square().mean())
        errors[length] = torch.stack(squared).mean().sqrt().item()
    assert errors[0] != errors[512]
    assert errors[512] < 1.3 * errors[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 70])
def test_attention_by_matmul_reads_no_memory_that_an_earlier_call_left(length, dtype, tolerance):
    buffers = Buffers()
    for name in ("queries", "scores", "weights"):
        buffers.take(name, torch.empty(0), 10**6).fill_(torch.nan)
    generator = torch.Generator().manual_seed(length)
    # (2, length, heads, head_dim), as the projections lay them out -> (2, heads, length, head_dim)
    states = [torch.randn(2, length, heads, 8, generator=generator).transpose(1, 2) for heads in (6, 2, 2)]
    expected = torch.nn.functional.scaled_dot_product_attention(*states, enable_gqa=True)
    attended = _attend_by_matmul(*(part.to(dtype) for part in states), buffers)
    torch.testing.assert_close(attended.float(), expected.transpose(1, 2), rtol=tolerance, atol=tolerance)


def test_pad_by_hand():
    padded = pad([[5, 6], [7], [8, 9, 10]])
    assert padded["input_ids"].tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 10]]
    assert padded["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]


def test_padded_batches_count_their_padding():
    batches = list(batches_by_tokens([4, 9, 3, 8, 4], max_tokens=18, padded=True))
    assert batches == [[1, 3], [0, 4, 2]]
    assert list(batches_by_tokens([4, 9, 3, 8, 4], max_tokens=18)) == [[1, 3], [0, 4, 2]]
    assert list(batches_by_tokens([9, 2, 2, 2, 2], max_tokens=18, padded=True)) == [[0, 1], [2, 3, 4]]
    assert list(batches_by_tokens([9, 2, 2, 2, 2], max_tokens=18)) == [[0, 1, 2, 3, 4]]


def test_batches_shrink_towards_the_end_for_several_workers():
    lengths = [100] * 40
    sizes = [len(batch) for batch in batches_by_tokens(lengths, max_tokens=1000, num_workers=2)]
    assert sizes == [10, 7, 5, 4, 3, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    assert [len(batch) for batch in batches_by_tokens(lengths, max_tokens=1000)] == [10, 10, 10, 10]


def test_balanced_batches_by_hand():
    lengths = [100, 40, 30, 20, 10, 10]
    assert balanced_batches(lengths, max_tokens=60) == [[0], [1, 4, 5], [2, 3]]
    assert balanced_batches(lengths, max_tokens=500) == [[0, 1, 2, 3, 4, 5]]
    assert balanced_batches(lengths, max_tokens=500, num_workers=2) == [[0, 5], [1, 2, 3, 4]]
    assert balanced_batches(lengths, max_tokens=500, max_sequences=2) == [[0, 5], [1, 4], [2, 3]]
    assert balanced_batches([5, 5], max_tokens=1) == [[0], [1]]
    assert balanced_batches([10, 10, 10], max_tokens=500, num_workers=4, min_tokens=16) == [[0, 1, 2]]
    assert balanced_batches([], max_tokens=8) == []


def test_balanced_batches_hold_each_sequence_once_within_every_limit():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 300) for _ in range(rng.randint(1, 80))]
        limits = {"max_tokens": rng.randint(1, 2000), "max_sequences": rng.choice([None, 1, 2, 7])}
        batches = balanced_batches(lengths, num_workers=rng.randint(1, 4), **limits)
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        tokens = [sum(lengths[index] for index in batch) for batch in batches]
        assert all(
            len(batch) == 1 or count <= limits["max_tokens"] for batch, count in zip(batches, tokens, strict=True)
        )
        assert all(len(batch) <= (limits["max_sequences"] or len(batch)) for batch in batches)
        assert tokens == sorted(tokens, reverse=True)


def test_balanced_batches_need_two_passes_at_most(monkeypatch):
    passes = []
    fill = packing._fill
    monkeypatch.setattr(packing, "_fill", lambda *args: passes.append(1) or fill(*args))
    assert len(balanced_batches([520] * 2001, max_tokens=1024, num_workers=2)) == 2001
    assert len(passes) == 2


def test_balanced_batches_leave_no_worker_waiting():
    rng = random.Random(0)
    lengths = [rng.randint(40, 300) for _ in range(100)]
    batches = balanced_batches(lengths, max_tokens=1536, num_workers=2)
    tokens = [sum(lengths[index] for index in batch) for batch in batches]
    assert len(batches) == -(-sum(lengths) // 1536 // 2) * 2
    # The fullest was the emptiest before it got its last sequence.
    assert max(tokens) - min(tokens) <= lengths[batches[0][-1]]


def test_budget_of_a_cpu_follows_the_width_of_the_model():
    budgets = [
        token_budget(torch.device("cpu"), dtype, LlamaConfig(intermediate_size=intermediate_size))
        for intermediate_size, dtype in ((8192, torch.bfloat16), (1536, torch.float32), (768, torch.float32))
    ]
    assert budgets == [1024, 1536, 2048]
    assert token_budget(torch.device("cpu"), torch.float32, LlamaConfig(intermediate_size=8)) == 2048


def test_under_autocast_attention_gets_half_precision(monkeypatch):
    # Rotary angles are float32 and make queries and keys so, which no flash kernel takes.
    seen = []

    def attend(module, *states_and_lengths, **kwargs):
        seen.append([states.dtype for states in states_and_lengths[:3]])
        return states_and_lengths[0].transpose(1, 2)

    monkeypatch.setattr(packing, "_attend_one_by_one", attend)
    model = make_model(attn_implementation=PACKED_ATTENTION)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**pack([[5, 6, 7], [8, 9]]))
    assert seen == [[torch.bfloat16] * 3] * 2

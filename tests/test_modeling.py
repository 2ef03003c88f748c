import itertools
import json
import logging

import pytest
import torch
from helpers import GOLDEN, SEQUENCES, logits_by_layout, make_model, make_tokenizer, pack, pad, tiny_config
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from llama_bidir import (
    LlamaBidirectionalConfig,
    LlamaBidirectionalForSequenceClassification,
    LlamaBidirectionalModel,
)
from llama_bidir.modeling_llama_bidir import pool, pool_packed, sequence_classification_loss

CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


# Pooling


def test_pool_by_hand():
    hidden = torch.tensor([[[1.0, 10.0], [3.0, 20.0], [99.0, 99.0]], [[99.0, 99.0], [5.0, 6.0], [7.0, 10.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert pool(hidden, mask, "avg").tolist() == [[2.0, 15.0], [6.0, 8.0]]
    assert pool(hidden, mask, "cls").tolist() == [[1.0, 10.0], [5.0, 6.0]]
    assert pool(hidden, mask, "last").tolist() == [[3.0, 20.0], [7.0, 10.0]]


@pytest.mark.parametrize("pooling", ["avg", "cls", "last"])
def test_pool_ignores_what_padding_holds_and_works_in_float32(pooling):
    hidden = torch.randn(1, 3, 4, dtype=torch.bfloat16)
    padded = torch.cat([torch.full((1, 2, 4), torch.nan, dtype=torch.bfloat16), hidden], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    pooled = pool(padded, mask, pooling)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, pool(hidden, torch.ones(1, 3), pooling))


def test_pool_of_no_tokens_is_nan_rather_than_a_score():
    for pooling in ("avg", "cls", "last"):
        assert pool(torch.ones(1, 2, 3), torch.zeros(1, 2), pooling).isnan().all()


def test_pool_refuses_other_names():
    with pytest.raises(ValueError, match="pooling must be one of 'avg', 'cls' or 'last', got 'max'"):
        pool(torch.ones(1, 1, 1), torch.ones(1, 1), "max")


@pytest.mark.parametrize(
    ("pooling", "expected"), [("avg", [[1.0], [3.0]]), ("cls", [[1.0], [2.0]]), ("last", [[1.0], [4.0]])]
)
def test_pool_packed_by_hand(pooling, expected):
    states = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=torch.bfloat16)
    pooled = pool_packed(states, torch.tensor([0, 1, 4], dtype=torch.int32), pooling)
    assert pooled.dtype == torch.float32
    assert pooled.tolist() == expected


# Golden logits of the reference


@pytest.mark.parametrize(
    ("case", "attn_implementation"),
    [
        *itertools.product(CASES, ["sdpa", "eager"]),
        # takes half a minute to compile
        *(pytest.param(case, "flex_attention", marks=pytest.mark.slow) for case in CASES[:1]),
    ],
)
def test_golden_logits(case, attn_implementation):
    expected = json.loads((GOLDEN / case / "expected.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(
        GOLDEN / case / "reranker", dtype=torch.float32, attn_implementation=attn_implementation
    )
    for wanted in expected["cases"]:
        model.config.pooling, model.config.temperature = wanted["pooling"], wanted["temperature"]
        for layout, logits in logits_by_layout(model, expected["input_ids"]).items():
            difference = (logits.squeeze(-1) - torch.tensor(wanted["logits"])).abs().max().item()
            assert difference <= 1e-4, (layout, wanted["pooling"], wanted["temperature"])


@pytest.mark.parametrize("case", [case for case in CASES if (GOLDEN / case / "base").is_dir()])
def test_golden_logits_from_the_base_and_the_head(case):
    expected = json.loads((GOLDEN / case / "expected.json").read_text())
    head = AutoModelForSequenceClassification.from_pretrained(GOLDEN / case / "reranker", dtype=torch.float32).score
    for wanted in expected["cases"]:
        model = LlamaBidirectionalForSequenceClassification.from_pretrained(
            GOLDEN / case / "base",
            dtype=torch.float32,
            pooling=wanted["pooling"],
            temperature=wanted["temperature"],
        )
        model.score.load_state_dict(head.state_dict())
        for logits in logits_by_layout(model, expected["input_ids"]).values():
            assert (logits.squeeze(-1) - torch.tensor(wanted["logits"])).abs().max().item() <= 1e-4


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
def test_code_of_an_nvidia_style_checkpoint_is_never_executed(trust, caplog):
    path = GOLDEN / "nvidia_style" / "reranker"
    assert "raise" in (path / "llama_bidirectional_model.py").read_text()
    config = AutoConfig.from_pretrained(path, **trust)
    assert type(config) is LlamaBidirectionalConfig
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.dtype == torch.float32
    model = AutoModelForSequenceClassification.from_pretrained(path, **trust)
    assert type(model) is LlamaBidirectionalForSequenceClassification
    assert type(AutoModel.from_pretrained(path, **trust)) is LlamaBidirectionalModel
    assert caplog.text == ""


# Attention


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "flex_attention"])
def test_every_token_sees_the_last_one(attn_implementation):
    model = make_model(attn_implementation=attn_implementation)
    ids = torch.tensor([[5, 6, 7, 8]])
    changed = torch.tensor([[5, 6, 7, 9]])
    with torch.no_grad():
        moved = model.model(ids).last_hidden_state - model.model(changed).last_hidden_state
        assert moved[0, 0].abs().max() > 1e-3
        causal = make_model(attn_implementation=attn_implementation, is_causal=True)
        kept = causal.model(ids).last_hidden_state - causal.model(changed).last_hidden_state
        assert kept[0, :3].abs().max() == 0
        assert kept[0, 3].abs().max() > 1e-3


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pooling", ["avg", "cls", "last"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "flex_attention"])
def test_layout_never_changes_a_score(attn_implementation, pooling, is_causal):
    model = make_model(attn_implementation=attn_implementation, pooling=pooling, is_causal=is_causal)
    layouts = logits_by_layout(model, SEQUENCES)
    for name, logits in layouts.items():
        torch.testing.assert_close(logits, layouts["alone"], rtol=1e-5, atol=1e-5, msg=name)


def test_packed_input_needs_no_position_ids_or_lengths():
    model, packed = make_model(), pack(SEQUENCES)
    with torch.no_grad():
        expected = model(**packed).logits
        bare = {name: packed[name] for name in ("input_ids", "cu_seq_lens_q")}
        assert torch.equal(model(**bare).logits, expected)


def test_inputs_embeds_equal_input_ids():
    model, batch = make_model(), pad(SEQUENCES, "right")
    with torch.no_grad():
        embeds = model.get_input_embeddings()(batch["input_ids"])
        by_embeds = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        assert torch.equal(by_embeds, model(**batch).logits)


def test_wrong_inputs_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"one row of tokens without an attention_mask, got 2 rows"):
        model(torch.ones(2, 3, dtype=torch.long), cu_seq_lens_q=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"from 0 to the 3 tokens of the input .* got \[0, 4, 2, 3\]"):
        model(torch.ones(1, 3, dtype=torch.long), cu_seq_lens_q=torch.tensor([0, 4, 2, 3]))
    with pytest.raises(ValueError, match=r"from 0 to the 3 tokens of the input .* got \[0, 2\]"):
        model(torch.ones(1, 3, dtype=torch.long), cu_seq_lens_q=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"at most max_length_q \(2\), got \[0, 3\]"):
        model(torch.ones(1, 3, dtype=torch.long), cu_seq_lens_q=torch.tensor([0, 3]), max_length_q=2)
    with pytest.raises(ValueError, match="position_ids restart, so the input is packed: pass cu_seq_lens_q"):
        model(torch.ones(1, 3, dtype=torch.long), position_ids=torch.tensor([[0, 1, 0]]))
    with pytest.raises(TypeError, match="needs a LlamaBidirectionalConfig, got LlamaConfig"):
        LlamaBidirectionalForSequenceClassification(LlamaConfig(**tiny_config()))


# Head, dtype and outputs


def test_logits_are_float32_and_divided_by_temperature():
    batch = pad(SEQUENCES, "right")
    with torch.no_grad():
        cold = make_model(temperature=0.25)(**batch).logits
        torch.testing.assert_close(cold, make_model()(**batch).logits / 0.25)
        half = make_model().to(torch.bfloat16)
        logits = half(**batch).logits
        assert logits.dtype == torch.float32
        hidden = half.model(**batch).last_hidden_state
        pooled = pool(hidden, batch["attention_mask"], "avg")
        torch.testing.assert_close(logits, pooled @ half.score.weight.float().T)


def test_head_stays_in_float32_under_autocast():
    model, batch = make_model(), pad(SEQUENCES, "right")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(**batch).logits
        hidden = model.model(**batch).last_hidden_state
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, pool(hidden, batch["attention_mask"], "avg") @ model.score.weight.T)


def test_forward_works_where_there_is_no_memory():
    model = make_model().to("meta")
    assert model(torch.ones(2, 5, dtype=torch.long, device="meta")).logits.shape == (2, 1)


@pytest.mark.parametrize("layout", ["right", "packed"])
def test_compiles_without_a_graph_break(layout):
    model = make_model()
    batch = pad(SEQUENCES, "right") if layout == "right" else pack(SEQUENCES)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)


def test_outputs_follow_transformers():
    model, batch = make_model(attn_implementation="eager"), pad(SEQUENCES, "right")
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True, output_attentions=True)
        as_tuple = model(**batch, return_dict=False)
    assert len(outputs.hidden_states) == 3
    assert [attention.shape for attention in outputs.attentions] == [(4, 4, 40, 40)] * 2
    assert torch.equal(as_tuple[0], outputs.logits)


# Loss


def test_losses_by_problem_type():
    logits = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
    assert sequence_classification_loss(logits[:, :1], torch.tensor([0.0, 1.0])).item() == pytest.approx(
        (1.0**2 + 0.5**2) / 2
    )
    classes = torch.tensor([0, 1])
    assert torch.equal(sequence_classification_loss(logits, classes), nn.functional.cross_entropy(logits, classes))
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    expected = nn.functional.binary_cross_entropy_with_logits(logits, targets)
    assert torch.equal(sequence_classification_loss(logits, targets), expected)
    assert torch.equal(
        sequence_classification_loss(logits[:, :1], targets[:, :1], "multi_label_classification"),
        nn.functional.binary_cross_entropy_with_logits(logits[:, :1], targets[:, :1]),
    )


def test_unknown_problem_type_is_refused():
    with pytest.raises(ValueError, match=r"problem_type must be None, 'regression', .* got 'rank'"):
        sequence_classification_loss(torch.ones(1, 1), torch.ones(1), "rank")


def test_forward_with_labels_never_changes_the_config():
    model = make_model()
    before = model.config.to_dict()
    outputs = model(**pad(SEQUENCES, "right"), labels=torch.tensor([1, 0, 0, 1]))
    expected = (outputs.logits.squeeze(-1) - torch.tensor([1.0, 0.0, 0.0, 1.0])).square().mean()
    torch.testing.assert_close(outputs.loss, expected)
    assert model.config.to_dict() == before
    assert model.config.problem_type is None


# Saving and loading


def test_saved_checkpoint_reloads_bit_for_bit(tmp_path):
    make_model(pooling="last", temperature=0.3).save_pretrained(tmp_path / "float32")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["temperature"] == 0.3
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(reloaded) is LlamaBidirectionalForSequenceClassification
    assert reloaded.dtype == torch.bfloat16
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, reloaded.state_dict()[name]), name
    assert reloaded.config.temperature == 0.3
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is LlamaBidirectionalModel
    with torch.no_grad():
        ids = torch.tensor([[4, 5, 6]])
        assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_llama_checkpoints_load(tied, max_shard_size, tmp_path, caplog, capfd):
    torch.manual_seed(3)
    llama = LlamaForCausalLM(LlamaConfig(**tiny_config(tie_word_embeddings=tied)))
    llama.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    by_class = LlamaBidirectionalForSequenceClassification.from_pretrained(tmp_path, pooling="avg", temperature=1.0)
    by_auto = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, config=LlamaBidirectionalConfig.from_pretrained(tmp_path)
    )
    for model in (by_class, by_auto):
        assert type(model) is LlamaBidirectionalForSequenceClassification
        for name, weight in llama.model.state_dict().items():
            assert torch.equal(weight, model.model.state_dict()[name]), name
    lines = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 2
    assert all(line.startswith("score.weight is new: ") and "needs training" in line for line in lines)
    assert "lm_head" not in capfd.readouterr().err


def test_stock_head_of_one_label_is_kept(tmp_path, caplog):
    stock = LlamaForSequenceClassification(LlamaConfig(**tiny_config(num_labels=1, pad_token_id=0)))
    stock.save_pretrained(tmp_path)
    model = LlamaBidirectionalForSequenceClassification.from_pretrained(tmp_path, pooling="last")
    assert torch.equal(model.score.weight, stock.score.weight)
    assert caplog.text == ""


def test_v4_style_config_loads(tmp_path):
    rope = {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    }
    torch.manual_seed(4)
    llama = LlamaForCausalLM(LlamaConfig(**tiny_config(rope_parameters={**rope, "rope_theta": 5e5})))
    llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"], config["dtype"]
    config |= {"rope_theta": 5e5, "rope_scaling": rope, "torch_dtype": "float32", "transformers_version": "4.44.2"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = LlamaBidirectionalModel.from_pretrained(tmp_path)
    assert torch.equal(model.rotary_emb.inv_freq, llama.model.rotary_emb.inv_freq)
    assert model.config.rope_parameters["rope_theta"] == 5e5


def test_nemo_style_checkpoint_loads_and_is_saved_without_its_auto_map(tmp_path):
    make_model(pooling="avg").save_pretrained(tmp_path / "nemo")
    path = tmp_path / "nemo" / "config.json"
    config = json.loads(path.read_text())
    for name in ("prompt_template", "rerank_max_length", "sentence_transformers"):
        del config[name]
    config["auto_map"] = {
        "AutoConfig": "model.LlamaBidirectionalConfig",
        "AutoModel": "model.LlamaBidirectionalModel",
        "AutoModelForSequenceClassification": "model.LlamaBidirectionalForSequenceClassification",
    }
    path.write_text(json.dumps(config))
    (tmp_path / "nemo" / "model.py").write_text("raise RuntimeError('executed')")
    for trust in (None, True):
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "nemo", trust_remote_code=trust)
        assert type(model) is LlamaBidirectionalForSequenceClassification
    model.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_dtype_and_device_map(base_checkpoint):
    pytest.importorskip("accelerate")
    model = LlamaBidirectionalForSequenceClassification.from_pretrained(
        base_checkpoint, dtype=torch.bfloat16, device_map="cpu"
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.device.type == "cpu"


def test_device_map_that_offloads_gives_equal_scores(reranker_checkpoint, tmp_path):
    pytest.importorskip("accelerate")
    whole = AutoModelForSequenceClassification.from_pretrained(reranker_checkpoint)
    split = AutoModelForSequenceClassification.from_pretrained(
        reranker_checkpoint,
        device_map={"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "score": "disk"},
        offload_folder=tmp_path,
    )
    with torch.no_grad():
        batch = pad(SEQUENCES, "left")
        assert torch.equal(split(**batch).logits, whole(**batch).logits)


def test_auto_tokenizer_of_a_saved_checkpoint(reranker_checkpoint):
    saved = make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer = AutoTokenizer.from_pretrained(reranker_checkpoint)
    assert tokenizer("Bees fly.").input_ids == saved("Bees fly.").input_ids
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")


def test_other_architectures_are_refused_before_their_weights_load(tmp_path):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="has model_type 'bert', but only Llama checkpoints"):
        LlamaBidirectionalForSequenceClassification.from_pretrained(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(OSError, match="not a checkpoint: there is no such folder"):
        LlamaBidirectionalForSequenceClassification.from_pretrained(tmp_path / "missing")

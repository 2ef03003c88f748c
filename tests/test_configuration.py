import copy
import json
import math
import re

import numpy as np
import pytest
from helpers import tiny_config
from transformers import AutoConfig, BertConfig, LlamaConfig, Qwen2Config

from llama_bidir import LlamaBidirectionalConfig


def test_defaults_are_those_of_the_contract():
    config = LlamaBidirectionalConfig()
    assert config.model_type == "llama_bidirec"
    assert (config.pooling, config.temperature, config.is_causal, config.num_labels) == ("avg", 1.0, False, 1)
    assert config.prompt_template == "question:{query} \n \n passage:{passage}"
    assert config.rerank_max_length == 512
    assert LlamaBidirectionalConfig(max_position_embeddings=128).rerank_max_length == 128
    assert config.sentence_transformers == {"activation_fn": "torch.nn.modules.linear.Identity"}


def test_mean_is_read_as_avg():
    assert LlamaBidirectionalConfig(pooling="mean").pooling == "avg"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pooling", "max", r"pooling must be one of 'avg', 'cls' or 'last', got 'max'"),
        ("pooling", None, r"pooling must be one of 'avg', 'cls' or 'last', got None"),
        ("temperature", 0, r"temperature must be a finite number above 0 .*, got 0"),
        ("temperature", -1.0, r"temperature .* got -1.0"),
        ("temperature", math.inf, r"temperature .* got inf"),
        ("temperature", math.nan, r"temperature .* got nan"),
        ("temperature", True, r"temperature .* got True"),
        ("temperature", "1", r"temperature .* got '1'"),
        ("is_causal", 1, r"is_causal must be False .* got 1"),
        ("prompt_template", "only {query}", r"exactly one \{query\} and one \{passage\}.* got 'only \{query\}'"),
        ("prompt_template", "{query}{query}{passage}", "exactly one"),
        ("prompt_template", "{query.__class__}{passage}", "exactly one"),
        ("prompt_template", "{query[0]}{passage}", "exactly one"),
        ("prompt_template", "{query!r}{passage}", "exactly one"),
        ("prompt_template", "{query:>9}{passage}", "exactly one"),
        ("prompt_template", "{query}{passage}{title}", "exactly one"),
        ("prompt_template", "{}{query}{passage}", "exactly one"),
        ("prompt_template", "{query}{passage", "expected '}'"),
        ("prompt_template", None, "got None"),
        ("rerank_max_length", 7, r"int from 8 to max_position_embeddings \(256\), got 7"),
        ("rerank_max_length", 257, r"got 257"),
        ("rerank_max_length", 64.0, r"got 64.0"),
    ],
)
def test_wrong_values_raise_value_error_wherever_they_are_set(field, value, message, base_checkpoint):
    with pytest.raises(ValueError, match=message):
        LlamaBidirectionalConfig(**tiny_config(**{field: value}))
    with pytest.raises(ValueError, match=message):
        LlamaBidirectionalConfig.from_pretrained(base_checkpoint, **{field: value})
    config = LlamaBidirectionalConfig(**tiny_config())
    before = copy.deepcopy(getattr(config, field))
    with pytest.raises(ValueError, match=message):
        setattr(config, field, value)
    assert getattr(config, field) == before


@pytest.mark.parametrize("num_labels", [0, -1, "2", True])
def test_wrong_numbers_of_labels(num_labels):
    with pytest.raises(ValueError, match="num_labels must be an int above 0"):
        LlamaBidirectionalConfig(num_labels=num_labels)


def test_an_absurd_number_of_labels_takes_no_memory():
    with pytest.raises(ValueError, match=r"num_labels must be at most 65536 .*, got 100000000"):
        LlamaBidirectionalConfig(num_labels=10**8)
    config = LlamaBidirectionalConfig()
    with pytest.raises(ValueError, match=r"num_labels must be at most 65536 .*, got 65537"):
        config.num_labels = 65_537
    assert config.num_labels == 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size must be an int of at least 1, got 0"),
        ("hidden_size", -32, "hidden_size must be an int of at least 1, got -32"),
        ("hidden_size", "32", "hidden_size must be an int of at least 1, got '32'"),
        ("hidden_size", 32.0, r"hidden_size must be an int of at least 1, got 32\.0"),
        ("hidden_size", 33, r"hidden_size \(33\) must be a multiple of num_attention_heads \(4\)"),
        ("intermediate_size", None, "intermediate_size must be an int of at least 1, got None"),
        ("num_hidden_layers", -1, "num_hidden_layers must be an int of at least 0, got -1"),
        ("num_attention_heads", 0, "num_attention_heads must be an int of at least 1, got 0"),
        ("num_attention_heads", -4, "num_attention_heads must be an int of at least 1, got -4"),
        ("num_attention_heads", True, "num_attention_heads must be an int of at least 1, got True"),
        ("num_key_value_heads", 0, "num_key_value_heads must be an int of at least 1, got 0"),
        ("num_key_value_heads", 3, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ("num_key_value_heads", 8, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(8\)"),
        ("head_dim", 0, "head_dim must be an int of at least 1, got 0"),
        ("head_dim", 7, "head_dim must be even, because RoPE rotates pairs, got 7"),
        ("max_position_embeddings", 0, "max_position_embeddings must be an int of at least 1, got 0"),
    ],
)
def test_sizes_that_no_model_can_have(field, value, message, base_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=message):
        LlamaBidirectionalConfig(**tiny_config(**{field: value}))
    with pytest.raises(ValueError, match=message):
        LlamaBidirectionalConfig.from_pretrained(base_checkpoint, **{field: value})
    stored = {**json.loads((base_checkpoint / "config.json").read_text()), field: value, "model_type": "llama_bidirec"}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_length_is_checked_against_positions_before_saving(tmp_path):
    config = LlamaBidirectionalConfig(**tiny_config())
    config.max_position_embeddings = 64
    with pytest.raises(ValueError, match=r"max_position_embeddings \(64\), got 256"):
        config.save_pretrained(tmp_path)
    config.rerank_max_length = None
    assert config.rerank_max_length == 64
    config.save_pretrained(tmp_path)
    assert LlamaBidirectionalConfig.from_pretrained(tmp_path).rerank_max_length == 64


def test_literal_braces_are_allowed():
    assert LlamaBidirectionalConfig(prompt_template='{{"q": {query}, "p": {passage}}}').prompt_template.count("{{") == 1


def test_numpy_numbers_are_numbers():
    temperature = LlamaBidirectionalConfig(temperature=np.float32(0.5)).temperature
    assert type(temperature) is float
    assert temperature == 0.5


def test_saved_and_reloaded_with_every_field(tmp_path):
    fields = {
        "pooling": "cls",
        "temperature": 0.02,
        "is_causal": True,
        "prompt_template": "{passage} | {query}",
        "rerank_max_length": 99,
    }
    LlamaBidirectionalConfig(**tiny_config(**fields)).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert type(reloaded) is LlamaBidirectionalConfig
    for name, value in fields.items():
        assert saved[name] == value
        assert getattr(reloaded, name) == value


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_any_number_of_labels_survives_saving(num_labels, tmp_path):
    LlamaBidirectionalConfig(**tiny_config(num_labels=num_labels)).save_pretrained(tmp_path)
    assert LlamaBidirectionalConfig.from_pretrained(tmp_path).num_labels == num_labels


def test_llama_checkpoint_is_read_without_a_warning(base_checkpoint, caplog):
    config = LlamaBidirectionalConfig.from_pretrained(base_checkpoint, pooling="last", temperature=2)
    assert (config.model_type, config.pooling, config.temperature) == ("llama_bidirec", "last", 2.0)
    assert config.num_key_value_heads == 2
    assert caplog.text == ""


def test_keyword_overrides_are_validated_together(base_checkpoint):
    config = LlamaBidirectionalConfig.from_pretrained(base_checkpoint, max_position_embeddings=64)
    assert config.rerank_max_length == 64
    config = LlamaBidirectionalConfig.from_pretrained(base_checkpoint, max_position_embeddings=2048)
    assert config.rerank_max_length == 512


def test_made_from_the_dict_of_a_llama_config():
    config = LlamaBidirectionalConfig(**LlamaConfig(**tiny_config()).to_dict())
    assert config.to_dict()["model_type"] == config.model_type == "llama_bidirec"
    assert config.num_labels == 1


@pytest.mark.parametrize("other", [BertConfig, Qwen2Config])
def test_other_architectures_are_refused(other, tmp_path):
    other().save_pretrained(tmp_path)
    message = (
        f"{str(tmp_path)!r} has model_type '{other.model_type}', but only Llama checkpoints can be made bidirectional"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        LlamaBidirectionalConfig.from_pretrained(tmp_path)


def test_paths_without_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(OSError, match=r"not a checkpoint: there is no such folder"):
        LlamaBidirectionalConfig.from_pretrained(tmp_path / "missing")
    with pytest.raises(OSError, match=r"config\.json"):
        LlamaBidirectionalConfig.from_pretrained(tmp_path)


def test_auto_map_of_a_checkpoint_is_not_kept():
    config = LlamaBidirectionalConfig(**tiny_config(auto_map={"AutoConfig": "model.LlamaBidirectionalConfig"}))
    assert "auto_map" not in config.to_dict()

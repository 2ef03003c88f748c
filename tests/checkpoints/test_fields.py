"""Fields of the wrong type, found by random input: one error that names the file, whatever the libraries raise."""

import json

import pytest
from helpers import make_model, tiny_config

from llama_bidir import CrossEncoder, LlamaBidirectionalConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architectures", True, "architectures must be a list of names, got True"),
        ("architectures", "LlamaForSequenceClassification", "architectures must be a list of names, got 'LlamaFor"),
        ("id2label", {}, r"num_labels must be an int above 0 \(the outputs of the score head\), got 0"),
    ],
)
def test_a_configuration(tmp_path, field, value, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **tiny_config(), field: value}))
    with pytest.raises(ValueError, match=message):
        LlamaBidirectionalConfig.from_pretrained(tmp_path)


def test_a_configuration_with_two_wrong_fields_is_named(tmp_path):
    fields = {"model_type": "llama", **tiny_config(), "id2label": {"x": "y"}, "num_attention_heads": 5}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"config\.json: a field cannot be used: ValueError: invalid literal for int"):
        LlamaBidirectionalConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("alpha_pattern", None, "AttributeError"),
        ("modules_to_save", [None], "AttributeError"),
        ("modules_to_save", False, "AttributeError"),
        ("init_lora_weights", [True], "AttributeError"),
        ("arrow_config", [None], "TypeError"),
        ("monteclora_config", {"x": 1}, "RecursionError"),
        ("r", -1, "ValueError"),
        ("bias", "", "NotImplementedError"),
    ],
)
def test_an_adapter(base_checkpoint, tmp_path, field, value, error):
    peft = pytest.importorskip("peft")
    from llama_bidir.training.lora import add_adapter

    model = add_adapter(make_model(), peft.LoraConfig(r=2))
    model.peft_config["default"].base_model_name_or_path = str(base_checkpoint)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    fields = json.loads(file.read_text())
    if field not in fields:
        pytest.skip(f"this release of PEFT has no {field}")
    file.write_text(json.dumps({**fields, field: value}))
    message = rf"the adapter '{tmp_path}' cannot be used: {error}: .*; correct adapter_config\.json$"
    with pytest.raises(ValueError, match=message):
        CrossEncoder(str(tmp_path))

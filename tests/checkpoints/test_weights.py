"""Weights that do not fit the configuration are refused before memory is spent on them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_model, tiny_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    TorchAoConfig,
)

from llama_bidir import (
    CrossEncoder,
    LlamaBidirectionalConfig,
    LlamaBidirectionalForSequenceClassification,
    LlamaBidirectionalModel,
)
from llama_bidir.cli import main
from llama_bidir.weights_llama_bidir import weight_sizes

LOADERS = {
    "CrossEncoder": CrossEncoder,
    "class": LlamaBidirectionalForSequenceClassification.from_pretrained,
    "Auto class": AutoModelForSequenceClassification.from_pretrained,
}


@pytest.fixture
def broken(save):
    """Saves a tiny reranker, then changes its configuration and its weights."""

    def broken(change=None, *, without=(), **fields):
        folder, _ = save()
        file = folder / "model.safetensors"
        weights = load_file(file)
        for name in [name for name in weights if name.startswith(tuple(without))]:
            del weights[name]
        save_file(change(weights) if change else weights, file, metadata={"format": "pt"})
        edit_config(folder, **fields)
        return folder

    return broken


def edit_config(folder: Path, *, without=(), **fields) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if name not in without}))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention_bias": True, "num_labels": 3},
        {"mlp_bias": True, "num_hidden_layers": 3, "tie_word_embeddings": True},
        {"head_dim": 6, "num_key_value_heads": 4},
        {"num_key_value_heads": 1, "vocab_size": 77, "intermediate_size": 20},
    ],
)
def test_the_shapes_are_those_of_the_model(fields):
    model = make_model(**fields)
    expected = {}
    for name, sizes in weight_sizes(model.config).items():
        layers = range(model.config.num_hidden_layers) if "layers.N." in name else [0]
        for layer in layers:
            key = name.replace("layers.N.", f"layers.{layer}.")
            expected[key if key == "score.weight" else f"model.{key}"] = tuple(size for _, size in sizes)
    assert expected == {name: tuple(weight.shape) for name, weight in model.state_dict().items()}


def replace(name, shape, dtype=torch.float32):
    return lambda weights: {**weights, name: torch.ones(shape, dtype=dtype)}


def rename(old, new):
    return lambda weights: {name.replace(old, new, 1): weight for name, weight in weights.items()}


Q = "model.layers.1.self_attn.q_proj"
MISMATCHES = {
    # Weights that would be random.
    "no layer 1": (
        {"without": ["model.layers.1."]},
        r"model\.safetensors lacks model\.layers\.1\..*and others, and only score\.weight may be new\. In the "
        "configuration, num_hidden_layers is 2, but the checkpoint holds 1 layers: correct the field, or get the whole",
    ),
    "no layer 0": (
        {"without": ["model.layers.0."]},
        r"lacks model\.layers\.0\.\S+, .* only score\.weight may be new: get the whole checkpoint again",
    ),
    "no embeddings": ({"without": ["model.embed_tokens"]}, r"lacks model\.embed_tokens\.weight, and only score"),
    "no last norm": ({"without": ["model.norm"]}, r"lacks model\.norm\.weight, and only score"),
    "no matrix": ({"without": [Q]}, r"lacks model\.layers\.1\.self_attn\.q_proj\.weight, and only"),
    "one layer too many": ({"num_hidden_layers": 3}, "num_hidden_layers is 3, but the checkpoint holds 2 layers"),
    "10,000 layers": ({"num_hidden_layers": 10**4}, "num_hidden_layers is 10000, but the checkpoint holds 2 layers"),
    "10^18 layers": ({"num_hidden_layers": 10**18}, f"num_hidden_layers is {10**18}, but the checkpoint holds 2 "),
    "biases": ({"attention_bias": True}, r"lacks model\.layers\.0\.self_attn\.q_proj\.bias, "),
    "only a head": ({"without": ["model."]}, r"lacks model\.embed_tokens\.weight, "),
    "another prefix": (
        {"change": rename("model.", "transformer."), "without": ["score"]},
        r"holds no weights of a Llama: their names should be like 'model\.layers\.0.*'transformer\.embed_tokens",
    ),
    "a training wrapper": (
        {"change": lambda weights: {f"module.{name}": weight for name, weight in weights.items()}},
        r"holds no weights of a Llama: .*'module\.model\.embed_tokens\.weight'",
    ),
    # Weights that would be ignored.
    "one layer too few": (
        {"num_hidden_layers": 1},
        "num_hidden_layers is 1 in the configuration, but .*safetensors holds 2 layers: correct the field, or pass "
        "num_hidden_layers=1",
    ),
    "a bias": ({"change": replace(f"{Q}.bias", 32)}, rf"holds {Q}\.bias, which .*\(attention_bias is False"),
    "a norm of queries": ({"change": replace(f"{Q}_norm.weight", 8)}, r"q_proj_norm\.weight, which this"),
    "a bias of the head": ({"change": replace("score.bias", 1)}, r"holds score\.bias, which this model does not have"),
    # Weights of other shapes.
    "vocabulary": (
        {"vocab_size": 10**12},
        rf"has vocab_size {10**12}, so model\.embed_tokens\.weight should have shape \[{10**12}, 32\], but it has "
        r"\[320, 32\] in .*/model\.safetensors: correct",
    ),
    "hidden size": ({"hidden_size": 64}, r"hidden_size 64, so model\.\S+ should have shape \[.*64\], but .* \[.*32\]"),
    "inner size": ({"intermediate_size": 10**9}, rf"has intermediate_size {10**9}, so \S+mlp\S+ should have shape"),
    "heads": ({"num_attention_heads": 8}, "has num_attention_heads x head_dim 64, so .*(q|o)_proj"),
    "heads alone": (
        {"num_attention_heads": 8, "head_dim": None},
        r"has num_key_value_heads x head_dim \(with num_attention_heads 8\) 8, so .*k_proj.* \[8, 32\], .* \[16, 32\]",
    ),
    "head size": ({"head_dim": 16}, r"has num_\S+_heads x head_dim.* (64|32), so model\.layers\.0\.self_attn"),
    "groups": ({"num_key_value_heads": 1}, r"num_key_value_heads x .*8, so \S+k_proj\S+ should have shape \[8, 32\]"),
    "labels": (
        {"id2label": {str(n): f"L{n}" for n in range(3)}},
        r"has num_labels 3, so score\.weight should have shape \[3, 32\], but it has \[1, 32\] in .*safetensors",
    ),
    "10^8 labels": (
        {"num_labels": 10**8, "id2label": None},
        rf"has num_labels {10**8}, so score\.weight should have shape \[{10**8}, 32\], but it has \[1, 32\] in",
    ),
    "a wide head": ({"change": replace("score.weight", (1, 33))}, r"hidden_size 32, so score\..* has \[1, 33\] in"),
    "a flat head": ({"change": replace("score.weight", 32)}, r"score\.weight should .* \[1, 32\], but it has \[32\]"),
    "an integer head": (
        {"change": replace("score.weight", (1, 32), torch.int64)},
        r"score\.weight in .*safetensors has dtype I64, but weights are floating-point",
    ),
    "integers": ({"change": replace("model.norm.weight", 32, torch.int8)}, r"\.norm\.weight in .* has dtype I8, but"),
    "truth values": ({"change": replace("model.norm.weight", 32, torch.bool)}, "has dtype BOOL, but"),
}  # fmt: skip


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("case", MISMATCHES)
def test_what_does_not_fit_is_named_with_the_file(broken, case, loader):
    changes, message = MISMATCHES[case]
    folder = broken(**changes)
    with pytest.raises(ValueError, match=message) as error:
        LOADERS[loader](folder)
    assert str(folder / "model.safetensors") in str(error.value)
    assert "ignore_mismatched_sizes" not in str(error.value)


@pytest.mark.parametrize(
    "argument", [{"num_labels": 10**8}, {"num_labels": 3}, {"num_hidden_layers": 5}, {"vocab_size": 10**12}]
)
def test_an_argument_that_does_not_fit_is_named(broken, argument):
    folder = broken()
    [name] = argument
    with pytest.raises(ValueError, match=f"{name} (is )?{argument[name]}, ") as error:
        LlamaBidirectionalForSequenceClassification.from_pretrained(folder, **argument)
    assert str(folder / "model.safetensors") in str(error.value)
    assert "ignore_mismatched_sizes" not in str(error.value)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process")
def test_absurd_sizes_take_no_memory(broken):
    folder = broken()
    sizes = [
        {"num_labels": 10**8, "id2label": None},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**9},
        {"hidden_size": 10**9},
        {"intermediate_size": 10**9},
        {"head_dim": 10**9},
    ]
    code = f"""
import json, resource, sys
from pathlib import Path
from transformers import AutoModelForSequenceClassification
from llama_bidir import CrossEncoder, LlamaBidirectionalModel
folder = Path({str(folder)!r})
config = json.loads((folder / "config.json").read_text())
CrossEncoder(folder).predict(("a", "b"))  # imports everything
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
for fields in {sizes!r}:
    (folder / "config.json").write_text(json.dumps({{**config, **fields}}))
    for load in (
        CrossEncoder, AutoModelForSequenceClassification.from_pretrained, LlamaBidirectionalModel.from_pretrained
    ):
        try:
            load(folder)
        except ValueError as error:
            print(next(iter(fields)) in str(error).lower())
        else:
            print(fields, load)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["True"] * 3 * len(sizes)


# What may differ


@pytest.mark.parametrize("load", [*LOADERS.values(), AutoModel.from_pretrained])
def test_what_is_not_of_a_llama_is_ignored_without_a_word(broken, load, caplog, capfd):
    extras = {
        "lm_head.weight": (320, 32),
        "model.rotary_emb.inv_freq": (4,),
        "model.layers.0.self_attn.rotary_emb.inv_freq": (4,),
    }
    folder = broken(lambda weights: {**weights, **{name: torch.ones(shape) for name, shape in extras.items()}})
    caplog.clear()
    capfd.readouterr()
    load(folder)
    assert caplog.text == ""
    assert not [name for name in extras if name in capfd.readouterr().err]


def test_arguments_that_are_none_check_as_without_them(broken):
    folder = broken()
    for name in ("key_mapping", "state_dict", "variant"):
        with pytest.raises(ValueError, match=r"vocab_size 999, so model\.embed_tokens\.weight should have shape"):
            LlamaBidirectionalForSequenceClassification.from_pretrained(folder, **{name: None}, vocab_size=999)


def test_fewer_layers_may_be_asked_for(base_checkpoint, reranker_checkpoint):
    first = load_file(base_checkpoint / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    config = LlamaBidirectionalConfig.from_pretrained(base_checkpoint, num_hidden_layers=1)
    students = [
        LlamaBidirectionalForSequenceClassification.from_pretrained(base_checkpoint, num_hidden_layers=1),
        LlamaBidirectionalForSequenceClassification.from_pretrained(base_checkpoint, config=config),
        AutoModelForSequenceClassification.from_pretrained(base_checkpoint, config=config),
        LlamaBidirectionalModel.from_pretrained(base_checkpoint, num_hidden_layers=1),
    ]
    for student in students:
        [layer] = getattr(student, "model", student).layers
        assert torch.equal(layer.mlp.up_proj.weight, first)
    student = AutoModelForSequenceClassification.from_pretrained(reranker_checkpoint, num_hidden_layers=1)
    assert len(student.model.layers) == 1
    assert len(CrossEncoder(reranker_checkpoint, model_kwargs={"num_hidden_layers": 1}).model.model.layers) == 1


def test_a_head_of_another_size_is_replaced_where_the_caller_says_so(broken, caplog):
    folder = broken()
    model, info = LlamaBidirectionalForSequenceClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert model.score.weight.shape == (3, 32)
    assert {name for name, *_ in info["mismatched_keys"]} == {"score.weight"}
    assert "score.weight is new" in caplog.text
    edit_config(folder, intermediate_size=16)
    with pytest.raises(ValueError, match="has intermediate_size 16, so "):
        LlamaBidirectionalForSequenceClassification.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_the_report_of_a_load_is_there_for_who_asks(base_checkpoint):
    for cls in (LlamaBidirectionalForSequenceClassification, LlamaBidirectionalModel):
        model, info = cls.from_pretrained(base_checkpoint, output_loading_info=True)
        assert type(model) is cls
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]


@pytest.mark.parametrize("cls", [LlamaForCausalLM, LlamaModel])
def test_every_shard_is_read(cls, tmp_path):
    cls(LlamaConfig(**tiny_config())).save_pretrained(tmp_path, max_shard_size="20KB")
    LlamaBidirectionalForSequenceClassification.from_pretrained(tmp_path)
    [*_, last] = sorted(tmp_path.glob("*.safetensors"))
    weights = load_file(last)
    name = next(name for name in weights if "layers.1." in name)
    save_file({other: weight for other, weight in weights.items() if other != name}, last, metadata={"format": "pt"})
    missing = re.escape(f"{tmp_path} lacks model.{name.removeprefix('model.')}, and only score.weight may be new")
    with pytest.raises(ValueError, match=missing):
        AutoModel.from_pretrained(tmp_path, config=LlamaBidirectionalConfig.from_pretrained(tmp_path))


def test_the_shards_of_a_cached_repository_are_read(tmp_path):
    repo = tmp_path / "models--you--sharded"
    folder = repo / "snapshots" / ("0" * 40)
    LlamaForCausalLM(LlamaConfig(**tiny_config())).save_pretrained(folder, max_shard_size="20KB")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    LlamaBidirectionalModel.from_pretrained("you/sharded", cache_dir=tmp_path)
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"0000 lacks model\.layers\.2\..* num_hidden_layers is 3, but the checkpoint"):
        LlamaBidirectionalModel.from_pretrained("you/sharded", cache_dir=tmp_path)


def test_a_cached_adapter_needs_no_configuration(base_checkpoint, tmp_path):
    # As where nobody has asked for its config.json, so that the cache cannot say that there is none.
    peft = pytest.importorskip("peft")
    repo = tmp_path / "models--you--adapter"
    base_copy = shutil.copytree(base_checkpoint, tmp_path / "base")
    base = LlamaBidirectionalForSequenceClassification.from_pretrained(base_copy)
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    adapted.save_pretrained(repo / "snapshots" / ("0" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    model = LlamaBidirectionalForSequenceClassification.from_pretrained("you/adapter", cache_dir=tmp_path)
    assert {name.split(".")[-2] for name, _ in model.named_parameters() if "lora_A" in name} == {"default"}
    edit_config(base_copy, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"num_hidden_layers is 1 in the configuration, but .*base.model\.safetensors"):
        LlamaBidirectionalForSequenceClassification.from_pretrained("you/adapter", cache_dir=tmp_path)


def test_weights_that_are_not_in_safetensors_are_checked_when_they_are_loaded(broken):
    folder = broken()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    load = LlamaBidirectionalForSequenceClassification.from_pretrained
    assert torch.equal(load(folder, use_safetensors=False).score.weight, weights["score.weight"])
    del weights["model.norm.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"norm\.weight, or holds other shapes\. These weights would be random"):
        load(folder, use_safetensors=False)
    config = LlamaBidirectionalConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"the state_dict lacks model\.norm\.weight, or holds"):
        load(None, config=config, state_dict=weights)


def test_the_command_line_names_what_is_missing_in_one_line(broken, tmp_path, capsys):
    folder = broken(without=["model.layers.1."])
    command = ["export", "--model", str(folder), "--format", "hub", "--output", str(tmp_path / "out")]
    assert main(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "lacks model.layers.1." in line]) == 1
    assert not [line for line in lines if "Traceback" in line]


def test_quantized_weights_are_compared_as_far_as_they_are_plain(broken, tmp_path):
    pytest.importorskip("accelerate")
    torchao = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    load = LlamaBidirectionalForSequenceClassification.from_pretrained
    folder = tmp_path / "quantized"
    load(broken(), quantization_config=config).save_pretrained(folder)
    load(folder)
    for fields, message in {
        ("num_hidden_layers", 1): "num_hidden_layers is 1 in the configuration, but .* holds 2 layers",
        ("num_hidden_layers", 10**9): f"num_hidden_layers is {10**9}, but the checkpoint holds 2 layers",
        ("vocab_size", 10**9): rf"has vocab_size {10**9}, so model\.embed_tokens\.weight should have shape",
        ("hidden_size", 10**9): f"has hidden_size {10**9}, so ",
    }.items():
        broken_folder = shutil.copytree(folder, tmp_path / "-".join(map(str, fields)))
        edit_config(broken_folder, **dict([fields]))
        with pytest.raises(ValueError, match=message):
            load(broken_folder)
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    kept = {name: weight for name, weight in load_file(file).items() if "layers.1.mlp.up_proj" not in name}
    save_file(kept, file, metadata=metadata)
    with pytest.raises(ValueError, match=r"quantized lacks model\.layers\.1\.mlp\.up_proj\.weight, or holds"):
        load(folder)


@pytest.mark.parametrize("missing", [None, "blk.1.ffn_up.weight", "token_embd.weight"])
def test_a_gguf_file_without_some_of_its_weights_is_refused(tmp_path, missing):
    pytest.importorskip("accelerate")
    gguf = pytest.importorskip("gguf")
    names = {
        "token_embd": (320, 32), "output_norm": (32,), "attn_norm": (32,), "ffn_norm": (32,), "attn_q": (32, 32),
        "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32), "ffn_gate": (48, 32), "ffn_up": (48, 32),
        "ffn_down": (32, 48),
    }  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_vocab_size(320)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_context_length(256)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, shape in names.items():
        for full in [name] if name.startswith(("token", "output")) else [f"blk.{layer}.{name}" for layer in range(2)]:
            if f"{full}.weight" != missing:
                writer.add_tensor(f"{full}.weight", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for cls in (LlamaBidirectionalForSequenceClassification, LlamaBidirectionalModel):
        if missing is None:
            assert cls.from_pretrained(tmp_path, gguf_file="model.gguf").config.hidden_size == 32
            continue
        with pytest.raises(ValueError, match=r"\.gguf lacks (layers\.1\.mlp\.up_proj|embed_tokens)\.weight, or holds"):
            cls.from_pretrained(tmp_path, gguf_file="model.gguf")

"""Checkpoints with damaged files: the configuration, the tokenizer, the weights, their index, and adapters."""

import contextlib
import io
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from llama_bidir import CrossEncoder, LlamaBidirectionalConfig
from llama_bidir.checkpoints.loading import load_tokenizer
from llama_bidir.training.lora import add_adapter
from tests.helpers import make_model, make_tokenizer, tiny_config

from .damage import altered, damaged, to_json
from .target import Target, attempt, check_message, new_folder, workspace

PAIRS = [("where do bees find their way?", "Honey bees navigate by the sun."), ("", "The hive.")]
FOREIGN: dict[str, Any] = {
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "torch_dtype": "float16",
    "hidden_act": "silu",
    "_attn_implementation": "sdpa",
    "auto_map": {"AutoModel": "modeling.Model"},
    "quantization_config": {"quant_method": "bitsandbytes"},
    "architectures": ["LlamaForSequenceClassification"],
    "id2label": {"0": "x", "1": "y"},
}
# What decides a score, and so must be the same after a save.
DECISIVE = [*tiny_config(), "pooling", "temperature", "is_causal", "prompt_template", "rerank_max_length", "num_labels"]
DECISIVE += ["head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "attention_bias", "mlp_bias"]


@cache
def checkpoint(kind: str) -> Path:
    """A tiny checkpoint: whole, in shards, or an adapter on the whole one."""
    folder = new_folder(f"checkpoint {kind}")
    make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>").save_pretrained(folder)
    model: Any = make_model()
    if kind == "adapter":
        import peft

        model = add_adapter(model, peft.LoraConfig(r=2))
        model.peft_config["default"].base_model_name_or_path = str(checkpoint("whole"))
        model.base_model.model.config.save_pretrained(folder)
    model.save_pretrained(folder, max_shard_size="40KB" if kind == "shards" else "1GB")
    return folder


def scores(folder: Path) -> list[float]:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        return CrossEncoder(str(folder), device="cpu", dtype="float32", local_files_only=True).predict(PAIRS).tolist()


def check_config(config: Any) -> None:
    """A configuration is read with its rules, or the error names the folder or the field; nothing of it is run."""
    folder = new_folder("config")
    (folder / "config.json").write_bytes(to_json(config))
    read, error = attempt(LlamaBidirectionalConfig.from_pretrained, folder)
    if error is not None:
        names = [str(folder), *whole_config, *(config if isinstance(config, dict) else [])]
        assert any(name and name in str(error) for name in names), str(error)
        return
    assert read.pooling in ("avg", "cls", "last")
    assert 0 < read.temperature < float("inf")
    assert read.is_causal is (config.get("is_causal", False) if isinstance(config, dict) else False)
    assert min(8, read.max_position_embeddings) <= read.rerank_max_length <= read.max_position_embeddings
    assert read.num_labels >= 1
    assert read.prompt_template.format(query="q", passage="p").count("q") >= 1
    saved = workspace() / "config saved"
    read.save_pretrained(saved)
    again = LlamaBidirectionalConfig.from_pretrained(saved)
    for field in DECISIVE:
        first, second = (json.dumps(getattr(each, field), sort_keys=True) for each in (read, again))
        assert first == second, field


def check_config_bytes(content: bytes) -> None:
    """A configuration with damaged bytes is one of JSON, or the error names the folder."""
    folder = new_folder("config")
    (folder / "config.json").write_bytes(content)
    _, error = attempt(LlamaBidirectionalConfig.from_pretrained, folder)
    if error is not None and not isinstance(attempt(json.loads, content)[0], dict):
        check_message(error, folder)


def check_tokenizer(name: str, data: st.DataObject) -> None:
    """A damaged tokenizer loads, or the error names the folder."""
    folder = workspace() / "tokenizer"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint("whole"), folder)
    content = (folder / name).read_bytes()
    is_json = data.draw(st.booleans())
    changed = data.draw(altered(json.loads(content)).map(to_json) if is_json else damaged(content, most=2))
    (folder / name).write_bytes(changed)
    # Older releases of tokenizers read two tokens of one id in random order, so the second attempt may fail instead.
    found = []
    for _ in range(2):
        tokenizer, error = attempt(load_tokenizer, str(folder))
        if error is not None:
            return check_message(error, folder)
        found.append(tokenizer("bees")["input_ids"])
    assert found[0] == found[1]
    return None


def check_files(kind: str, name: str, data: st.DataObject) -> None:
    """
    A checkpoint with a damaged file gives the same number of finite scores twice, or an error that names the folder. It
    never asks a question, and it never takes random weights for missing ones.
    """
    folder = workspace() / "damaged checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoint(kind), folder)
    path = folder / name
    content = path.read_bytes()
    is_json = name.endswith(".json") and data.draw(st.booleans())
    if is_json:
        content = data.draw(altered(json.loads(content)).map(to_json))
    elif name.endswith(".safetensors"):
        # The header, not the numbers: other numbers are other weights.
        size = 8 + int.from_bytes(content[:8], "little")
        header = data.draw(damaged(content[:size], most=1))
        content = header + content[size:]
    else:
        content = data.draw(damaged(content, most=1))
    path.write_bytes(content)
    found, error = attempt(scores, folder)
    if error is not None:
        named = (str(folder), "but the model has 320 embeddings", *whole_config)
        assert any(part in str(error) for part in named), str(error)
        return
    assert len(found) == len(PAIRS)
    assert found == scores(folder), "other scores at the second loading: some weights are random"


whole_config = {**LlamaBidirectionalConfig(**tiny_config()).to_dict(), **FOREIGN}
NAMES = [
    ("whole", "config.json"),
    ("whole", "tokenizer.json"),
    ("whole", "tokenizer_config.json"),
    ("whole", "model.safetensors"),
    ("shards", "model.safetensors.index.json"),
    ("adapter", "adapter_config.json"),
    ("adapter", "adapter_model.safetensors"),
]
TARGETS = [
    Target("configurations", check_config, {"config": altered(whole_config)}, weight=0.5, test_cases=50),
    Target(
        "configurations of foreign models",
        check_config,
        {"config": altered({"model_type": "llama", **tiny_config(), **FOREIGN})},
        weight=0.5,
        test_cases=50,
    ),
    Target(
        "bytes of configurations",
        check_config_bytes,
        {"content": damaged(to_json({"model_type": "llama_bidirec", **tiny_config()}))},
        weight=0.5,
        test_cases=50,
    ),
    Target(
        "tokenizers",
        check_tokenizer,
        {"name": st.sampled_from(["tokenizer.json", "tokenizer_config.json"]), "data": st.data()},
        weight=0.2,
        test_cases=30,
    ),
    *(
        Target(
            f"{name} of a checkpoint",
            check_files,
            {"kind": st.just(kind), "name": st.just(name), "data": st.data()},
            weight=0.03,
            test_cases=8,
        )
        for kind, name in NAMES
    ),
]

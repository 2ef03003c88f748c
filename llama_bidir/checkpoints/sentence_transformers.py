"""The sentence-transformers layout: a Llama without its causal mask, pooling, and a linear head."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedTokenizerBase

from ..files_llama_bidir import check_weight_file, find_file, is_inside, read_json
from ..modeling_llama_bidir import LlamaBidirectionalForSequenceClassification
from .chat_template import make_chat_template, save_tokenizer
from .files import fold_temperature, llama_config, write_json

POOLING_MODES = {"avg": "mean", "cls": "cls", "last": "lasttoken"}
MODULES_FILE = "modules.json"
POOLING_FOLDER = "1_Pooling"
HEAD_FOLDER = "2_Dense"
MODULES = {
    "": "sentence_transformers.base.modules.transformer.Transformer",
    POOLING_FOLDER: "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    HEAD_FOLDER: "sentence_transformers.base.modules.dense.Dense",
}
HIDDEN_STATES = {"method": "forward", "method_output_name": "last_hidden_state"}
# Fields of the configuration that sentence-transformers ignores.
KEPT = ("prompt_template", "instruction", "rerank_max_length", "int8_skip_modules", "calibration")
IDENTITY = "torch.nn.modules.linear.Identity"

USE = """
```bash
pip install "sentence-transformers>=6.2"
```

```python
from sentence_transformers import CrossEncoder

reranker = CrossEncoder({model_id})
results = reranker.rank("how do bees find their way?", ["Honey bees navigate by the position of the sun.", "The hive."])
```

sentence-transformers computes the head and the scores in the dtype of the weights. If that is half precision, load the
model with `model_kwargs={{"dtype": "float32"}}` to keep all digits of the scores.
"""


def write(
    reranker: LlamaBidirectionalForSequenceClassification, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """
    Writes a reranker as three modules. Scores are raw logits; the temperature is part of the head.

    Raises:
        ValueError: the prompt cannot be written as a chat template, the only form that sentence-transformers reads.
    """
    config = reranker.config
    make_chat_template(tokenizer, config.prompt_template, config.instruction)  # raises; save_tokenizer only warns
    reranker.model.save_pretrained(folder)
    # sentence-transformers ignores the prompt and the length. They are kept for loading the folder here again.
    kept = {name: getattr(config, name) for name in KEPT if getattr(config, name) is not None}
    LlamaConfig(**llama_config(config, architectures=["LlamaModel"], **kept)).save_pretrained(folder)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    save_tokenizer(tokenizer, folder, config)
    files: dict[str, Any] = {
        MODULES_FILE: [
            {"idx": index, "name": str(index), "path": path, "type": module}
            for index, (path, module) in enumerate(MODULES.items())
        ],
        f"{POOLING_FOLDER}/config.json": {
            "embedding_dimension": config.hidden_size,
            "pooling_mode": POOLING_MODES[config.pooling],
            "include_prompt": True,
        },
        f"{HEAD_FOLDER}/config.json": {
            "in_features": config.hidden_size,
            "out_features": config.num_labels,
            "bias": False,
            "activation_function": IDENTITY,
            "module_input_name": "sentence_embedding",
            "module_output_name": "scores",
        },
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": HIDDEN_STATES, "message": {**HIDDEN_STATES, "format": "flat"}},
            "module_output_name": "token_embeddings",
        },
        "config_sentence_transformers.json": {
            "model_type": "CrossEncoder",
            "activation_fn": IDENTITY,
            "prompts": {},
            "default_prompt_name": None,
            "requirements": {"transformers": ">=5.2"},
        },
    }
    for file, content in files.items():
        write_json(folder / file, content)
    weights = {"linear.weight": fold_temperature(reranker)}
    save_file(weights, folder / HEAD_FOLDER / "model.safetensors", metadata={"format": "pt"})


def read_head(name_or_path: str, source: Mapping[str, Any]) -> tuple[str, torch.Tensor] | None:
    """
    Reads the pooling and the head of a reranker in this layout, also when sentence-transformers has saved it.

    Args:
        name_or_path: a folder or the id of a Hub repository.
        source: arguments of the Hub, such as `revision`.

    Returns:
        the pooling and the head's weight of shape `(num_labels, hidden_size)`; None when the folder has another layout,
        or the transformers model includes the head.

    Raises:
        ValueError: the modules are not a transformers model, pooling and a linear head without bias.
        FileNotFoundError: a file of a module is missing.
    """
    modules_file = _find(name_or_path, MODULES_FILE, source)
    if modules_file is None:
        return None
    modules = read_json(modules_file, list)
    for module in modules:
        if not isinstance(module, dict) or not isinstance(module.get("type"), str) or not is_inside(module.get("path")):
            raise ValueError(
                f"{str(modules_file)!r} must list modules with a type and a path in its folder, got {module}"
            )
    names = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if names == ["Transformer"]:
        return None
    if names != ["Transformer", "Pooling", "Dense"]:
        raise ValueError(
            f"{name_or_path!r} is a sentence-transformers model of the modules {', '.join(names)}: only Transformer, "
            "Pooling and Dense make a reranker of this package"
        )
    pooling, dense = (
        read_json(_require(name_or_path, f"{module['path']}/config.json", source)) for module in modules[1:]
    )
    known = {mode: name for name, mode in POOLING_MODES.items()}
    mode = pooling.get("pooling_mode")
    is_identity = str(dense.get("activation_function", "Tanh")).endswith("Identity")
    if mode not in known or not is_identity or dense.get("bias", True) or dense.get("use_residual"):
        raise ValueError(
            f"{name_or_path!r}: pooling must be one of {', '.join(known)}, and the Dense head linear without bias, got "
            f"{mode!r} and {dense}"
        )
    file = _require(name_or_path, f"{modules[2]['path']}/model.safetensors", source)
    check_weight_file(os.fspath(file))
    weight = load_file(file).get("linear.weight")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        held = None if weight is None else f"{weight.dtype} of shape {list(weight.shape)}"
        raise ValueError(
            f"{os.fspath(file)!r} must hold linear.weight as a matrix of floating-point numbers, got {held}"
        )
    return known[mode], weight


def _find(name_or_path: str, file: str, source: Mapping[str, Any]) -> Path | None:
    found = find_file(name_or_path, file, source)
    return None if found is None else Path(found)


def _require(name_or_path: str, file: str, source: Mapping[str, Any]) -> Path:
    found = _find(name_or_path, file, source)
    if found is None:
        raise FileNotFoundError(f"{name_or_path!r} has no {file}, which its {MODULES_FILE} calls for")
    return found

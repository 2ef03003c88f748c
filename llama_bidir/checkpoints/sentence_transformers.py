"""The layout of sentence-transformers, written and read: a Llama without its causal mask, pooling, and a head."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from .chat_template import make_chat_template, save_tokenizer
from .files import fold_temperature, llama_config, write_json

MODULES = "modules.json"
TRANSFORMER: dict[str, Any] = {
    "idx": 0,
    "name": "0",
    "path": "",
    "type": "sentence_transformers.base.modules.transformer.Transformer",
}
POOLING: dict[str, Any] = {
    "idx": 1,
    "name": "1",
    "path": "1_Pooling",
    "type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
}
DENSE: dict[str, Any] = {
    "idx": 2,
    "name": "2",
    "path": "2_Dense",
    "type": "sentence_transformers.base.modules.dense.Dense",
}
POOLING_MODES = {"avg": "mean", "cls": "cls", "last": "lasttoken"}


def read_head(name_or_path: str, source: Mapping[str, Any]) -> tuple[str, torch.Tensor] | None:
    """
    Reads what sentence-transformers keeps beside the Llama of a reranker.

    Args:
        name_or_path: a folder or the id of a Hub repository.
        source: arguments of the Hub.

    Returns:
        the pooling and the head's weight of shape `(num_labels, hidden_size)`, or None where the folder is not in that
        layout, or its Llama has the head itself.

    Raises:
        ValueError: the modules are others than a Llama, pooling and a linear head.
    """
    modules_file = _find(name_or_path, MODULES, source)
    if modules_file is None:
        return None
    modules = json.loads(modules_file.read_text(encoding="utf-8"))
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    if kinds == ["Transformer"]:
        return None
    if kinds != ["Transformer", "Pooling", "Dense"]:
        raise ValueError(
            f"{name_or_path!r} is a sentence-transformers model of the modules {', '.join(kinds)}: only Transformer, "
            "Pooling and Dense make a reranker of this package"
        )
    pooling = _read_json(name_or_path, f"{modules[1]['path']}/config.json", source)
    dense = _read_json(name_or_path, f"{modules[2]['path']}/config.json", source)
    mode = pooling.get("pooling_mode")
    known = {value: name for name, value in POOLING_MODES.items()}
    is_identity = str(dense.get("activation_function", "Tanh")).endswith("Identity")
    if mode not in known or dense.get("bias", True) or dense.get("use_residual") or not is_identity:
        raise ValueError(
            f"{name_or_path!r}: pooling must be one of {', '.join(known)}, and the Dense head linear without bias, got "
            f"{mode!r} and {dense}"
        )
    weights = _find(name_or_path, f"{modules[2]['path']}/model.safetensors", source)
    if weights is None:
        raise FileNotFoundError(f"{name_or_path!r} has no {modules[2]['path']}/model.safetensors, the head's weights")
    return known[mode], load_file(weights)["linear.weight"]


def _read_json(name_or_path: str, file: str, source: Mapping[str, Any]) -> dict[str, Any]:
    path = _find(name_or_path, file, source)
    if path is None:
        raise FileNotFoundError(f"{name_or_path!r} has no {file}, which its {MODULES} names")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _find(name_or_path: str, file: str, source: Mapping[str, Any]) -> Path | None:
    found = cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **source)
    return None if found is None else Path(found)


USE = """
```bash
pip install "sentence-transformers>=6.2"
```

```python
from sentence_transformers import CrossEncoder

reranker = CrossEncoder("{model_id}")
results = reranker.rank("how do bees find their way?", ["Honey bees navigate by the position of the sun.", "The hive."])
```

sentence-transformers computes head and scores in the dtype of the weights. Where they are half precision,
`model_kwargs={{"dtype": "float32"}}` keeps the digits.
"""


def write_sentence_transformers(reranker: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, model_id: str) -> str:
    """
    Writes a reranker in the layout of sentence-transformers. Scores are raw logits; the temperature is in the head.

    Args:
        reranker: a [`LlamaBidirectionalForSequenceClassification`].
        tokenizer: its tokenizer.
        folder: an empty folder.
        model_id: how the reranker will be found.

    Returns:
        what the model card says of its use.

    Raises:
        ValueError: the prompt cannot be written as a chat template.
    """
    config = reranker.config
    make_chat_template(tokenizer, config.prompt_template)  # there is no other way to the prompt
    reranker.model.save_pretrained(folder)
    fields = llama_config(config, architectures=["LlamaModel"])
    # Not read by sentence-transformers; for the way back.
    fields |= {"prompt_template": config.prompt_template, "rerank_max_length": config.rerank_max_length}
    LlamaConfig(**fields).save_pretrained(folder)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    save_tokenizer(tokenizer, folder, config)
    write_json(folder / MODULES, [TRANSFORMER, POOLING, DENSE])
    write_json(
        folder / POOLING["path"] / "config.json",
        {
            "embedding_dimension": config.hidden_size,
            "pooling_mode": POOLING_MODES[config.pooling],
            "include_prompt": True,
        },
    )
    head = folder / DENSE["path"]
    write_json(
        head / "config.json",
        {
            "in_features": config.hidden_size,
            "out_features": config.num_labels,
            "bias": False,
            "activation_function": "torch.nn.modules.linear.Identity",
            "module_input_name": "sentence_embedding",
            "module_output_name": "scores",
        },
    )
    save_file({"linear.weight": fold_temperature(reranker)}, head / "model.safetensors", metadata={"format": "pt"})
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": output, "message": {**output, "format": "flat"}},
            "module_output_name": "token_embeddings",
        },
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "CrossEncoder",
            "activation_fn": "torch.nn.modules.linear.Identity",
            "prompts": {},
            "default_prompt_name": None,
            "requirements": {"transformers": ">=5.2"},
        },
    )
    return USE.format(model_id=model_id)

"""What several layouts share: JSON files, and a reranker's body and head for tools that know only a plain Llama."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from ..configuration_llama_bidir import LlamaBidirectionalConfig
from ..modeling_llama_bidir import LlamaBidirectionalForSequenceClassification

# Fields that say how this checkpoint was made or loaded; each layout sets its own where it needs one.
NOT_COPIED = (
    "model_type", "auto_map", "architectures", "id2label", "label2id", "problem_type", "_name_or_path",
    "transformers_version",
)  # fmt: skip


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file. Its folder is made when missing."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def fold_temperature(reranker: LlamaBidirectionalForSequenceClassification) -> torch.Tensor:
    """Returns the head's weight divided by the temperature, in float32 because half precision would round it."""
    weight: torch.Tensor = reranker.score.weight.detach().float() / reranker.config.temperature
    return weight.contiguous()


def llama_config(config: LlamaBidirectionalConfig, **fields: Any) -> dict[str, Any]:
    """Returns the fields of a plain Llama with the reranker's sizes and its `is_causal`, updated with `fields`."""
    added = LlamaBidirectionalConfig.__dataclass_fields__.keys() - LlamaConfig.__dataclass_fields__.keys()
    left_out = (added - {"is_causal"}) | set(NOT_COPIED)
    return {**{name: value for name, value in config.to_dict().items() if name not in left_out}, **fields}

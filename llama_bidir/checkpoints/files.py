"""What the formats have in common."""

import json
from pathlib import Path
from typing import Any

import torch

from ..configuration_llama_bidir import LlamaBidirectionalConfig

# What LlamaConfig does not have, or what says how this checkpoint was loaded.
OWN_FIELDS = (
    "model_type", "pooling", "temperature", "prompt_template", "rerank_max_length", "sentence_transformers", "auto_map",
    "architectures", "id2label", "label2id", "problem_type", "_name_or_path", "transformers_version",
)  # fmt: skip


def fold_temperature(reranker: Any) -> torch.Tensor:
    """The weight of the head, divided by the temperature: in float32, as half precision would round it."""
    weight: torch.Tensor = reranker.score.weight.detach().float() / reranker.config.temperature
    return weight.contiguous()


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file; its folder is made when missing."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def llama_config(config: LlamaBidirectionalConfig, **fields: Any) -> dict[str, Any]:
    """The fields that a plain Llama has, and others."""
    own = config.to_dict()
    return {**{name: value for name, value in own.items() if name not in OWN_FIELDS}, **fields}

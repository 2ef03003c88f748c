"""What the formats have in common."""

import json
from pathlib import Path
from typing import Any

from ..configuration_llama_bidir import LlamaBidirectionalConfig

# What LlamaConfig does not have, or what says how this checkpoint was loaded.
OWN_FIELDS = (
    "model_type", "pooling", "temperature", "prompt_template", "rerank_max_length", "sentence_transformers", "auto_map",
    "architectures", "id2label", "label2id", "problem_type", "_name_or_path", "transformers_version",
)  # fmt: skip


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file; its folder is made when missing."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def llama_config(config: LlamaBidirectionalConfig, **fields: Any) -> dict[str, Any]:
    """The fields that a plain Llama has, and others."""
    own = config.to_dict()
    return {**{name: value for name, value in own.items() if name not in OWN_FIELDS}, **fields}

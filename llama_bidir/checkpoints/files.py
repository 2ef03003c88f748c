"""Shared by several layouts: JSON files, the files of a checkpoint, and the parts of a reranker for a plain Llama."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.dynamic_module_utils import get_relative_import_files

from ..configuration_llama_bidir import LlamaBidirectionalConfig
from ..modeling_llama_bidir import LlamaBidirectionalForSequenceClassification

# Fields that say how this checkpoint was made or loaded; each layout sets its own where it needs one.
NOT_COPIED = (
    "model_type", "auto_map", "architectures", "id2label", "label2id", "problem_type", "_name_or_path",
    "transformers_version",
)  # fmt: skip

# The files of a checkpoint in any layout, as transformers, PEFT, sentence-transformers and this package write them. A
# new checkpoint in their folder replaces them all. Otherwise a loader would mix old files with new ones.
CHECKPOINT_FILES = re.compile(
    r"(adapter_model|model|pytorch_model)([.-][\w.-]+)?\.(safetensors|bin|onnx)(\.index(\.\w+)?\.json|[._]data)?"
    r"|model_\w+\.onnx([._]data)?"
    r"|openvino_model\w*\.(xml|bin)"
    r"|tf_model\.h5|flax_model\.msgpack|training_args\.bin"
    r"|(adapter_|generation_|quantize_|quantization_|\w*processor_)?config\.json"
    r"|tokenizer(\.[\w.]+|_config)?\.json|tokenizer\.model(\.\w+)?|(added_tokens|special_tokens_map|chat_template)\.json"
    r"|vocab\.(json|txt)|merges\.txt|spiece\.model|sentencepiece\.bpe\.model|tekken\.json|\w+\.tiktoken"
    r"|(chat|vllm)_template\.jinja"
    r"|modules\.json|sentence_bert_config\.json|config_sentence_transformers\.json"
)
# Folders of a checkpoint, besides those of the modules of sentence-transformers.
CHECKPOINT_FOLDERS = re.compile(r"onnx|openvino|\d+_[A-Z]\w*")


def replaced_by_checkpoint(directory: str | os.PathLike[str]) -> Callable[[PurePath], bool]:
    """
    Returns the rule that decides which files of a folder a new checkpoint replaces: those of the old checkpoint.

    Other files stay, such as notes, a model card, scripts, and the `checkpoint-N` folders of a training run. Code files
    are removed only if the `auto_map` of a configuration in the folder names them, together with the files they import.
    """
    code = _code_files(Path(directory))

    def is_replaced(path: PurePath) -> bool:
        if len(path.parts) == 1:
            return path.name in code or CHECKPOINT_FILES.fullmatch(path.name) is not None
        if len(path.parts) > 2:
            return False
        is_file = path.suffix == ".jinja" if path.parts[0] == "additional_chat_templates" else False
        is_part = CHECKPOINT_FOLDERS.fullmatch(path.parts[0]) and CHECKPOINT_FILES.fullmatch(path.name)
        return is_file or is_part is not None

    return is_replaced


def _code_files(folder: Path) -> set[str]:
    """Returns the code files that a checkpoint's configurations name in their `auto_map`."""
    names: set[str] = set()
    for file in ("config.json", "tokenizer_config.json", "adapter_config.json"):
        try:
            auto_map = json.loads((folder / file).read_text(encoding="utf-8")).get("auto_map")
            classes = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
            for each in classes:
                parts = each if isinstance(each, (list, tuple)) else [each]
                names |= {f"{part.split('.')[0]}.py" for part in parts if isinstance(part, str) and "--" not in part}
        except (OSError, ValueError, AttributeError, RecursionError):  # the file is missing or is not a configuration
            continue
    for name in [*names]:
        try:
            names |= {os.path.basename(file) for file in get_relative_import_files(folder / name)}
        except (OSError, ValueError):  # missing, or not text
            continue
    return names


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

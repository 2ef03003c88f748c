"""Checks adapter folders (PEFT) before PEFT reads them, and completes saved ones so that they load anywhere."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils.peft_utils import find_adapter_config_file

from ..files_llama_bidir import ADAPTER_STEMS, check_weight_files, find_file, read_json
from ..pretrained_llama_bidir import find_base, missing_weights
from ..utils.extras import require
from .files import write_json

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE, PICKLED_FILE = "adapter_model.safetensors", "adapter_model.bin"


def check_adapter(name_or_path: str, source: Mapping[str, Any], *, use_safetensors: bool | None = None) -> str:
    """
    Checks the configuration and the weights of an adapter, and returns the path or the Hub id of its base model.

    Args:
        name_or_path: the folder or the Hub id of the adapter.
        source: arguments for the Hub, such as `revision`.
        use_safetensors: False allows pickled weights, for torch's safe loader.

    Raises:
        ValueError: a file is damaged, the adapter imports a module or is its own base, or the weights are a pickle
            and `use_safetensors` is not False. The message names the file.
        FileNotFoundError: the adapter has no weights, names no base model, or names a folder that does not exist.
    """
    file = str(find_adapter_config_file(name_or_path, **source))
    fields = read_json(file)
    known = require("peft", "train").PeftType.__members__
    if fields.get("peft_type") not in known:
        raise ValueError(f"{file!r}: peft_type must be one of {', '.join(known)}, got {fields.get('peft_type')!r}")
    base = fields.get("base_model_name_or_path") or ""
    if os.path.isdir(name_or_path) and os.path.realpath(str(base)) == os.path.realpath(name_or_path):
        raise ValueError(f"{file!r}: base_model_name_or_path names the adapter itself: name the base model instead")
    if fields.get("megatron_config") is not None:
        raise ValueError(f"{file!r}: megatron_config imports the module megatron_core, which is refused: remove it")
    base = find_base(name_or_path, base)
    check_weight_files(name_or_path, source, use_safetensors=use_safetensors, stems=ADAPTER_STEMS)
    if all(find_file(name_or_path, name, source) is None for name in (WEIGHTS_FILE, PICKLED_FILE)):
        raise FileNotFoundError(f"the adapter {name_or_path!r} has no {WEIGHTS_FILE}")
    return base


@contextmanager
def named_errors(name_or_path: str) -> Iterator[None]:
    """Turns an error of PEFT about a wrong field, such as AttributeError, into a ValueError that names the adapter."""
    try:
        yield
    except (
        AssertionError,
        AttributeError,
        IndexError,
        NotImplementedError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the adapter {name_or_path!r} cannot be used: {type(error).__name__}: {reason}; correct {CONFIG_FILE}"
        ) from None


def absolute_base(base: Any) -> Any:
    """Returns the absolute path of an adapter's base model if it is a folder. Returns a Hub id or None unchanged."""
    return os.path.abspath(base) if isinstance(base, str) and os.path.isdir(base) else base


def complete_adapter(model: Any, folder: Path) -> None:
    """
    Completes the folder of an adapter that PEFT has just saved; does nothing for a whole model.

    The files of the active adapter move to the top of the folder, where loaders look for them. If the base model is a
    folder, the adapter names its absolute path. PEFT's model card is removed, because it does not describe a reranker.
    """
    if not getattr(model, "peft_config", None):
        return
    (folder / "README.md").unlink(missing_ok=True)
    name = getattr(model, "active_adapter", "default")
    if not (folder / CONFIG_FILE).exists() and isinstance(name, str) and (folder / name).is_dir():
        for path in [*(folder / name).iterdir()]:
            path.replace(folder / path.name)
        (folder / name).rmdir()
    for path in folder.rglob(CONFIG_FILE):
        fields = json.loads(path.read_text(encoding="utf-8"))
        base = absolute_base(fields.get("base_model_name_or_path"))
        if not base:
            logger.warning(
                "the adapter is saved without the name of its base model, because the base model was made in memory: "
                "save it and write its path into base_model_name_or_path in adapter_config.json"
            )
        write_json(path, {**fields, "base_model_name_or_path": base})


def read_names(name_or_path: str, source: Mapping[str, Any]) -> set[str]:
    """Returns the names of the weights that an adapter holds. They have passed [`check_adapter`]."""
    if (file := find_file(name_or_path, WEIGHTS_FILE, source)) is not None:
        with safe_open(file, "pt") as weights:
            return set(weights.keys())
    pickled = str(find_file(name_or_path, PICKLED_FILE, source))
    return set(torch.load(pickled, map_location="meta", weights_only=True))


def check_weights(name_or_path: str, adapted: Any, names: set[str], *, base_vocab_size: int) -> None:
    """
    Checks that an adapter holds all weights that it trains, and the embeddings of the tokens that its base lacks.

    Args:
        name_or_path: the adapter, for the message.
        adapted: the `PeftModel` into which it was loaded.
        names: the names of the weights of the adapter.
        base_vocab_size: number of tokens of the base model as stored.

    Raises:
        ValueError: a weight is missing, so it would be random.
    """
    trained = adapted.config.vocab_size
    if trained != base_vocab_size and not any("embed_tokens" in name for name in names):
        raise ValueError(
            f"{name_or_path!r} is an adapter for a vocabulary of {trained} tokens, but its base model has "
            f"{base_vocab_size}, and the adapter holds no embeddings: save it again with save_embedding_layers=True"
        )
    expected = require("peft", "train").get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if missing := sorted(expected.keys() - names):
        raise missing_weights(name_or_path, missing)

"""Adapters (PEFT) on disk: what is added to one that PEFT has saved, so that its folder loads anywhere."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..utils.extras import require
from .files import write_json

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def absolute_base(base: Any) -> Any:
    """Returns the base model of an adapter as an absolute path if it is a folder, else as it is (a Hub id or None)."""
    return os.path.abspath(base) if isinstance(base, str) and os.path.isdir(base) else base


def complete_adapter(model: Any, folder: Path) -> None:
    """
    Completes the folder of an adapter that PEFT has just saved; does nothing for a whole model.

    The adapter in use moves to the top, where loaders look for it. A base model that is a folder is named by its
    absolute path. PEFT's model card, which describes no reranker, is removed.
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
                "the adapter is saved without the name of its base model, because that was made in memory: save the "
                "base model and write its path into base_model_name_or_path in adapter_config.json"
            )
        write_json(path, {**fields, "base_model_name_or_path": base})


def read_names(path: str | os.PathLike[str] | None) -> set[str] | None:
    """Returns the names of the weights in a safetensors file, or None for no such file."""
    if path is None:
        return None
    with safe_open(path, "pt") as weights:
        return set(weights.keys())


def check_weights(name_or_path: str, adapted: Any, names: set[str] | None, *, base_vocab_size: int) -> None:
    """
    Checks that an adapter holds all weights that it trains, and the embeddings of tokens that its base does not have.

    Args:
        name_or_path: the adapter, for the message.
        adapted: the `PeftModel` into which it was loaded.
        names: of its weights; None if they are unknown.
        base_vocab_size: tokens of the base model as it is stored.

    Raises:
        ValueError: a weight is missing, so it would be random.
    """
    if names is None:
        return
    trained = adapted.config.vocab_size
    if trained != base_vocab_size and not any("embed_tokens" in name for name in names):
        raise ValueError(
            f"{name_or_path!r} is an adapter for a vocabulary of {trained} tokens, but its base model has "
            f"{base_vocab_size}, and the adapter holds no embeddings: save it again with save_embedding_layers=True"
        )
    expected = require("peft", "train").get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if missing := sorted(expected.keys() - names):
        raise missing_weight(name_or_path, missing[0])


def missing_weight(name_or_path: str, weight: str) -> ValueError:
    """The error for a weight that an adapter does not hold."""
    return ValueError(
        f"{name_or_path!r} is an adapter without {weight!r}, which its {CONFIG_FILE} calls for: save it again"
    )

"""The files of an adapter (PEFT), checked before PEFT reads them."""

import os
from collections.abc import Mapping
from typing import Any

from transformers.utils.peft_utils import find_adapter_config_file

from ..configuration_llama_bidir import find_file, read_json
from ..modeling_llama_bidir import check_weight_file
from ..utils.extras import require

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"


def check_adapter(name_or_path: str, source: Mapping[str, Any], *, use_safetensors: bool | None = None) -> None:
    """
    Checks the configuration and the weights of an adapter.

    Args:
        name_or_path: the folder or the Hub id of the adapter.
        source: arguments of the Hub, such as `revision`.
        use_safetensors: False allows pickled weights, for torch's safe loader.

    Raises:
        ValueError: a file is damaged, the adapter names no base model or imports a module, or its weights are a pickle
            and `use_safetensors` is not False. The message names the file.
        FileNotFoundError: the adapter has no weights.
    """
    file = str(find_adapter_config_file(name_or_path, **source))
    fields = read_json(file)
    known = require("peft", "train").PeftType.__members__
    if fields.get("peft_type") not in known:
        raise ValueError(f"{file!r}: peft_type must be one of {', '.join(known)}, got {fields.get('peft_type')!r}")
    base = fields.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{file!r}: base_model_name_or_path must name the adapter's base model, got {base!r}")
    if os.path.isdir(name_or_path) and os.path.realpath(base) == os.path.realpath(name_or_path):
        raise ValueError(f"{file!r}: base_model_name_or_path names the adapter itself: write the base model there")
    if fields.get("megatron_config") is not None:
        raise ValueError(f"{file!r}: megatron_config imports the module megatron_core, which is refused: remove it")
    if (weights := find_file(name_or_path, WEIGHTS, source)) is not None:
        check_weight_file(weights)
        return
    pickled = find_file(name_or_path, PICKLED, source)
    if pickled is None:
        raise FileNotFoundError(f"the adapter {name_or_path!r} has no {WEIGHTS}")
    if use_safetensors is not False:
        raise ValueError(
            f"{name_or_path!r} holds its weights as a pickle ({PICKLED}), a format that can run code: pass "
            "model_kwargs={'use_safetensors': False} to read it with torch's safe loader, and save it as safetensors"
        )
    check_weight_file(pickled)

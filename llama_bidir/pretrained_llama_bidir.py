# Copyright 2026 The llama-bidir authors. Licensed under the Apache License, Version 2.0.
"""Loads and saves bidirectional Llamas: checks of a checkpoint, GGUF files, and adapters on a base model."""

import copy
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import LlamaModel, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.utils.import_utils import is_peft_available

from .configuration_llama_bidir import LlamaBidirectionalConfig, check_stock_head, is_stock
from .files_llama_bidir import (
    ADAPTER_STEMS,
    HUB_ARGUMENTS,
    INTERRUPTED_SAVE,
    check_checkpoint_path,
    check_weight_files,
    find_file,
    read_json,
    read_shards,
)
from .weights_llama_bidir import check_weights, find_weights, read_weights

logger = logging.getLogger(__name__)

# All files that a loader may read as the weights of a model, or as a head that replaces its own.
_WEIGHTS = re.compile(
    r"(adapter_model|model|pytorch_model)([.-][\w.-]+)?\.(safetensors|bin)(\.index(\.\w+)?\.json)?"
    r"|adapter_config\.json|modules\.json|model(_\w+)?\.onnx([._]data)?"
)


def _replace_weights(folder: Path, staged: Path) -> None:
    """Replaces the weights in a folder by saved files. The configuration is removed first and moved in last."""
    names = os.listdir(staged)
    if not names:  # another process does the saving
        return
    last = [name for name in ("config.json", "adapter_config.json") if name in names]
    mode = (staged / last[0]).stat().st_mode
    moving = folder / INTERRUPTED_SAVE
    shutil.rmtree(moving, ignore_errors=True)
    staged.rename(moving)
    for name in [*last, *(name for name in os.listdir(folder) if _WEIGHTS.fullmatch(name))]:
        (folder / name).unlink(missing_ok=True)
    for name in [*(name for name in names if name not in last), *last]:
        (moving / name).chmod(mode)  # safetensors writes files that only their owner can read
        (moving / name).replace(folder / name)
    moving.rmdir()


def _hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}


def _download_again(name: str, source: Mapping[str, Any]) -> None:
    """Fetches the configuration and the safetensors files of a Hub repository, even if they are cached."""
    find = partial(find_file, name, source=source)
    find("config.json")
    if find("model.safetensors") is None and (index := find("model.safetensors.index.json")) is not None:
        for shard in read_shards(index, ".safetensors"):
            find(shard)


def find_adapter(name: Any, source: Mapping[str, Any]) -> str | None:
    """
    Returns the folder of an adapter (PEFT), or None for a whole model.

    Args:
        name (`str` or `os.PathLike`): A folder, or the id of a Hub repository, which is downloaded.
        source (`dict`): Arguments for the Hub.
    """
    if name is None:
        return None
    find = partial(find_file, os.fspath(name), source=source)
    if (adapter := find("adapter_config.json")) is None:
        return None
    if any(find(file) is not None for file in ("model.safetensors", "model.safetensors.index.json")):
        return None
    for file in ("config.json", "adapter_model.safetensors"):
        find(file)
    return os.path.dirname(adapter)


def find_base(adapter: str | os.PathLike[str], base: Any) -> str:
    """
    Returns the path or the Hub id of an adapter's base model.

    If a relative path does not exist in the working folder, it is looked up in the folder of the adapter and in the
    folders above it, because it may be relative to the folder where training ran.

    Args:
        adapter (`str` or `os.PathLike`): The folder or the Hub id of the adapter.
        base (`str`): The value of `base_model_name_or_path` in its `adapter_config.json`.

    Raises:
        FileNotFoundError: The adapter names no base model, or a folder that does not exist.
    """
    where, fix = os.fspath(adapter), "write its path or Hub id into base_model_name_or_path in adapter_config.json"
    if not isinstance(base, str) or not base:
        raise FileNotFoundError(f"{where!r} is an adapter that does not name its base model: {fix}")
    if os.path.exists(base):
        return base
    if os.path.isdir(where) and not os.path.isabs(base):
        for folder in (Path(where).resolve(), *Path(where).resolve().parents):
            if (folder / base / "config.json").is_file():
                logger.warning(f"{where}: its base model {base!r} is taken from {folder / base}")
                return os.fspath(folder / base)
    try:
        check_checkpoint_path(base)
    except OSError:
        raise FileNotFoundError(
            f"{where!r} is an adapter, and the folder {base!r} of its base model does not exist here: {fix}"
        ) from None
    return base


def missing_weights(adapter: str | os.PathLike[str], names: Sequence[str]) -> ValueError:
    """Returns the error for weights that an adapter lacks, although its configuration requires them."""
    shown = f"{', '.join(names[:3])}{' and others' if names[3:] else ''}"
    return ValueError(
        f"the adapter {os.fspath(adapter)!r} lacks weights, which would be random: {shown}. Save it again"
    )


def _check_missing(info: dict[str, Any], source: Any) -> None:
    """Raises ValueError if weights other than the score head's are missing or were replaced by random ones."""
    replaced = {key[0] for key in info["mismatched_keys"]} - {"score.weight"}
    if missing := sorted({*info["missing_keys"], *replaced}):
        raise ValueError(
            f"{source or 'the state_dict'} lacks {', '.join(missing[:3])}{' and others' if missing[3:] else ''}, or "
            "holds other shapes. These weights would be random, but only score.weight may be new: pass a complete "
            "checkpoint"
        )


class LlamaBidirectionalPreTrainedModel(LlamaPreTrainedModel):
    """
    Loads `llama` and `llama_bidirec` checkpoints, GGUF files and adapters under a [`LlamaBidirectionalConfig`], and
    refuses a checkpoint that does not fit its configuration.
    """

    config: LlamaBidirectionalConfig
    config_class = LlamaBidirectionalConfig
    _has_score_head = False
    _score_is_new = False
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: LlamaBidirectionalConfig):
        if not hasattr(config, "pooling"):
            raise TypeError(
                f"{type(self).__name__} needs a LlamaBidirectionalConfig, got {type(config).__name__}: build one with "
                "LlamaBidirectionalConfig.from_pretrained(checkpoint)"
            )
        super().__init__(config)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        gguf_file: str | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        r"""
        Loads a checkpoint, as [`PreTrainedModel.from_pretrained`] does.

        Raises:
            OSError: There is no such checkpoint.
            ValueError: A file of the checkpoint is damaged or could run code. A weight other than `score.weight` is
                missing or does not fit the configuration. A plain Llama has a trained head, and neither `is_causal` nor
                `pooling` says how to use it.
        """
        name = pretrained_model_name_or_path
        if kwargs.get("weights_only") is False:
            raise ValueError("weights_only=False could run code from the weights file: leave it out")
        if name is not None:
            check_checkpoint_path(name)
        if gguf_file is not None:
            model, info = cls._from_gguf(name, *model_args, gguf_file=gguf_file, **kwargs)
        elif (adapter := find_adapter(name, _hub_arguments(kwargs))) is not None:
            model = cls._from_adapter(adapter, *model_args, **kwargs)
            info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        else:
            if name is not None:
                is_usual = kwargs.get("variant") is None and kwargs.get("use_safetensors") is not False
                if is_usual and kwargs.get("force_download"):
                    _download_again(os.fspath(name), _hub_arguments(kwargs))
                    kwargs["force_download"] = False  # else each check and the load would fetch the weights again
                cls._check_checkpoint(os.fspath(name), **kwargs)
                kwargs["use_safetensors"] = kwargs.get("use_safetensors") is not False
            try:
                loaded: Any = super().from_pretrained(name, *model_args, output_loading_info=True, **kwargs)
            except SafetensorError as error:
                raise ValueError(f"{name}: the weights are not whole: {error}") from error
            model, info = loaded
            _check_missing(info, name)
        return (model, info) if output_loading_info else model

    @classmethod
    def _check_checkpoint(cls, name: str, *, config: Any = None, **kwargs: Any) -> None:
        """Checks the files of a checkpoint before a module is created, because a wrong size could take all memory."""
        hub = _hub_arguments(kwargs)
        config_file = find_file(name, "config.json", hub)
        stored = {} if config_file is None else read_json(config_file)
        is_given = isinstance(config, PreTrainedConfig)
        if not is_given:
            fields = {*LlamaBidirectionalConfig.__dataclass_fields__, "num_labels"} - {"dtype"}
            given = {key: kwargs[key] for key in (*fields, "attn_implementation") if key in kwargs}
            config = LlamaBidirectionalConfig.from_pretrained(name if config is None else config, **hub, **given)
        if kwargs.get("state_dict") is not None:
            return
        check_weight_files(name, hub, use_safetensors=kwargs.get("use_safetensors"), variant=kwargs.get("variant"))
        if kwargs.get("key_mapping") or kwargs.get("variant") or kwargs.get("use_safetensors") is False:
            return
        if not (files := find_weights(name, **hub)):
            return
        weights = read_weights(files)
        if not is_given:
            has_score = "score.weight" in weights
            check_stock_head(stored, kwargs, repr(name), has_score=has_score)
            has_score &= cls._has_score_head
            if has_score and is_stock(stored) and "is_causal" not in kwargs and kwargs["pooling"] != "last":
                logger.warning(
                    f"score.weight of {name} was trained under a causal mask: with pooling={config.pooling!r} and "
                    "without that mask, it needs training before its scores mean anything. Pass is_causal too, to say "
                    "which mask you want"
                )
        check_weights(
            config,
            weights,
            has_head=cls._has_score_head,
            is_quantized=stored.get("quantization_config") is not None,
            # With an Auto class, the configuration has already been changed before this point.
            drops_layers="num_hidden_layers" in kwargs or config.num_hidden_layers != stored.get("num_hidden_layers"),
            replaces_head=bool(kwargs.get("ignore_mismatched_sizes")),
        )

    @classmethod
    def _from_gguf(cls, pretrained_model_name_or_path: Any, *model_args: Any, gguf_file: str, **kwargs: Any) -> Any:
        # transformers maps the names of GGUF tensors by `config.model_type`, and GGUF only knows "llama". So a plain
        # Llama reads the file and passes its weights on.
        source = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        loaded: Any = LlamaModel.from_pretrained(
            pretrained_model_name_or_path,
            gguf_file=gguf_file,
            dtype=kwargs.get("dtype", "auto"),
            output_loading_info=True,
            **source,
        )
        llama, info = loaded
        _check_missing(info, gguf_file)
        if kwargs.get("dtype") == "auto":
            kwargs["dtype"] = llama.dtype
        if not isinstance(config := kwargs.pop("config", None), LlamaBidirectionalConfig):
            config, kwargs = LlamaBidirectionalConfig.from_pretrained(
                pretrained_model_name_or_path, gguf_file=gguf_file, return_unused_kwargs=True, **source, **kwargs
            )
            kwargs.pop("gguf_file", None)
        loaded = super().from_pretrained(
            None, *model_args, config=config, state_dict=llama.state_dict(), output_loading_info=True, **kwargs
        )
        model, info = loaded
        model.config.name_or_path = model.name_or_path = str(pretrained_model_name_or_path)
        return model, info

    @classmethod
    def _from_adapter(cls, folder: str | os.PathLike[str], *model_args: Any, **kwargs: Any) -> Any:
        # transformers reads the config.json beside an adapter as that of a complete model.
        if not is_peft_available():
            raise ImportError(f'{os.fspath(folder)!r} is an adapter: pip install "llama-bidir[train]"')
        for name in ("adapter_kwargs", "revision", "subfolder"):  # they locate the adapter, which is in `folder`
            kwargs.pop(name, None)
        adapter = read_json(Path(folder, "adapter_config.json"))
        check_weight_files(os.fspath(folder), {}, use_safetensors=kwargs.get("use_safetensors"), stems=ADAPTER_STEMS)
        if Path(folder, "config.json").is_file() and not isinstance(kwargs.get("config"), LlamaBidirectionalConfig):
            config, kwargs = LlamaBidirectionalConfig.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
            kwargs["config"] = config
        base = find_base(folder, adapter.get("base_model_name_or_path"))
        if adapter.get("revision") is not None:
            kwargs["revision"] = adapter["revision"]
        follows = {"head_follows": True} if cls._has_score_head else {}
        model = cls.load_base(base, *model_args, adapter=folder, **follows, **kwargs)
        if follows:
            model.score.float()  # a base model in half precision would round the saved head
        pickled = Path(folder, f"{ADAPTER_STEMS[1]}.bin")  # which transformers does not look for in a folder
        is_pickled = kwargs.get("use_safetensors") is False and pickled.is_file()
        weights = torch.load(pickled, map_location="cpu", weights_only=True) if is_pickled else None
        loaded = model.load_adapter(os.fspath(folder), adapter_state_dict=weights)
        if loaded is None:  # transformers 5.6, which reports no missing weights and leaves the head random
            held = weights or load_file(Path(folder, f"{ADAPTER_STEMS[0]}.safetensors"))
            held = {name.removeprefix("base_model.model."): weight for name, weight in held.items()}
            missing = sorted(model.get_adapter_state_dict().keys() - held.keys())
            if follows and "score.weight" in held:
                for head in getattr(model.score, "modules_to_save", {}).values():
                    head.weight.data = held["score.weight"].to(head.weight.device, head.weight.dtype)
        else:
            missing = sorted(loaded.missing_keys)
        if missing:
            raise missing_weights(folder, missing)
        model._score_is_new &= not any("score.modules_to_save" in name for name, _ in model.named_parameters())
        return model.eval()

    @classmethod
    def load_base(cls, base: str, *args: Any, adapter: str | os.PathLike[str], **kwargs: Any) -> Any:
        """
        Loads the base model of an adapter, with the vocabulary size of the adapter's configuration.

        Args:
            base (`str`): The folder or the Hub id of the base model.
            adapter (`str` or `os.PathLike`): The folder or the Hub id of the adapter, for messages.
            kwargs: Arguments of `from_pretrained`. `config` is the configuration of the adapter, if it has one.

        Raises:
            OSError: The base model cannot be loaded. The message names it and the adapter.
        """
        config = kwargs.get("config")
        source = _hub_arguments(kwargs)
        try:
            if kwargs.get("use_safetensors") is False and find_weights(base, **source):
                del kwargs["use_safetensors"]  # the caller may mean the adapter, whose weights alone are a pickle
            config_file = find_file(base, "config.json", source)
            vocab_size = None if config_file is None else read_json(config_file).get("vocab_size")
            if config is None or vocab_size in (None, config.vocab_size):
                return cls.from_pretrained(base, *args, **kwargs)
            first = copy.deepcopy(config)
            first.vocab_size, first.pad_token_id = vocab_size, None  # the pad token may be one of the added tokens
            model = cls.from_pretrained(base, *args, **{**kwargs, "config": first})
        except OSError as error:
            raise type(error)(
                f"{os.fspath(adapter)!r} is an adapter, and its base model {base!r} cannot be loaded: {error}"
            ) from error
        model.resize_token_embeddings(config.vocab_size, mean_resizing=False)
        model.config.pad_token_id = config.pad_token_id
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """
        Saves as [`PreTrainedModel.save_pretrained`] does, and replaces weights of any kind in the folder.

        The files are written into a subfolder first, and `config.json` is moved last. Permissions follow the umask.
        """
        if kwargs.get("distributed_checkpoint") or os.path.isfile(save_directory):
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        os.makedirs(save_directory, exist_ok=True)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=save_directory) as workspace:
            staged = Path(workspace, "new")
            super().save_pretrained(staged, *args, **kwargs)
            _replace_weights(Path(save_directory), staged)


__all__ = ["LlamaBidirectionalPreTrainedModel"]

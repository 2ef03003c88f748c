"""Loads the tokenizer of a checkpoint from its files, without running any code from the checkpoint."""

import logging
import os
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..files_llama_bidir import HUB_ARGUMENTS, check_is_downloaded, find_file, read_json
from ..utils.tokenization import is_sampling, stop_sampling
from .source import check_source, naming_the_repository

logger = logging.getLogger(__name__)

# The files that a tokenizer can be loaded from; one of them is enough.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
SETTINGS = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(name_or_path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedTokenizerBase:
    """
    Loads the tokenizer of a checkpoint. Code from the checkpoint does not run: `tokenizer.json` is read directly.

    Args:
        name_or_path: a folder or the id of a Hub repository.
        kwargs: arguments of `from_pretrained`, including those for the Hub. `trust_remote_code` is ignored.

    Raises:
        OSError: there is no tokenizer.
        ValueError: a file is damaged, or the tokenizer cannot be read without its own code. The message names it.
        ImportError: the tokenizer needs a package that is not installed.
    """
    name = os.fspath(name_or_path)
    source = check_source(name, {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs})
    kwargs |= source
    if kwargs.pop("trust_remote_code", None):
        logger.warning(
            "trust_remote_code is ignored, because code from a checkpoint never runs. Load the tokenizer yourself and "
            "pass it as tokenizer="
        )
    with naming_the_repository(name):
        if "gguf_file" not in kwargs and all(find_file(name, file, source) is None for file in VOCABULARIES):
            raise FileNotFoundError(
                f"{name!r} holds no tokenizer (tokenizer.json or tokenizer.model): pass one, such as "
                "CrossEncoder(..., tokenizer=AutoTokenizer.from_pretrained(base_model)), or save it there"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **kwargs)
            tokenizer("a: \u4e2d")  # a wrong class or setting fails here and not at the first pair
            return _without_sampling(tokenizer, name)
        except ImportError:
            raise
        except Exception as error:
            _check_files(name, source)
            if (code := _code_of(name, source)) is not None and "gguf_file" not in kwargs:
                return _load_without_code(name, code, source, kwargs)
            why = " ".join(str(error).split())
            files = [file for file in (*VOCABULARIES, *SETTINGS[1:]) if find_file(name, file, source) is not None]
            raise ValueError(
                f"the tokenizer of {name!r} cannot be read: {type(error).__name__}: {why}. Correct {' or '.join(files)}"
            ) from error


def _without_sampling(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """Switches off random tokenization, so that a text gets the same ids at each call. Returns the tokenizer."""
    if tokenizer.is_fast and is_sampling(tokenizer):
        logger.warning(f"the tokenizer of {name} draws tokens at random (dropout): this is switched off")
        stop_sampling(tokenizer)
    return tokenizer


def _check_files(name: str, source: dict[str, Any]) -> None:
    """Raises ValueError for a file of a tokenizer that is a git-lfs pointer or not a JSON object."""
    for file in (*SETTINGS, *VOCABULARIES):
        if (path := find_file(name, file, source)) is not None:
            check_is_downloaded(path)
            if file.endswith(".json"):
                read_json(path)


def _code_of(name: str, source: dict[str, Any]) -> Any:
    """Returns the `auto_map` of a tokenizer, which names its code, or None."""
    path = find_file(name, "tokenizer_config.json", source)
    return None if path is None else read_json(path).get("auto_map")


def _load_without_code(name: str, code: Any, source: dict[str, Any], kwargs: dict[str, Any]) -> PreTrainedTokenizerBase:
    if find_file(name, "tokenizer.json", source) is None:
        raise ValueError(
            f"the tokenizer of {name!r} consists of code (auto_map {code!r}), which is not run, and there is no "
            "tokenizer.json: load the tokenizer yourself and pass it as tokenizer="
        )
    logger.warning(f"{name}: the code of the tokenizer (auto_map {code!r}) is not run; tokenizer.json is read directly")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(name, **kwargs)
    tokenizer.init_kwargs.pop("auto_map", None)  # otherwise it would name code that is not saved with the tokenizer
    return _without_sampling(tokenizer, name)

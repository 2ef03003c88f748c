"""From a checkpoint or an adapter to a folder for another tool."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..loading import cast_parameters, load_merged
from ..outputs import whole_folder
from ..prompts import ensure_pad_token
from .hub import write_hub
from .onnx import check_installed, quantize, write_onnx
from .sentence_transformers import write_sentence_transformers
from .vllm import write_vllm

Writer = Callable[[Any, PreTrainedTokenizerBase, Path, str], None]

FORMATS: dict[str, Writer] = {
    "sentence-transformers": write_sentence_transformers,
    "vllm": write_vllm,
    "onnx": write_onnx,
    "hub": write_hub,
}


def export_reranker(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str,
    dtype: str | None = None,
    int8: bool = False,
    overwrite: bool = False,
) -> None:
    """
    Writes a reranker as a folder that another tool loads with equal scores.

    Args:
        model: the folder or Hub id of a checkpoint, or of an adapter, which is merged into its base on the way.
        output: the folder to write, whole or not at all.
        format: `sentence-transformers`, `vllm`, `onnx` or `hub` (with the code that transformers needs to load it).
        dtype: of the weights; the checkpoint's when not given, and float32 for `onnx` and for an adapter.
        int8: for `onnx`, add a variant with int8 weights (see [`~onnx.quantize`]).
        overwrite: replace `output` when it exists.

    Raises:
        FileExistsError: there is something at `output`, and `overwrite` is not set or it is no checkpoint.
        ValueError: the format is not one of the four, or it cannot hold this reranker, with the reason.
        ImportError: the format needs a package that is missing.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "onnx" and dtype not in (None, "float32"):
        raise ValueError(f"the graph of onnx is float32: leave dtype out, got {dtype!r}")
    if int8 and format != "onnx":
        raise ValueError(f"int8 is for onnx, and not for {format}")
    if format == "onnx":
        check_installed()
    name = os.fspath(model)
    with whole_folder(output, overwrite=overwrite, keep=name, marker="config.json") as folder:
        reranker = load_merged(name, "float32" if format == "onnx" else "auto")
        if dtype is not None:
            cast_parameters(reranker, getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(name)
        ensure_pad_token(tokenizer, reranker.config.vocab_size)
        FORMATS[format](reranker, tokenizer, folder, os.fspath(output))
        if int8:
            quantize(folder)

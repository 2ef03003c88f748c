"""Exports: a checkpoint, or an adapter merged into its base model, written as a folder for another tool."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ..modeling_llama_bidir import LlamaBidirectionalForSequenceClassification
from ..utils.outputs import whole_folder
from . import hub, onnx, sentence_transformers, vllm
from .files import replaced_by_checkpoint
from .loading import cast_parameters, load_merged
from .model_card import has_other_card, read_card, read_measures, write_model_card


class Format(NamedTuple):
    """
    How a reranker is written for another tool.

    Attributes:
        write: writes a reranker (on the CPU, in float32 for ONNX) and its tokenizer into an empty folder, and may
            change both. It raises ValueError when the format cannot hold the reranker.
        use: how the model card explains the use of the folder (see [`write_model_card`]).
        library: the library that the Hub shows code for.
    """

    write: Callable[[LlamaBidirectionalForSequenceClassification, PreTrainedTokenizerBase, Path], None]
    use: str
    library: str = "transformers"


FORMATS = {
    "sentence-transformers": Format(sentence_transformers.write, sentence_transformers.USE, "sentence-transformers"),
    "vllm": Format(vllm.write, vllm.USE, "vllm"),
    "onnx": Format(onnx.write, onnx.USE),
    "hub": Format(hub.write, hub.USE),
}


def export_reranker(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str,
    revision: str | None = None,
    dtype: str | None = None,
    int8: bool = False,
    model_id: str | None = None,
    evaluation: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """
    Writes a reranker as a folder that another tool loads with equal scores.

    Args:
        model: the folder or Hub id of a checkpoint, or of an adapter, which is merged into its base model.
        output: the folder to write. It appears only when it is complete.
        format: `sentence-transformers`, `vllm`, `onnx` or `hub` (with the code that transformers needs to load it).
        revision: branch, tag or commit of a Hub repository.
        dtype: of the weights. Defaults to the checkpoint's, and to float32 for `onnx` and for an adapter.
        int8: for `onnx`, add a variant with int8 weights (see [`~onnx.quantize`]).
        model_id: the name that the code in the model card loads. Defaults to `output`.
        evaluation: a file from `llama-bidir evaluate --json` with the measures for the model card. Defaults to the
            measures in the reranker's own card.
        overwrite: replace the checkpoint in `output` when there is one. Other files in the folder stay.

    Raises:
        FileExistsError: `output` exists, and `overwrite` is not set or `output` is not a checkpoint.
        ValueError: the format is unknown or cannot hold this reranker, or the weights are quantized.
        ImportError: a package that the format needs is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "onnx" and dtype not in (None, "float32"):
        raise ValueError(f"an ONNX graph is written in float32: leave dtype out, got {dtype!r}")
    if int8 and format != "onnx":
        raise ValueError(f"int8 is an option of the format onnx, not of {format}")
    if evaluation is not None:
        read_measures(evaluation)  # raises before the work
    if format == "onnx":
        onnx.check_installed()
    name = os.fspath(model)
    with whole_folder(
        output, overwrite=overwrite, keep=name, marker="config.json", replaces=replaced_by_checkpoint(output)
    ) as folder:
        reranker, tokenizer = load_merged(name, "float32" if format == "onnx" else "auto", revision=revision)
        if dtype is not None:
            cast_parameters(reranker, getattr(torch, dtype))
        FORMATS[format].write(reranker, tokenizer, folder)
        if not has_other_card(output):
            write_model_card(
                folder,
                reranker.config,
                model_id or os.fspath(output),
                use=FORMATS[format].use,
                library=FORMATS[format].library,
                evaluation=evaluation,
                metadata=read_card(name, revision=revision),
            )
        if int8:
            onnx.quantize(folder)

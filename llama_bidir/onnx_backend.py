"""An exported reranker in onnxruntime."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.hub import cached_file

from .configuration_llama_bidir import LlamaBidirectionalConfig
from .extras import require

INPUTS = ("input_ids", "attention_mask")
MODEL_FILE = "model.onnx"


class OnnxReranker:
    """
    A reranker that `export --format onnx` wrote, called like the model that it was made from.

    Args:
        name_or_path: a folder or the id of a Hub repository.
        file_name: of the graph.
        source: arguments of the Hub.

    Raises:
        FileNotFoundError: there is no such graph.
        ImportError: onnxruntime is not installed.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(
        self,
        name_or_path: str | os.PathLike[str],
        file_name: str = MODEL_FILE,
        source: Mapping[str, Any] | None = None,
    ):
        runtime = require("onnxruntime", "onnx")
        self.config = LlamaBidirectionalConfig.from_pretrained(name_or_path, **(source or {}))
        found = [
            cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False, **(source or {}))
            for name in (file_name, f"{file_name}.data")  # the weights, which must be beside the graph
        ]
        if found[0] is None:
            raise FileNotFoundError(
                f"{os.fspath(name_or_path)!r} has no {file_name}: llama-bidir export --format onnx writes one"
            )
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = runtime.InferenceSession(
            Path(found[0]), sess_options=options, providers=["CPUExecutionProvider"]
        )

    def to(self, device: str | int | torch.device) -> None:
        """Raises ValueError for another device than the CPU."""
        if torch.device(device).type != "cpu":
            raise ValueError(f"backend 'onnx' computes on the CPU: leave device out, got {device!r}")

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        inputs = dict(zip(INPUTS, (input_ids.long().numpy(), attention_mask.long().numpy()), strict=True))
        return SequenceClassifierOutput(logits=torch.from_numpy(self._session.run(["logits"], inputs)[0]))

"""The implementations that run the exported ONNX graph on a CPU: onnxruntime and OpenVINO."""

from pathlib import Path
from typing import Any

import torch
from transformers import BatchEncoding

from llama_bidir.checkpoints.onnx import INPUTS, INT8_FILE, MODEL_FILE, OnnxReranker

from .models import export_once
from .peers import Scorer, batch_sizes, loop

# OpenVINO's names of the precisions that it computes in.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


def export_graphs(folder: str) -> str:
    """Exports a checkpoint as a float32 and an int8 graph, once, and returns the folder."""
    return export_once(folder, "onnx", int8=True)


def load_onnxruntime(folder: str, *, dtype: str, device: str, max_length: int) -> Scorer:
    """The exported graph in onnxruntime: `model.onnx` for float32, `model_int8.onnx` for int8."""
    file = MODEL_FILE if dtype == "float32" else INT8_FILE
    reranker = OnnxReranker(export_graphs(folder), file)

    def forward(batch: BatchEncoding) -> torch.Tensor:
        return reranker(**{name: batch[name] for name in INPUTS}).logits

    score = loop(forward, folder, max_length=max_length)
    return Scorer(None, score, f"{file}, padded, {{}} pairs by length", batch_sizes(device))


def load_openvino(folder: str, *, dtype: str, device: str, max_length: int) -> Scorer:
    """The exported float32 graph in OpenVINO, with a hint for the precision of the computation."""
    import openvino

    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[dtype],
        "PERFORMANCE_HINT": "LATENCY",  # one batch at a time, on all threads
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    graph = Path(export_graphs(folder), MODEL_FILE)
    model = openvino.Core().compile_model(graph, "CPU", settings)

    def forward(batch: BatchEncoding) -> torch.Tensor:
        return torch.from_numpy(model({name: batch[name].numpy() for name in INPUTS})[0])

    score = loop(forward, folder, max_length=max_length)
    setting = f"{MODEL_FILE}, precision hint {PRECISIONS[dtype]}, padded, {{}} pairs by length"
    return Scorer(None, score, setting, batch_sizes(device))

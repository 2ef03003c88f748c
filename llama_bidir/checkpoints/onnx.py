"""The ONNX layout: a graph of the whole reranker, written here and run here by onnxruntime."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.hub import cached_file

from ..configuration_llama_bidir import LlamaBidirectionalConfig
from ..scoring.packing import pad
from ..utils.extras import require
from .chat_template import save_tokenizer

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


# Of the largest score.
TOLERANCE = 1e-4
INT8_FILE = "model_int8.onnx"

USE = """
`model.onnx` is the whole reranker in float32: `input_ids` and `attention_mask` of shape (batch, length) in, `logits` of
shape (batch, labels) out. Pooling and temperature are inside; padding may be on either side.

```bash
pip install "llama-bidir[onnx]"
```

```python
from llama_bidir import CrossEncoder

reranker = CrossEncoder("{model_id}", backend="onnx")
results = reranker.rank("how do bees find their way?", ["Honey bees navigate by the position of the sun.", "The hive."])
```

`quantize(folder)` of `llama_bidir.checkpoints.onnx` adds `model_int8.onnx`, with int8 weights, which
`model_kwargs={{"file_name": "model_int8.onnx"}}` loads; measure what it does to your ranking first.
"""


class _Logits(torch.nn.Module):
    def __init__(self, reranker: Any):
        super().__init__()
        self.reranker = reranker

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.reranker(input_ids=input_ids, attention_mask=attention_mask).logits


def check_installed() -> None:
    """Raises ImportError where a package is missing that the export needs."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx")


def write_onnx(reranker: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, model_id: str) -> str:
    """
    Writes a reranker as an ONNX graph and checks it in onnxruntime. Weights are in a file beside it.

    Args:
        reranker: a [`LlamaBidirectionalForSequenceClassification`] in float32 on a CPU.
        tokenizer: its tokenizer.
        folder: an empty folder.
        model_id: how the reranker will be found.

    Returns:
        what the model card says of its use.

    Raises:
        RuntimeError: onnxruntime computes other scores from it.
    """
    reranker.set_attn_implementation("sdpa")
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    example = _example(reranker.config.vocab_size, "right")
    torch.onnx.export(
        _Logits(reranker).eval(),
        tuple(example[name] for name in INPUTS),
        os.fspath(folder / MODEL_FILE),
        input_names=list(INPUTS),
        output_names=["logits"],
        dynamic_shapes={name: {0: batch, 1: length} for name in INPUTS},
        dynamo=True,
        external_data=True,
        verbose=False,
    )
    reranker.config.save_pretrained(folder)
    save_tokenizer(tokenizer, folder, reranker.config)
    exported = OnnxReranker(folder)
    for side in ("right", "left"):
        inputs = _example(reranker.config.vocab_size, side)
        with torch.inference_mode():
            expected, scores = reranker(**inputs).logits, exported(**inputs).logits
        difference = float((scores - expected).abs().max())
        if not difference <= TOLERANCE * float(expected.abs().max()):
            raise RuntimeError(f"onnxruntime's scores differ by {difference} where padding is on the {side}")
    return USE.format(model_id=model_id)


def quantize(folder: str | os.PathLike[str]) -> Path:
    """
    Adds a variant with int8 weights, whose activations are quantized while it runs, to an exported folder.

    The down projections of the MLPs stay in float32: their input has a few values that are so large that one scale for
    all leaves nothing of the others.

    Returns:
        its file.
    """
    quantization = require("onnxruntime.quantization", "onnx")
    source, target = Path(folder, MODEL_FILE), Path(folder, INT8_FILE)
    config = LlamaBidirectionalConfig.from_pretrained(folder)
    graph = require("onnx", "onnx").load(source, load_external_data=False).graph
    shape = [config.intermediate_size, config.hidden_size]
    down = {weight.name for weight in graph.initializer if list(weight.dims) == shape}
    quantization.quantize_dynamic(
        source,
        target,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        nodes_to_exclude=[node.name for node in graph.node if down & set(node.input)],
        use_external_data_format=True,
    )
    return target


def _example(vocab_size: int, padding_side: str) -> dict[str, torch.Tensor]:
    """A padded batch of other shape than any of the model's own sizes."""
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in (13, 5, 9)]
    inputs = pad(sequences, torch.device("cpu"))
    return inputs if padding_side == "right" else {name: value.flip(1) for name, value in inputs.items()}

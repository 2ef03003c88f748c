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
from ..files_llama_bidir import check_is_downloaded
from ..modeling_llama_bidir import LlamaBidirectionalForSequenceClassification
from ..scoring.packing import pad
from ..utils.extras import require
from .chat_template import save_tokenizer

INPUTS = ("input_ids", "attention_mask")
MODEL_FILE = "model.onnx"
INT8_FILE = "model_int8.onnx"
# Largest difference between the graph's scores and the model's, relative to the largest score.
TOLERANCE = 1e-4

USE = """
`model.onnx` is the whole reranker in float32, pooling and temperature included. Its inputs are `input_ids` and
`attention_mask` of shape (batch, length), padded on either side. Its output is `logits` of shape (batch, labels), and
`probability` of the same shape if the reranker is calibrated.

```bash
pip install "llama-bidir[onnx]"
```

```python
from llama_bidir import CrossEncoder

reranker = CrossEncoder({model_id}, backend="onnx")
results = reranker.rank("how do bees find their way?", ["Honey bees navigate by the position of the sun.", "The hive."])
```

`llama_bidir.checkpoints.onnx.quantize(folder)` adds `model_int8.onnx`, a variant with int8 weights. Load it with
`model_kwargs={{"file_name": "model_int8.onnx"}}`, and measure how it changes your ranking before you use it.
"""


def check_installed() -> None:
    """Raises ImportError when a package that an export needs is not installed."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "onnx")


def write(
    reranker: LlamaBidirectionalForSequenceClassification, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """
    Writes a float32 reranker as a graph, with the weights in a file beside it, and checks its scores in onnxruntime. A
    calibrated reranker also gives the probabilities of relevance.

    Raises:
        RuntimeError: onnxruntime computes different scores.
    """
    reranker.set_attn_implementation("sdpa")
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    example = _example(reranker.config.vocab_size, "right")
    torch.onnx.export(
        _Outputs(reranker).eval(),
        tuple(example[name] for name in INPUTS),
        os.fspath(folder / MODEL_FILE),
        input_names=list(INPUTS),
        output_names=["logits"] if reranker.config.calibration is None else ["logits", "probability"],
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
            raise RuntimeError(f"onnxruntime's scores differ by {difference} for input that is padded on the {side}")


def quantize(folder: str | os.PathLike[str]) -> Path:
    """
    Adds a variant with int8 weights to an exported folder. Its activations are quantized as it runs.

    The down projections of the MLPs stay in float32. Their input has a few values so large that one scale for the whole
    tensor would round all other values away. So do the layers that the configuration names in `int8_skip_modules`.

    Returns:
        the file of the variant.

    Raises:
        ValueError: the graph does not say which modules its nodes come from, as the exports of this package do.
    """
    quantization = require("onnxruntime.quantization", "onnx")
    source, target = Path(folder, MODEL_FILE), Path(folder, INT8_FILE)
    config = LlamaBidirectionalConfig.from_pretrained(folder)
    graph = require("onnx", "onnx").load(source, load_external_data=False).graph
    down = [f"layers.{number}.mlp.down_proj" for number in range(config.num_hidden_layers)]
    skipped = {f"'reranker.model.{name}'" for name in (*down, *(config.int8_skip_modules or ()))}
    scopes = {node.name: _scopes(node) for node in graph.node}
    excluded = [node for node, modules in scopes.items() if any(name in modules for name in skipped)]
    if missing := sorted(name for name in skipped if not any(name in modules for modules in scopes.values())):
        raise ValueError(f"{source} has no nodes of {missing[0]}, which int8 would ruin: export the reranker again")
    quantization.quantize_dynamic(
        source,
        target,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        nodes_to_exclude=excluded,
        use_external_data_format=True,
    )
    return target


def _scopes(node: Any) -> str:
    """The names of the modules that a node comes from, each in quotes, as torch's exporter writes them."""
    scopes = [entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
    return "".join(scopes)


class OnnxReranker:
    """
    An exported graph that is called like the model it was made from. It computes on the CPU in float32.

    Args:
        name_or_path: a folder or the id of a Hub repository.
        file_name: name of the graph's file.
        source: arguments of the Hub, such as `revision`.

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
        require("onnxruntime", "onnx")
        self.config = LlamaBidirectionalConfig.from_pretrained(name_or_path, **(source or {}))
        graph, _ = (
            cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False, **(source or {}))
            for name in (file_name, f"{file_name}.data")  # onnxruntime reads the weights from beside the graph
        )
        if graph is None:
            raise FileNotFoundError(
                f"{os.fspath(name_or_path)!r} has no {file_name}: llama-bidir export --format onnx writes one"
            )
        self._graph = Path(graph)
        self._session = _open_session(self._graph)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_session": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _session=_open_session(state["_graph"]))

    def to(self, device: str | int | torch.device) -> None:
        """Raises ValueError for any device but the CPU."""
        if torch.device(device).type != "cpu":
            raise ValueError(f"backend 'onnx' computes on the CPU: leave device out, got {str(device)!r}")

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        inputs = dict(zip(INPUTS, (input_ids.long().numpy(), attention_mask.long().numpy()), strict=True))
        return SequenceClassifierOutput(logits=torch.from_numpy(self._session.run(["logits"], inputs)[0]))


def _open_session(graph: Path) -> Any:
    runtime = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    check_is_downloaded(graph)
    try:
        return runtime.InferenceSession(graph, sess_options=options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime also refuses weights in a file outside the folder
        raise ValueError(f"{str(graph)!r} cannot be loaded by onnxruntime: {error}") from None


class _Outputs(torch.nn.Module):
    def __init__(self, reranker: LlamaBidirectionalForSequenceClassification):
        super().__init__()
        self.reranker = reranker

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = self.reranker(input_ids=input_ids, attention_mask=attention_mask).logits
        calibration = self.reranker.config.calibration
        if calibration is None:
            return (logits,)
        return logits, torch.sigmoid(calibration["slope"] * logits + calibration["offset"])


def _example(vocab_size: int, padding_side: str) -> dict[str, torch.Tensor]:
    """A padded batch. Its shape equals no size of the model, so the export cannot confuse the two."""
    generator = torch.Generator().manual_seed(0)
    sequences = [
        torch.randint(vocab_size, (length,), generator=generator, device="cpu").tolist() for length in (13, 5, 9)
    ]
    inputs = pad(sequences, torch.device("cpu"))
    return inputs if padding_side == "right" else {name: value.flip(1) for name, value in inputs.items()}

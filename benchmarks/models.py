"""Writes the checkpoints that are timed, and counts the arithmetic of their forward pass."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from llama_bidir import CrossEncoder, LlamaBidirectionalConfig, LlamaBidirectionalForSequenceClassification
from llama_bidir.checkpoints.export import export_reranker
from llama_bidir.fields_llama_bidir import DEFAULT_PROMPT_TEMPLATE
from llama_bidir.modeling_llama_bidir import pool

from .workloads import make_collection

SEED = 0
# The name of a checkpoint that is measured as it is.
TRAINED = "trained"

# Fields that differ from the checkpoint of the command line. An empty shape keeps the checkpoint's weights.
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "10m": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "135m": {},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
}


def write_checkpoint(
    name: str,
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    """
    Writes a `llama_bidirec` checkpoint. Every call on the same device writes the same weights.

    Args:
        name: a key of `SHAPES`.
        source: a plain Llama checkpoint. It supplies the tokenizer, the vocabulary and, for an empty shape, the weights
            of the body.
        folder: output folder, created if missing.
        device: device on which random weights are drawn.
        dtype: of the saved weights.
    """
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if shape := SHAPES[name]:
        # With this range each layer adds about as much as its input, so scores depend on attention.
        config = LlamaBidirectionalConfig.from_pretrained(
            source, **shape, initializer_range=shape["hidden_size"] ** -0.5, dtype=torch.float32
        )
        with torch.device(device):
            model = LlamaBidirectionalForSequenceClassification(config)
    else:
        model = LlamaBidirectionalForSequenceClassification.from_pretrained(source, dtype=torch.float32).to(device)
    encoder = CrossEncoder(model.eval(), tokenizer, device=device)
    model.config.pad_token_id = tokenizer.pad_token_id
    spread_scores(model, tokenizer)
    model.to(getattr(torch, dtype))
    encoder.save_pretrained(folder)
    drop_chat_template(folder)


def copy_checkpoint(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """
    Copies the files of a reranker into an empty folder, to which exports can be added, without its subfolders.

    Raises:
        ValueError: the peers would not compute its scores, because it has another prompt or several labels.
    """
    for path in Path(source).iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    drop_chat_template(folder)
    config = LlamaBidirectionalConfig.from_pretrained(folder)
    if config.prompt_template != DEFAULT_PROMPT_TEMPLATE or config.num_labels != 1:
        raise ValueError(f"{source}: only a reranker with the default prompt and one label can be compared with others")
    if AutoTokenizer.from_pretrained(folder).chat_template is not None:
        raise ValueError(f"{source}: the tokenizer's chat template would slow sentence-transformers down; remove it")


def drop_chat_template(folder: str | os.PathLike[str]) -> None:
    """Removes the chat template: sentence-transformers tokenizes pairs of texts faster than chat messages."""
    Path(folder, "chat_template.jinja").unlink(missing_ok=True)


def export_once(folder: str, format: str, **options: Any) -> str:
    """Exports a checkpoint into a folder within it, unless that exists. Returns the folder of the export."""
    target = Path(folder, format)
    if not target.exists():
        export_reranker(folder, target, format=format, **options)
    return os.fspath(target)


@torch.inference_mode()
def spread_scores(model: LlamaBidirectionalForSequenceClassification, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Changes a random head so that scores have a mean near 0 and a standard deviation near 1.

    The pooled states of a random model are nearly equal, so a random head gives nearly equal scores with a large common
    offset. Relative to that offset, any error would look small.
    """
    collection = make_collection(num_queries=8, num_passages=8, depth=1)
    texts = [
        model.config.prompt_template.format(query=query, passage=collection.corpus[collection.run[query_id][0]][:150])
        for query_id, query in collection.queries.items()
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
    pooled = pool(model.model(**batch).last_hidden_state, batch["attention_mask"], model.config.pooling)
    head, mean = model.score.weight[0], pooled.mean(dim=0)
    head -= (head @ mean) / (mean @ mean) * mean
    head /= (pooled @ head).std()


def model_flops(config: LlamaConfig, lengths: Sequence[int]) -> int:
    """
    Returns the floating-point operations that scoring sequences takes without any padding.

    Each parameter of the body's linear layers counts 2 per token (a multiplication and an addition). Each layer counts
    4 * length ** 2 * width per sequence for full attention (queries times keys, and weights times values), where width
    is the total width of all query heads. Embeddings, norms, softmax and the head are not counted.

    Args:
        config: configuration with the shape of the model.
        lengths: tokens of each sequence, without padding.
    """
    width = config.num_attention_heads * config.head_dim
    key_value_width = config.num_key_value_heads * config.head_dim
    layer_parameters = config.hidden_size * (2 * width + 2 * key_value_width + 3 * config.intermediate_size)
    linear = 2 * layer_parameters * sum(lengths)
    attention = 4 * width * sum(length**2 for length in lengths)
    return config.num_hidden_layers * (linear + attention)

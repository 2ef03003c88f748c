"""The checkpoints that are timed, and what a forward pass of them costs in arithmetic."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase

from llama_bidir import CrossEncoder, LlamaBidirectionalConfig, LlamaBidirectionalForSequenceClassification
from llama_bidir.modeling_llama_bidir import pool

from .workloads import make_collection

SEED = 0

# What differs from the checkpoint given on the command line; an empty shape keeps its weights.
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
    name: str, source: str | os.PathLike[str], folder: str | os.PathLike[str], *, device: str = "cpu"
) -> None:
    """
    Writes a `llama_bidirec` checkpoint in float32, the same at every call on a device.

    Args:
        name: one of `SHAPES`.
        source: a plain Llama checkpoint, which gives the tokenizer, the vocabulary and, for an empty shape, the
            weights of the body.
        folder: made when missing.
        device: where random weights are drawn.
    """
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if shape := SHAPES[name]:
        # Each layer adds about as much as it is given, so that scores depend on attention.
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
    encoder.save_pretrained(folder)
    drop_chat_template(folder)


def drop_chat_template(folder: str | os.PathLike[str]) -> None:
    """Lets sentence-transformers take pairs in two halves, which it tokenizes faster than chat messages."""
    Path(folder, "chat_template.jinja").unlink()


@torch.inference_mode()
def spread_scores(model: LlamaBidirectionalForSequenceClassification, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Gives scores a mean near 0 and a standard deviation near 1, which a random head does not.

    A random head on pooled states that are nearly equal gives scores that are nearly equal, and their common offset
    would make any error look small beside it.
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
    Floating point operations that scoring sequences takes when nothing is spent on padding.

    2 for each parameter of the body's linear layers and each token (a multiplication and an addition), and
    4 * length ** 2 * width for each layer and sequence (queries times keys, and weights times values, full attention;
    the width is that of all query heads together). Embeddings, norms, softmax and the head are not counted.

    Args:
        config: the shape of the model.
        lengths: tokens of each sequence, without padding.
    """
    width = config.num_attention_heads * config.head_dim
    key_value_width = config.num_key_value_heads * config.head_dim
    layer_parameters = config.hidden_size * (2 * width + 2 * key_value_width + 3 * config.intermediate_size)
    linear = 2 * layer_parameters * sum(lengths)
    attention = 4 * width * sum(length**2 for length in lengths)
    return config.num_hidden_layers * (linear + attention)

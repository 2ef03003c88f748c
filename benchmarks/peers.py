"""The implementations to compare. Each loads the same checkpoint and scores the same (query, passage) pairs."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerBase

from llama_bidir import CrossEncoder
from llama_bidir.configuration_llama_bidir import DEFAULT_PROMPT_TEMPLATE

from .workloads import Pair

BATCH_SIZE = 32
SENTENCE_TRANSFORMERS = "sentence-transformers"
# Causal and pooled differently: it shows the speed of Llama in transformers, but its scores are not comparable.
OTHER_FUNCTION = "stock-llama"


class Scorer(NamedTuple):
    """A loaded implementation: its model, and a function from pairs to an array of scores."""

    model: torch.nn.Module
    score: Callable[[Sequence[Pair]], np.ndarray]


def load_llama_bidir(folder: str, *, dtype: str, device: str, max_length: int) -> Scorer:
    """This package, with the defaults of `predict`."""
    encoder = CrossEncoder(folder, dtype=dtype, device=device, max_length=max_length)
    return Scorer(encoder.model, encoder.predict)


def load_sentence_transformers(folder: str, *, dtype: str, device: str, max_length: int) -> Scorer:
    """sentence-transformers, with the defaults of `predict` (32 pairs per batch)."""
    import sentence_transformers

    encoder = sentence_transformers.CrossEncoder(
        folder,
        device=device,
        max_length=max_length,
        model_kwargs={"dtype": dtype},
        activation_fn=torch.nn.Identity(),
    )
    return Scorer(encoder[0].auto_model, lambda pairs: encoder.predict(prompt_halves(pairs)))


def load_reference(folder: str, *, dtype: str, device: str, max_length: int) -> Scorer:
    """NeMo AutoModel's class, in a plain loop over the pairs in their order."""
    module = import_alone("nemo_automodel.components.models.llama_bidirectional.model")
    model = module.LlamaBidirectionalForSequenceClassification.from_pretrained(folder, dtype=dtype)
    return _plain_loop(model, folder, device=device, max_length=max_length, by_length=False)


def load_stock_llama(folder: str, *, dtype: str, device: str, max_length: int) -> Scorer:
    """transformers' own causal Llama with its last-token pooling, in a plain loop over the pairs sorted by length."""
    fields = AutoConfig.from_pretrained(folder).to_dict()
    # Without this, transformers builds a bidirectional mask, because the configuration has is_causal=False.
    config = LlamaConfig.from_dict({**fields, "model_type": "llama", "is_causal": True})
    model = LlamaForSequenceClassification.from_pretrained(folder, config=config, dtype=dtype)
    return _plain_loop(model, folder, device=device, max_length=max_length, by_length=True)


def load_flag_embedding(folder: str, *, dtype: str, device: str, max_length: int) -> Scorer:
    """FlagEmbedding's FlagReranker (128 pairs per batch, by length). It runs the first batch twice to test its size."""
    module = import_alone("FlagEmbedding.inference.reranker.encoder_only.base")
    reranker = module.BaseReranker(folder, devices=device, max_length=max_length)
    # BaseReranker has no argument for bfloat16. `model.to` would also round the rotary frequencies.
    for parameter in reranker.model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return Scorer(reranker.model, lambda pairs: np.array(reranker.compute_score(prompt_halves(pairs)), np.float32))


LOADERS: dict[str, Callable[..., Scorer]] = {
    "llama-bidir": load_llama_bidir,
    SENTENCE_TRANSFORMERS: load_sentence_transformers,
    "reference": load_reference,
    OTHER_FUNCTION: load_stock_llama,
    "FlagEmbedding": load_flag_embedding,
}


def render(query: str, passage: str) -> str:
    """Returns the text of a pair as it is tokenized."""
    return DEFAULT_PROMPT_TEMPLATE.format(query=query, passage=passage)


def prompt_halves(pairs: Sequence[Pair]) -> list[Pair]:
    """Returns text pairs whose tokens, as a pair, are those of the rendered prompt."""
    head, tail = DEFAULT_PROMPT_TEMPLATE.split("{query}")
    return [(head + query, tail.format(passage=passage)) for query, passage in pairs]


@torch.inference_mode()
def padded_scores(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    max_length: int,
    batch_size: int = BATCH_SIZE,
    by_length: bool,
) -> np.ndarray:
    """
    Scores pairs in a plain loop of padded batches.

    Args:
        model: returns logits of shape `(batch_size, 1)`.
        tokenizer: truncates a rendered pair at its end.
        pairs: (query, passage) texts.
        max_length: maximum tokens of a rendered pair.
        batch_size: pairs per batch.
        by_length: take the pairs by falling length instead of in their order.

    Returns:
        float32 scores of shape `(num_pairs,)`, in the order of `pairs`.
    """
    texts = [render(*pair) for pair in pairs]
    input_ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    order = (
        sorted(range(len(pairs)), key=lambda index: -len(input_ids[index])) if by_length else list(range(len(pairs)))
    )
    scores = np.empty(len(pairs), np.float32)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [input_ids[index] for index in indices]}, return_tensors="pt")
        logits = model(**batch.to(model.device), return_dict=True).logits
        scores[indices] = logits[:, 0].float().cpu()
    return scores


def _plain_loop(model: Any, folder: str, *, device: str, max_length: int, by_length: bool) -> Scorer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = model.to(device).eval()
    return Scorer(
        model, lambda pairs: padded_scores(model, tokenizer, pairs, max_length=max_length, by_length=by_length)
    )


@cache
def import_alone(name: str) -> ModuleType:
    """
    Imports a module without running the `__init__` of its parent packages, which may need packages that are missing.

    Raises:
        ModuleNotFoundError: the package, or a package that the module needs, is not installed.
    """
    *packages, _ = name.split(".")
    spec = importlib.util.find_spec(packages[0])
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{packages[0]} is not installed")
    root = Path(spec.submodule_search_locations[0])
    for depth in range(1, len(packages) + 1):
        package = ModuleType(".".join(packages[:depth]))
        package.__path__ = [str(root.joinpath(*packages[1:depth]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(name)


def share_weights(source: torch.nn.Module, other: torch.nn.Module) -> None:
    """Makes `other` use the tensors of `source` for parameters of the same name. Several large models then fit."""
    tensors = dict(source.named_parameters())
    for name, parameter in other.named_parameters():
        tensor = tensors.get(name)
        if tensor is not None and _kind(tensor) == _kind(parameter):
            parameter.data = tensor.data


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.layout, tensor.device

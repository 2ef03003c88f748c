"""The implementations in torch. Each loads the same checkpoint and scores the same (query, passage) pairs."""

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BatchEncoding,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
)

from llama_bidir import CrossEncoder
from llama_bidir.fields_llama_bidir import DEFAULT_PROMPT_TEMPLATE

from .flash import flash_implementation, kernel_name
from .machine import is_cuda
from .models import export_once
from .workloads import Pair

# The default of sentence-transformers, in pairs.
BATCH_SIZE = 32
# Sizes to choose the fastest from, in pairs. A CPU gains nothing from larger ones and pads more.
CPU_BATCH_SIZES = (8, 32)
CUDA_BATCH_SIZES = (32, 128, 512)
SENTENCE_TRANSFORMERS = "sentence-transformers"
UNPADDED = "sentence-transformers, unpadded"
REFERENCE = "nemo_automodel.components.models.llama_bidirectional.model"
# Causal and pooled differently: it shows the speed of Llama in transformers, but its scores are not comparable.
OTHER_FUNCTION = "stock-llama"


class Scorer(NamedTuple):
    """
    A loaded implementation.

    Attributes:
        model: its modules, or None if they are not torch's.
        score: returns the float32 scores of pairs. It takes the pairs and a batch size.
        setting: how it scores, in words, where `{}` is the batch size.
        batch_sizes: pairs per batch to choose the fastest from. Empty if the implementation chooses the batches.
    """

    model: torch.nn.Module | None
    score: Callable[[Sequence[Pair], int | None], np.ndarray]
    setting: str
    batch_sizes: Sequence[int] = ()


def batch_sizes(device: str) -> tuple[int, ...]:
    """Returns the batch sizes to choose from on a device."""
    return CUDA_BATCH_SIZES if is_cuda(device) else CPU_BATCH_SIZES


def load_llama_bidir(folder: str, *, dtype: str, device: str, max_length: int) -> Scorer:
    """This package, with the defaults of `predict`."""
    encoder = CrossEncoder(folder, dtype=dtype, device=device, max_length=max_length)
    return Scorer(encoder.model, encoder.predict, "packed, defaults")


def load_sentence_transformers(folder: str, *, dtype: str, device: str, max_length: int) -> Scorer:
    """sentence-transformers, with the defaults of `predict` (32 padded pairs per batch, by length)."""
    encoder = _open_sentence_transformers(folder, dtype=dtype, device=device, max_length=max_length)
    return Scorer(
        encoder[0].auto_model,
        lambda pairs, batch_size: encoder.predict(prompt_halves(pairs), batch_size=batch_size),
        "defaults: padded, {} pairs by length",
        [BATCH_SIZE],
    )


def load_unpadded(folder: str, *, dtype: str, device: str, max_length: int) -> Scorer:
    """sentence-transformers without padding: this package's export for it, with flash attention."""
    encoder = _open_sentence_transformers(
        export_for_unpadding(folder),
        dtype=dtype,
        device=device,
        max_length=max_length,
        attn_implementation=flash_implementation(device),
    )
    if not encoder[0].can_flatten_inputs:
        raise RuntimeError("sentence-transformers pads these inputs, although the model has flash attention")
    return Scorer(
        # The same names as in a whole reranker.
        torch.nn.ModuleDict({"model": encoder[0].auto_model}),
        lambda pairs, batch_size: encoder.predict(prompt_halves(pairs), batch_size=batch_size),
        f"unpadded, {kernel_name(device)}, {{}} pairs",
        batch_sizes(device),
    )


def export_for_unpadding(folder: str) -> str:
    """
    Exports a checkpoint for sentence-transformers, once, and returns the folder.

    The chat template is left out. sentence-transformers tokenizes pairs of texts faster than chat messages, and the
    scores are the same.
    """
    target = export_once(folder, "sentence-transformers")
    template, settings = Path(target, "chat_template.jinja"), Path(target, "sentence_bert_config.json")
    if template.exists():
        template.unlink()
        fields = json.loads(settings.read_text(encoding="utf-8"))
        del fields["modality_config"]["message"]
        settings.write_text(json.dumps(fields), encoding="utf-8")
    return target


def _open_sentence_transformers(folder: str, *, dtype: str, device: str, max_length: int, **model_kwargs: Any) -> Any:
    import sentence_transformers

    return sentence_transformers.CrossEncoder(
        folder,
        device=device,
        max_length=max_length,
        model_kwargs={"dtype": dtype, **model_kwargs},
        activation_fn=torch.nn.Identity(),
    )


def load_reference(folder: str, *, dtype: str, device: str, max_length: int) -> Scorer:
    """NeMo AutoModel's class, in a plain loop over the pairs sorted by length."""
    model = import_alone(REFERENCE).LlamaBidirectionalForSequenceClassification.from_pretrained(folder, dtype=dtype)
    return _plain_loop(model, folder, device=device, max_length=max_length)


def load_stock_llama(folder: str, *, dtype: str, device: str, max_length: int) -> Scorer:
    """transformers' own causal Llama with its last-token pooling, in a plain loop over the pairs sorted by length."""
    fields = AutoConfig.from_pretrained(folder).to_dict()
    # Without this, transformers builds a bidirectional mask, because the configuration has is_causal=False.
    config = LlamaConfig.from_dict({**fields, "model_type": "llama", "is_causal": True})
    model = LlamaForSequenceClassification.from_pretrained(folder, config=config, dtype=dtype)
    return _plain_loop(model, folder, device=device, max_length=max_length)


def load_flag_embedding(folder: str, *, dtype: str, device: str, max_length: int) -> Scorer:
    """FlagEmbedding's FlagReranker. It sorts the pairs by length and runs the first batch twice to test its size."""
    module = import_alone("FlagEmbedding.inference.reranker.encoder_only.base")
    reranker = module.BaseReranker(folder, devices=device, max_length=max_length)
    # BaseReranker has no argument for bfloat16. `model.to` would also round the rotary frequencies.
    for parameter in reranker.model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))

    def score(pairs: Sequence[Pair], batch_size: int | None) -> np.ndarray:
        return np.array(reranker.compute_score(prompt_halves(pairs), batch_size=batch_size), np.float32)

    return Scorer(reranker.model, score, "padded, {} pairs by length", batch_sizes(device))


def render(query: str, passage: str) -> str:
    """Returns the text of a pair as it is tokenized."""
    return DEFAULT_PROMPT_TEMPLATE.format(query=query, passage=passage)


def prompt_halves(pairs: Sequence[Pair]) -> list[Pair]:
    """Returns text pairs whose tokens, as a pair, are those of the rendered prompt."""
    head, tail = DEFAULT_PROMPT_TEMPLATE.split("{query}")
    return [(head + query, tail.format(passage=passage)) for query, passage in pairs]


@torch.inference_mode()
def padded_scores(
    forward: Callable[[BatchEncoding], torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    max_length: int,
    batch_size: int,
) -> np.ndarray:
    """
    Scores pairs in a plain loop of padded batches, by falling length.

    Args:
        forward: returns logits of shape `(batch_size, 1)` for a padded batch on the CPU.
        tokenizer: truncates a rendered pair at its end.
        pairs: (query, passage) texts.
        max_length: maximum tokens of a rendered pair.
        batch_size: pairs per batch.

    Returns:
        float32 scores of shape `(num_pairs,)`, in the order of `pairs`.
    """
    texts = [render(*pair) for pair in pairs]
    input_ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    order = sorted(range(len(pairs)), key=lambda index: -len(input_ids[index]))
    scores = np.empty(len(pairs), np.float32)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [input_ids[index] for index in indices]}, return_tensors="pt")
        scores[indices] = forward(batch)[:, 0].float().cpu()
    return scores


def forward_of(model: Any) -> Callable[[BatchEncoding], torch.Tensor]:
    """Returns a function from a padded batch to the logits of a transformers model, on the model's device."""
    return lambda batch: model(**batch.to(model.device), return_dict=True).logits


def loop(
    forward: Callable[[BatchEncoding], torch.Tensor], folder: str, *, max_length: int
) -> Callable[[Sequence[Pair], int | None], np.ndarray]:
    """Returns a function from pairs and a batch size to scores (see [`padded_scores`])."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return lambda pairs, batch_size: padded_scores(
        forward, tokenizer, pairs, max_length=max_length, batch_size=batch_size or BATCH_SIZE
    )


def _plain_loop(model: Any, folder: str, *, device: str, max_length: int) -> Scorer:
    score = loop(forward_of(model.to(device).eval()), folder, max_length=max_length)
    return Scorer(model, score, "padded, {} pairs by length", batch_sizes(device))


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

"""Scores windows of pairs with a CrossEncoder, each by itself, so that a score does not depend on what came before."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tqdm.auto import tqdm

from ...cross_encoder import CrossEncoder
from ...prompts import PromptEncoder
from ...scoring.pipeline import Pair, Scorer

# On a CPU, where a pair takes long, a window is what a kill may lose; a GPU is given a chunk at a time.
CPU_WINDOW_PAIRS = 256
# Of each weight, for its fingerprint.
FINGERPRINT_VALUES = 64


class WindowScorer:
    """
    Args:
        cross_encoder: with one score a pair; its devices, activation and treatment of long documents hold.
        batch_size: at most so many pairs a forward pass.
        max_tokens_per_batch: at most so many tokens a forward pass; chosen for the device when None.
        progress: a bar that counts pairs.
    """

    def __init__(
        self,
        cross_encoder: CrossEncoder,
        *,
        batch_size: int | None,
        max_tokens_per_batch: int | None,
        progress: "tqdm[Any]",
    ):
        self.cross_encoder = cross_encoder
        self._max_length = cross_encoder.config.rerank_max_length
        self._scorer = Scorer(
            PromptEncoder(
                cross_encoder.tokenizer,
                prompt_template=cross_encoder.config.prompt_template,
                max_length=self._max_length,
            ),
            cross_encoder.engine(),
            progress,
            num_labels=1,
            max_tokens=max_tokens_per_batch,
            max_sequences=batch_size,
            long_document=cross_encoder.long_document,
        )

    def score(self, windows: Iterable[list[Pair]]) -> Iterator[list[float]]:
        """Yields the scores of each window, float32 values; a GPU computes one while the next one is tokenized."""
        scorer, activation = self._scorer, self.cross_encoder.activation_fn
        for scores in scorer.stream(windows):
            yield (scores if activation is None else activation(scores)).float().tolist()

    def log(self) -> None:
        """Says how many pairs were cut or split."""
        self._scorer.log()


def check_one_score(cross_encoder: CrossEncoder) -> None:
    """Raises ValueError for a model of several labels, TypeError for an exported one, whose weights it cannot tell."""
    if not isinstance(cross_encoder.model, torch.nn.Module):
        raise TypeError("a run is reranked with backend 'torch': load the checkpoint that was exported")
    if cross_encoder.config.num_labels != 1:
        raise ValueError(
            f"reranking needs one score a pair, but the model has {cross_encoder.config.num_labels} labels: use predict"
        )


def describe_scoring(cross_encoder: CrossEncoder) -> dict[str, Any]:
    """What decides a score, by name: two that agree in it give the same scores on the same machine."""
    config, activation, devices = cross_encoder.config, cross_encoder.activation_fn, cross_encoder.devices
    name = config.name_or_path or ""
    return {
        "model": os.path.abspath(name) if os.path.isdir(name) else name,
        "weights": fingerprint(cross_encoder.model),
        "dtype": str(cross_encoder.model.dtype).removeprefix("torch."),
        "device": devices[0].type if len(devices) == 1 else f"{len(devices)} x {devices[0].type}",
        "pooling": config.pooling,
        "temperature": config.temperature,
        "prompt_template": config.prompt_template,
        "max_length": config.rerank_max_length,
        "long_document": cross_encoder.long_document,
        "activation_fn": activation and getattr(activation, "__qualname__", type(activation).__qualname__),
    }


def choose_settings(cross_encoder: CrossEncoder, max_tokens_per_batch: int | None) -> dict[str, Any]:
    """
    What a job chooses when it is first started, and keeps: pairs of a window and tokens of a batch. The latter depend
    on the memory that is free, and so would be others after a kill.
    """
    engine = cross_encoder.engine()
    budget = max_tokens_per_batch or cross_encoder.max_tokens_per_batch or engine.token_budget()
    is_cpu = cross_encoder.devices[0].type == "cpu"
    return {"window_pairs": CPU_WINDOW_PAIRS if is_cpu else engine.chunk_pairs, "max_tokens_per_batch": budget}


def fingerprint(model: torch.nn.Module) -> str:
    """Changes with the weights: a digest of their shapes and of the first values of each that is held as it is."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if type(parameter.data) is torch.Tensor and not parameter.is_meta:  # neither quantized nor offloaded
            values = parameter.detach().flatten()[:FINGERPRINT_VALUES].cpu().contiguous()
            digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

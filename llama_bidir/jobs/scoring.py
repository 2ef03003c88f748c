"""What decides the scores of a job: recorded at its first start, so that a resumed job scores the same batches."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch

from ..cross_encoder import CrossEncoder
from ..scoring.finite import find_cause
from ..scoring.int8 import dtype_name
from ..scoring.pipeline import check_one_label
from ..scoring.probability import PROBABILITY
from ..utils.errors import ScoreError

# A kill loses up to one window, and on a CPU each pair takes long. Other devices get a chunk at a time.
CPU_WINDOW_PAIRS = 256
FINGERPRINT_VALUES = 64
# By size in bytes, to read the bits of a weight.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_score(name: str, score: float) -> None:
    """Raises ScoreError if a score is NaN or infinite."""
    if not math.isfinite(score):
        raise ScoreError(f"{name} is {score} and has no rank")


@contextmanager
def naming_the_cause(cross_encoder: CrossEncoder) -> Iterator[None]:
    """Adds the likely cause of the score to the message of a ScoreError."""
    try:
        yield
    except ScoreError as error:
        raise ScoreError(f"{error}: {find_cause(cross_encoder.model)}") from None


def describe_scoring(cross_encoder: CrossEncoder) -> dict[str, Any]:
    """
    Returns what decides a score, by name. Two models that agree in it give the same scores on the same machine.

    Raises:
        TypeError: the model is an exported one, which does not show its weights.
    """
    if not isinstance(cross_encoder.model, torch.nn.Module):
        raise TypeError("a job that resumes needs backend 'torch': load the checkpoint that was exported")
    config, activation, devices = cross_encoder.config, cross_encoder.activation_fn, cross_encoder.devices
    name = config.name_or_path or ""
    is_function = callable(activation)
    activation_name = getattr(activation, "__qualname__", type(activation).__qualname__) if is_function else activation
    tokenizer = json.loads(cross_encoder.tokenizer.backend_tokenizer.to_str())
    settings = {part: value for part, value in tokenizer.items() if part not in ("padding", "truncation")}
    return {
        "model": os.path.abspath(name) if os.path.isdir(name) else name,
        "weights": fingerprint(cross_encoder.model),
        "tokenizer": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16],
        "dtype": dtype_name(cross_encoder.model),
        "device": devices[0].type if len(devices) == 1 else f"{len(devices)} x {devices[0].type}",
        "pooling": config.pooling,
        "temperature": config.temperature,
        "prompt_template": config.prompt_template,
        **({} if config.instruction is None else {"instruction": config.instruction}),
        "max_length": config.rerank_max_length,
        "long_document": cross_encoder.long_document,
        "parse_special_tokens": cross_encoder.parse_special_tokens,
        "activation_fn": activation_name,
        **({"calibration": config.calibration} if activation == PROBABILITY else {}),
    }


def fix_scoring(
    cross_encoder: CrossEncoder, work: str, max_tokens_per_batch: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Returns what decides a score, and what the first start of a job chooses for all later ones: pairs per window and
    tokens per batch. The number of tokens depends on the free memory, which would differ after a kill.

    Raises:
        TypeError, ValueError: the model cannot do the work (see [`describe_scoring`]).
    """
    check_one_label(cross_encoder.config, work)
    scoring, engine = describe_scoring(cross_encoder), cross_encoder.engine()
    budget = max_tokens_per_batch or cross_encoder.max_tokens_per_batch or engine.token_budget()
    window_pairs = CPU_WINDOW_PAIRS if cross_encoder.devices[0].type == "cpu" else engine.chunk_pairs
    return scoring, {"window_pairs": window_pairs, "max_tokens_per_batch": budget}


def fingerprint(model: torch.nn.Module) -> str:
    """Returns a digest of the shape, the dtype, the first values and the sum of all bits of each weight and buffer."""
    digest = hashlib.sha256()
    for name, parameter in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if type(parameter.data) is torch.Tensor and not parameter.is_meta:  # neither quantized nor offloaded
            bits = parameter.detach().contiguous().flatten().view(INTEGERS[parameter.dtype.itemsize])
            # A sum of integers does not depend on its order, so it is the same for any number of threads.
            digest.update(f"{bits[:FINGERPRINT_VALUES].tolist()} {bits.sum(dtype=torch.int64).item()}".encode())
    return digest.hexdigest()[:16]

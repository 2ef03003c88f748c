"""Makes a reranker for int8: a checkpoint with equal scores whose weights and activations int8 rounds less."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..checkpoints.chat_template import save_tokenizer
from ..checkpoints.files import replaced_by_checkpoint
from ..checkpoints.loading import cast_parameters, load_merged
from ..checkpoints.model_card import has_other_card, read_card, write_model_card
from ..checkpoints.smoothing import find_sites, smooth
from ..cross_encoder import CrossEncoder
from ..data import load_rows
from ..data.files import parse_json, read_lines
from ..evaluation import evaluate_reranker
from ..prompts import Pair, PromptEncoder
from ..scoring.int8 import check_int8_device, in_int8
from ..utils.outputs import whole_folder
from ..utils.sharing import spread
from ..utils.validation import check_positive_int, check_text

MEASURE = "nDCG@10"
# int8 skips layers until the error that is left of the sites below, measured one by one, is this small. The sites that
# are not measured add more.
TARGET_ERROR = 0.022
MEASURED_SITES = ("self_attn.q_proj", "mlp.down_proj")  # by their first layer: attention amplifies errors of its inputs
MEASURED_PAIRS = 24
# A file with fewer pairs is used as a whole for calibration.
FEWEST_PAIRS = 32
# The largest difference of the new checkpoint's scores from the old one's, relative to the largest score.
TOLERANCE = 1e-5


class QuantizationResult(NamedTuple):
    """
    What int8 does to the scores of a reranker, before and after it was made for int8.

    Args:
        skip_modules: the linear layers that int8 skips.
        num_pairs: how many pairs the errors are of.
        are_held_out: whether none of these pairs was used for calibration. Small files have too few pairs for that.
        errors: the root mean square of the difference between int8 and float32 scores, over the standard deviation of
            the float32 scores, by `"before"` and `"after"`.
        measures: nDCG@10 of `"float32"`, `"before"` and `"after"`, if a collection was given.
    """

    skip_modules: list[str]
    num_pairs: int
    are_held_out: bool
    errors: dict[str, float]
    measures: dict[str, float]


def quantize_reranker(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    num_pairs: int = 64,
    collection: str | os.PathLike[str] | None = None,
    depth: int = 20,
    revision: str | None = None,
    overwrite: bool = False,
) -> QuantizationResult:
    """
    Writes a checkpoint whose scores in float32 and bfloat16 are those of a reranker, bit for bit, and whose scores in
    int8 are closer to them (see [`~checkpoints.smoothing`]).

    Args:
        model: the folder or Hub id of a checkpoint, or of an adapter, which is merged into its base model.
        data: pairs for calibration: training rows (see [`~data.load_rows`]), or JSON Lines with `query` and `passage`.
        output: the folder to write. It appears only when it is complete.
        num_pairs: how many pairs to calibrate with. As many others show what int8 does to the scores.
        collection: a BEIR folder with a first-stage run (see [`~evaluation.load_dataset`]). Its judged queries show
            what int8 does to the ranking.
        depth: how many documents of the run to rerank per query.
        revision: branch, tag or commit of a Hub repository.
        overwrite: replace the checkpoint in `output` when there is one. Other files in the folder stay.

    Raises:
        FileExistsError: `output` exists, and `overwrite` is not set or `output` is not a checkpoint.
        ValueError: a row breaks its rule, the weights are quantized, or this CPU has no instructions for int8.
        RuntimeError: the scores of the new checkpoint differ.
    """
    check_positive_int("num_pairs", num_pairs)
    check_int8_device(torch.device("cpu"))
    name = os.fspath(model)
    calibration, held_out = _split(list(read_calibration_pairs(data, 2 * num_pairs)), num_pairs)
    with whole_folder(
        output, overwrite=overwrite, keep=name, marker="config.json", replaces=replaced_by_checkpoint(output)
    ) as folder:
        reranker, tokenizer = load_merged(name, "float32", revision=revision)
        reranker.config.int8_skip_modules = []
        cross_encoder = CrossEncoder(reranker, tokenizer, device="cpu")
        expected = _score(cross_encoder, held_out)
        if not np.std(expected) > 0:
            raise ValueError(
                f"{data}: the pairs all have the same score: give at least two pairs with different scores"
            )
        errors: dict[str, float] = {}
        measures = _measure(cross_encoder, "float32", collection, depth)

        def judge(stage: str) -> None:
            rounded = CrossEncoder(reranker, tokenizer, device="cpu", dtype="int8")
            errors[stage] = _error(_score(rounded, held_out), expected)
            measures.update(_measure(rounded, stage, collection, depth))

        judge("before")
        _smooth(cross_encoder, calibration)
        reranker.config.int8_skip_modules = choose_skipped(cross_encoder, spread(calibration, MEASURED_PAIRS))
        cast_parameters(reranker, _exact_dtype(reranker))
        reranker.save_pretrained(folder)
        save_tokenizer(tokenizer, folder, reranker.config)
        if not has_other_card(output):
            write_model_card(folder, reranker.config, os.fspath(output), metadata=read_card(name, revision=revision))
        cast_parameters(reranker, torch.float32)
        _check_scores(_score(cross_encoder, held_out), expected)
        judge("after")
    skip_modules, are_held_out = reranker.config.int8_skip_modules, held_out is not calibration
    return QuantizationResult(skip_modules, len(held_out), are_held_out, errors, measures)


def read_calibration_pairs(data: str | os.PathLike[str], count: int) -> Iterator[Pair]:
    """
    Yields at most `count` pairs that are spread evenly over a file, with the instructions of rows that have one.

    Raises:
        FileNotFoundError, ValueError: as in [`~data.load_rows`]; a line with a `passage` breaks its rule.
    """
    path = Path(data)
    if path.name.endswith((".jsonl", ".jsonl.gz")) and path.is_file():
        first = next(iter(read_lines(path)), None)
        if first is not None and "passage" in parse_json(first[1], path, first[0]):
            pairs = [
                _read_pair(parse_json(line, path, number), f"{path}:{number}") for number, line in read_lines(path)
            ]
            yield from spread(pairs, count)
            return
    rows = load_rows(os.fspath(data))
    for position, index in enumerate(spread(range(len(rows)), count)):
        row = rows[index]
        passages = [*row["pos_doc"], *row["neg_doc"]]
        passage = passages[position // 2 % len(passages)]  # both kinds are in both halves
        yield _with_instruction(row["query"], passage, row.get("instruction"), f"{data}: row {index}")


def _read_pair(fields: Any, where: str) -> Pair:
    query, passage = (check_text(f"{where}: {name}", fields.get(name)) for name in ("query", "passage"))
    return _with_instruction(query, passage, fields.get("instruction"), where)


def _with_instruction(query: str, passage: str, instruction: Any, where: str) -> Pair:
    if instruction is None:
        return query, passage
    return query, passage, check_text(f"{where}: instruction", instruction)


def _split(pairs: Sequence[Pair], num_pairs: int) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Every second pair is held out, unless there are so few that calibration needs them all."""
    return (pairs[::2], pairs[1::2]) if len(pairs) >= min(2 * num_pairs, FEWEST_PAIRS) else (pairs, pairs)


def _score(cross_encoder: CrossEncoder, pairs: Sequence[Pair]) -> np.ndarray:
    """Returns the scores of pairs, which may have instructions."""
    (scores,) = cross_encoder.predict_chunks([pairs])
    return scores


def _error(scores: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(scores - expected))) / np.std(expected))


def _smooth(cross_encoder: CrossEncoder, pairs: Sequence[Pair]) -> None:
    """Smooths the model in place."""
    body = cross_encoder.model.model
    sequences = PromptEncoder.from_config(cross_encoder.tokenizer, cross_encoder.config).encode(pairs).input_ids

    @torch.inference_mode()
    def calibrate() -> None:
        for ids in sequences:
            body(input_ids=torch.tensor([ids], device="cpu"))

    smooth(body, calibrate)


def choose_skipped(cross_encoder: CrossEncoder, pairs: Sequence[Pair]) -> list[str]:
    """
    Returns the linear layers that int8 should skip, within the body. For each decoder layer, it measures how much the
    scores change when int8 rounds the inputs of attention alone, or the down projection alone.

    Args:
        cross_encoder: a reranker in float32.
        pairs: typical pairs.
    """
    expected, body = _score(cross_encoder, pairs), cross_encoder.model.model
    errors = {}
    for site in find_sites(body):
        if site.consumers[0].endswith(MEASURED_SITES):
            with in_int8(body, site.consumers):
                errors[tuple(site.consumers)] = _error(_score(cross_encoder, pairs), expected)
    skipped: list[str] = []
    for names in sorted(errors, key=lambda names: -errors[names]):
        if sum(error**2 for error in errors.values()) <= TARGET_ERROR**2:
            break
        skipped += names
        errors[names] = 0.0
    return skipped


def _exact_dtype(model: torch.nn.Module) -> torch.dtype:
    """The smallest dtype that holds the float32 weights of a model without rounding, usually that of its files."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(parameter, parameter.to(dtype).float()) for parameter in model.parameters()):
            return dtype
    return torch.float32


def _check_scores(scores: np.ndarray, expected: np.ndarray) -> None:
    difference = float(np.abs(scores - expected).max())
    if not difference <= TOLERANCE * float(np.abs(expected).max()):
        raise RuntimeError(
            f"the scores of the new checkpoint differ by up to {difference}: its weights may be too large for "
            "their dtype; convert the checkpoint to float32 or bfloat16 first"
        )


def _measure(
    cross_encoder: CrossEncoder, stage: str, collection: str | os.PathLike[str] | None, depth: int
) -> dict[str, float]:
    if collection is None:
        return {}
    evaluation = evaluate_reranker(cross_encoder, collection, depth=depth, measures=MEASURE)
    return {stage: evaluation.after.aggregated[MEASURE]}

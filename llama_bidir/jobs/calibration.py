"""Calibrates a reranker: fits a map from scores to probabilities of relevance and saves it in the configuration."""

import json
import os
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from ..checkpoints.model_card import update_probability
from ..cross_encoder import CrossEncoder
from ..data import TrainingRow, load_rows, parse_row
from ..evaluation.calibration import (
    expected_calibration_error,
    fit_calibration,
    log_loss,
    plot_reliability,
    reliability_bins,
)
from ..files_llama_bidir import check_checkpoint_path, read_json
from ..scoring.pipeline import check_one_label
from ..scoring.probability import Probability
from ..utils.errors import ScoreError
from ..utils.outputs import check_free, write_whole
from ..utils.sharing import spread
from ..utils.validation import check_int

PLOT_NAME = "calibration.png"
WINDOW_ROWS = 256
# With fewer rows, the probabilities are measured on the rows that they were fitted on.
FEWEST_ROWS = 32


class CalibrationResult(NamedTuple):
    """
    How good the probabilities of a reranker are, before and after calibration.

    Args:
        slope, offset: the probability of a score is `sigmoid(slope * score + offset)`.
        num_fitted, num_measured: the number of pairs used for fitting and for measuring.
        are_held_out: whether the measured pairs come from held-out rows. False if there are fewer than 32 rows.
        relevant: the share of relevant pairs among the measured ones.
        log_loss, calibration_error: by `"before"`, where the probability is `sigmoid(score)`, and `"after"`.
    """

    slope: float
    offset: float
    num_fitted: int
    num_measured: int
    are_held_out: bool
    relevant: float
    log_loss: dict[str, float]
    calibration_error: dict[str, float]


def calibrate_reranker(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    num_rows: int = 2000,
    revision: str | None = None,
    overwrite: bool = False,
    batch_size: int | None = None,
    device: Any = None,
    dtype: Any = None,
    show_progress_bar: bool | None = None,
) -> CalibrationResult:
    """
    Fits a slope and an offset that map scores to probabilities of relevance, and saves them with the reranker. With 32
    rows or more, every second row is held out to measure the probabilities. If matplotlib is installed, a reliability
    diagram is saved as `calibration.png` in the folder.

    Args:
        model: the folder or Hub id of a reranker or an adapter.
        data: training rows (see [`~data.load_rows`]), whose `pos_doc` are relevant and whose `neg_doc` are not.
        output: the folder to save to. None changes the configuration in the folder `model`, and the line of its model
            card about probabilities.
        num_rows: how many rows to use at most, spread evenly over the data.
        revision: branch, tag or commit of a Hub repository.
        overwrite: replace a calibration that the reranker has, or the checkpoint in `output`.
        batch_size, show_progress_bar: see [`CrossEncoder.predict`].
        device, dtype: see [`CrossEncoder`]. Its other settings are those of the checkpoint.

    Raises:
        FileExistsError: the reranker has a calibration or `output` exists, and `overwrite` is not set.
        FileNotFoundError: there is no such checkpoint or file.
        ValueError: a row breaks its rule; `model` is not a folder and there is no `output`; the passages are all
            relevant or all irrelevant, or their scores do not tell which; or the model has several labels.
        ScoreError: a score is NaN or infinite.
    """
    num_rows = check_int("num_rows", num_rows)
    check_checkpoint_path(model)
    name = os.fspath(model)
    config_file = Path(name, "config.json")
    if output is not None:
        check_free(output, overwrite=overwrite)
        if Path(output).is_file():
            raise NotADirectoryError(f"{os.fspath(output)!r} is a file: name a folder")
    elif not config_file.is_file():
        raise ValueError(f"{name!r} is not a folder with a config.json to save in: pass output (--output)")
    elif read_json(config_file).get("calibration") is not None and not overwrite:
        raise FileExistsError(f"{name!r} is calibrated: pass overwrite (--overwrite) to replace its calibration")
    rows = load_rows(os.fspath(data))
    indices = spread(range(len(rows)), num_rows)
    parsed = [parse_row(rows[index], f"row {index} of {os.fspath(data)}") for index in indices]
    with closing(CrossEncoder(name, revision=revision, device=device, dtype=dtype)) as cross_encoder:
        check_one_label(cross_encoder.config, "calibration")
        scores = _score_rows(cross_encoder, parsed, batch_size, show_progress_bar=show_progress_bar)
    labels = [np.arange(len(part)) < len(row.positives) for part, row in zip(scores, parsed, strict=True)]
    if not np.isfinite(np.concatenate(scores)).all():
        raise ScoreError(f"{name!r} gives NaN or infinite scores for rows of {os.fspath(data)}")
    are_held_out = len(parsed) >= FEWEST_ROWS
    fitted, measured = (slice(0, None, 2), slice(1, None, 2)) if are_held_out else (slice(None), slice(None))
    try:
        slope, offset = fit_calibration(np.concatenate(scores[fitted]), np.concatenate(labels[fitted]))
    except ValueError as error:
        raise ValueError(f"{os.fspath(data)}: {error}") from None
    values, truth = torch.from_numpy(np.concatenate(scores[measured])), np.concatenate(labels[measured])
    probabilities = {
        "before": values.double().sigmoid().numpy(),
        "after": Probability(slope, offset)(values).double().numpy(),
    }
    bins = {stage: reliability_bins(each, truth) for stage, each in probabilities.items()}
    title = f"Reliability on {len(truth):,} {'held-out ' if are_held_out else ''}pairs"
    _save(
        name,
        output,
        {"slope": slope, "offset": offset},
        revision,
        lambda path: plot_reliability(path, bins["before"], bins["after"], title=title),
    )
    return CalibrationResult(
        slope,
        offset,
        sum(map(len, scores[fitted])),
        len(truth),
        are_held_out,
        float(np.mean(truth)),
        {stage: log_loss(each, truth) for stage, each in probabilities.items()},
        {stage: expected_calibration_error(each, truth) for stage, each in probabilities.items()},
    )


def _score_rows(
    cross_encoder: CrossEncoder, rows: list[TrainingRow], batch_size: int | None, *, show_progress_bar: bool | None
) -> list[np.ndarray]:
    """Returns the logits of the passages of each row, its positives first."""
    groups = [[(row.query, text, row.instruction) for text in (*row.positives, *row.negatives)] for row in rows]
    windows = [groups[start : start + WINDOW_ROWS] for start in range(0, len(groups), WINDOW_ROWS)]
    chunks = [list(chain.from_iterable(window)) for window in windows]
    with tqdm(total=sum(map(len, groups)), desc="Scoring", unit="pair", disable=not show_progress_bar) as progress:
        found = cross_encoder.predict_chunks(chunks, batch_size, activation_fn=torch.nn.Identity(), progress=progress)
        scores = np.concatenate([*found])
    return np.split(scores, np.cumsum([len(group) for group in groups])[:-1])


def _save(
    name: str,
    output: str | os.PathLike[str] | None,
    calibration: dict[str, float],
    revision: str | None,
    draw: Callable[[Path], None],
) -> None:
    """Saves a calibration: in the configuration of the folder `name`, or with the whole reranker in `output`."""
    folder = Path(name if output is None else output)
    if output is None:
        fields = read_json(folder / "config.json")
        write_whole(folder / "config.json", json.dumps({**fields, "calibration": calibration}, indent=2) + "\n")
    else:
        reranker = CrossEncoder(name, dtype="auto", revision=revision, device="cpu")
        reranker.config.calibration = calibration
        reranker.save_pretrained(output)
    update_probability(folder, calibration)
    if find_spec("matplotlib") is not None:
        plot = folder / PLOT_NAME
        plot.unlink(missing_ok=True)  # it may be a link
        draw(plot)

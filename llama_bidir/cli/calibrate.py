"""Calibrate a reranker: make its scores probabilities of relevance."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.tables import format_table
from .options import DTYPES, positive_int, read_devices, say

if TYPE_CHECKING:
    from ..jobs.calibration import CalibrationResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.epilog = (
        "Fits sigmoid(slope * score + offset) and saves the two numbers in the configuration. Scores stay as they are; "
        "predict(activation_fn='probability') gives the probabilities. The table shows how good they are, on rows that "
        "were held out if there are 32 or more."
    )
    add = parser.add_argument
    add("--model", required=True, metavar="M", help="folder or Hub id of a reranker or of an adapter")
    add("--data", required=True, metavar="ROWS", help="training rows: pos_doc is relevant and neg_doc is not")
    add("--output", metavar="DIR", help="folder to save to; M is changed in place when not given")
    add("--num-rows", type=positive_int, default=2000, metavar="N", help="most rows to use; %(default)s")
    add("--revision", metavar="R", help="branch, tag or commit of a Hub repository")
    add("--overwrite", action="store_true", help="replace a calibration, or the output folder")
    add("--batch-size", type=positive_int, metavar="N", help="most pairs per forward pass")
    add("--device", nargs="+", metavar="D", help="such as cuda:1; several get one worker process each")
    add("--dtype", choices=DTYPES, help="the checkpoint's when not given")


def run(arguments: argparse.Namespace) -> None:
    """Calibrates the reranker and prints how good its probabilities are before and after."""
    from transformers.utils import logging

    from ..jobs.calibration import PLOT_NAME, calibrate_reranker

    logging.disable_progress_bar()
    result = calibrate_reranker(
        arguments.model,
        arguments.data,
        output=arguments.output,
        num_rows=arguments.num_rows,
        revision=arguments.revision,
        overwrite=arguments.overwrite,
        batch_size=arguments.batch_size,
        show_progress_bar=True,
        device=read_devices(arguments.device),
        dtype=arguments.dtype,
    )
    folder = Path(arguments.output or arguments.model)
    plot = [f"plot: {folder / PLOT_NAME}"] if (folder / PLOT_NAME).is_file() else []
    say(*_format(result), *plot, f"reranker: {folder}")


def _format(result: "CalibrationResult") -> list[str]:
    names = {
        "before": "before, sigmoid(score)",
        "after": f"after, sigmoid({result.slope:.4g} * score + {result.offset:.4g})",
    }
    rows = [
        (name, f"{result.log_loss[stage]:.4f}", f"{result.calibration_error[stage]:.4f}")
        for stage, name in names.items()
    ]
    which = "held-out " if result.are_held_out else ""
    return [
        *format_table([("probability", "log loss", "calibration error"), *rows], "<>>"),
        f"fitted on {result.num_fitted:,} pairs and measured on {result.num_measured:,} {which}pairs, "
        f"{result.relevant:.1%} of them relevant",
    ]

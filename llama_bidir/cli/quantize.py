"""Make a reranker for int8: a checkpoint with equal scores that dtype int8 changes less."""

import argparse
from typing import TYPE_CHECKING

from ..utils.tables import format_table
from .options import positive_int, say

if TYPE_CHECKING:
    from ..jobs.quantization import QuantizationResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.epilog = (
        "The scores of the written checkpoint in float32 and bfloat16 are those of M, bit for bit, in every tool. "
        "Load it with dtype='int8'. The table shows what int8 does to the scores of other pairs: the root mean square "
        "of the difference, over the standard deviation of the float32 scores."
    )
    add = parser.add_argument
    add("--model", required=True, metavar="M", help="folder or Hub id of a reranker or of an adapter")
    add(
        "--data",
        required=True,
        metavar="PAIRS_OR_ROWS",
        help="typical pairs: .jsonl with query and passage, or training rows as llama-bidir train reads them",
    )
    add("--output", required=True, metavar="DIR", help="folder to write")
    add("--num-pairs", type=positive_int, default=64, metavar="N", help="pairs to calibrate with; %(default)s")
    add("--collection", metavar="BEIR", help="folder with corpus, queries, qrels and a run: also show nDCG@10")
    add("--depth", type=positive_int, default=20, metavar="N", help="documents to rerank per query; %(default)s")
    add("--revision", metavar="R", help="branch, tag or commit of a Hub repository")
    add("--overwrite", action="store_true", help="replace the output folder if it exists")


def run(arguments: argparse.Namespace) -> None:
    """Writes the checkpoint and prints what int8 does to the scores before and after."""
    from transformers.utils import logging

    from ..jobs.quantization import quantize_reranker

    logging.disable_progress_bar()
    result = quantize_reranker(
        arguments.model,
        arguments.data,
        arguments.output,
        num_pairs=arguments.num_pairs,
        collection=arguments.collection,
        depth=arguments.depth,
        revision=arguments.revision,
        overwrite=arguments.overwrite,
    )
    say(*_format(result), f"int8 skips {', '.join(result.skip_modules) or 'nothing'}", f"reranker: {arguments.output}")


def _format(result: "QuantizationResult") -> list[str]:
    header = [
        "scores",
        f"error on {result.num_pairs} {'other' if result.are_held_out else 'calibration'} pairs",
        *(["nDCG@10"] if result.measures else []),
    ]
    stages = {"float32": "float32", "before": "int8, before", "after": "int8, after"}
    rows = [
        [
            name,
            f"{result.errors[stage]:.4f}" if stage in result.errors else "",
            *([f"{result.measures[stage]:.4f}"] if result.measures else []),
        ]
        for stage, name in stages.items()
    ]
    return format_table([header, *rows], "<" + ">" * (len(header) - 1))

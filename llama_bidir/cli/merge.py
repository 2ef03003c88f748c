"""Merge a LoRA adapter into its base model and write a plain checkpoint with equal scores."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument("--adapter", required=True, metavar="DIR", help="folder or Hub id of the adapter")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of the weights (default: float32); half precision takes half the space and rounds them",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")


def run(arguments: argparse.Namespace) -> None:
    """Merges and prints where the checkpoint is."""
    from transformers.utils import logging

    from ..training import merge_adapter

    logging.disable_progress_bar()
    merge_adapter(arguments.adapter, arguments.output, dtype=arguments.dtype, overwrite=arguments.overwrite)
    print(f"reranker: {arguments.output}")

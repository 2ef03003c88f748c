"""Export a reranker to sentence-transformers, vLLM, ONNX, or a Hub folder that transformers loads with its code."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument("--model", required=True, metavar="M", help="folder or Hub id of a reranker or of an adapter")
    parser.add_argument("--format", required=True, metavar="F", help="sentence-transformers, vllm, onnx or hub")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub repository")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the weights (default: the checkpoint's; float32 for an adapter and for onnx)",
    )
    parser.add_argument("--int8", action="store_true", help="onnx only: add model_int8.onnx, with int8 weights")
    parser.add_argument(
        "--model-id", metavar="ID", help="Hub id or path that the code in the model card loads (default: the output)"
    )
    parser.add_argument(
        "--evaluation", metavar="FILE", help="file from evaluate --json with the measures for the model card"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder if it exists")


def run(arguments: argparse.Namespace) -> None:
    """Exports and prints where the folder is."""
    from transformers.utils import logging

    from ..checkpoints.export import export_reranker

    logging.disable_progress_bar()
    export_reranker(
        arguments.model,
        arguments.output,
        format=arguments.format,
        revision=arguments.revision,
        dtype=arguments.dtype,
        int8=arguments.int8,
        model_id=arguments.model_id,
        evaluation=arguments.evaluation,
        overwrite=arguments.overwrite,
    )
    print(f"reranker: {arguments.output}")

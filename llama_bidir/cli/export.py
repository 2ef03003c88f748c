"""Write a reranker in the form of another tool: sentence-transformers, vLLM, ONNX, or transformers with its code."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument("--model", required=True, metavar="M", help="folder or Hub id of a reranker or of its adapter")
    parser.add_argument(
        "--format", required=True, metavar="F", help="what will load it: sentence-transformers, vllm, onnx or hub"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub repository")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights; the checkpoint's when not given, float32 for an adapter and for onnx",
    )
    parser.add_argument("--int8", action="store_true", help="onnx: add a variant with int8 weights, model_int8.onnx")
    parser.add_argument("--model-id", metavar="ID", help="name that the model card loads; the output when not given")
    parser.add_argument("--evaluation", metavar="FILE", help="of evaluate --json, for the measures of the model card")
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder when it exists")


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

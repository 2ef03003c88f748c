"""Rerank a first-stage run, or what BM25 finds."""

import argparse

from .quickstart import positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.epilog = (
        "A stopped run goes on when it is started again. For several GPUs: --device cuda:0 cuda:1, or torchrun "
        "--nproc-per-node 8 -m -- llama_bidir rerank ... (without the lone --, torchrun takes --run for its own)."
    )
    parser.add_argument("--model", required=True, metavar="M", help="folder or Hub id of the reranker")
    parser.add_argument("--corpus", required=True, metavar="FILE", help="documents in BEIR's JSON Lines, maybe .gz")
    parser.add_argument("--queries", required=True, metavar="FILE", help="queries in BEIR's JSON Lines, maybe .gz")
    parser.add_argument("--run", metavar="FILE", help="TREC run to rerank, maybe .gz; BM25 makes one when not given")
    parser.add_argument("--output", required=True, metavar="FILE", help="TREC run to write")
    parser.add_argument(
        "--depth", type=positive_int, default=100, metavar="N", help="documents of a query to score; 100 when not given"
    )
    parser.add_argument("--batch-size", type=positive_int, metavar="N", help="most pairs of a forward pass")
    parser.add_argument(
        "--max-tokens-per-batch",
        type=positive_int,
        metavar="N",
        help="most tokens of a forward pass; chosen for the device when not given",
    )
    parser.add_argument("--max-length", type=positive_int, metavar="N", help="most tokens of a pair")
    parser.add_argument(
        "--long-document",
        choices=["truncate", "max", "first_max"],
        default="truncate",
        help="cut a passage that does not fit, or score it in windows",
    )
    parser.add_argument("--device", nargs="+", metavar="D", help="such as cuda:1; several have a worker process each")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="that of the checkpoint when not given"
    )
    parser.add_argument("--tag", default="llama-bidir", help="last column of the output")
    parser.add_argument("--write-run", metavar="FILE", help="keep the run that BM25 makes")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output, and a stopped run of other options"
    )
    parser.add_argument("--engine", choices=["local", "ray"], default="local", help="ray: actors of a Ray cluster")
    parser.add_argument("--ray-actors", type=positive_int, metavar="N", help="one a GPU (or CPU) when not given")


def run(arguments: argparse.Namespace) -> None:
    """Reranks and prints where the run is."""
    from transformers.utils import logging

    from .. import CrossEncoder
    from ..jobs.rerank import RerankJob, rerank_job, rerank_with_ray

    logging.disable_progress_bar()
    if arguments.ray_actors and arguments.engine != "ray":
        raise ValueError("--ray-actors is for --engine ray: add it, or leave --ray-actors out")
    devices = check_devices(arguments.device or [])
    job = RerankJob(
        corpus=arguments.corpus,
        queries=arguments.queries,
        output=arguments.output,
        run=arguments.run,
        depth=arguments.depth,
        batch_size=arguments.batch_size,
        max_tokens_per_batch=arguments.max_tokens_per_batch,
        tag=arguments.tag,
        write_run=arguments.write_run,
        overwrite=arguments.overwrite,
    )
    model_arguments = {
        "device": devices if len(devices) > 1 else next(iter(devices), None),
        "dtype": arguments.dtype,
        "max_length": arguments.max_length,
        "long_document": arguments.long_document,
    }
    if arguments.engine == "ray":
        result = rerank_with_ray(
            job, arguments.model, model_arguments, num_actors=arguments.ray_actors, show_progress_bar=True
        )
    else:
        cross_encoder = CrossEncoder(arguments.model, **model_arguments)
        result = rerank_job(job, cross_encoder, show_progress_bar=True)
        cross_encoder.close()
    if job.ranks.rank == 0:
        speed = f", {result.num_pairs / result.seconds:.1f} pairs/s" if result.num_pairs else ""
        by = f" by process 0 of {job.ranks.size}" if job.ranks.size > 1 else ""
        print(f"run: {result.output} ({result.num_pairs} pairs scored{by} in {result.seconds:.1f} s{speed})")


def check_devices(devices: list[str]) -> list[str]:
    """Returns names of devices; raises ValueError for one that torch does not know."""
    import torch

    for device in devices:
        try:
            torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"--device: {str(error).splitlines()[0]}") from None
    return devices

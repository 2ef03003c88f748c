"""Rerank a first-stage run, or what BM25 finds."""

import argparse

from .options import add_identical_option, add_job_options, check_job_options, do_job, positive_int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.epilog = (
        "A stopped run resumes when it is started again. For several GPUs: --device cuda:0 cuda:1, or torchrun "
        "--nproc-per-node 8 -m -- llama_bidir rerank ... (without the lone --, torchrun takes --run for its own)."
    )
    add = parser.add_argument
    add("--model", required=True, metavar="M", help="folder or Hub id of the reranker")
    add("--corpus", required=True, metavar="FILE", help="documents in BEIR's JSON Lines (.gz allowed)")
    add("--queries", required=True, metavar="FILE", help="queries in BEIR's JSON Lines (.gz allowed)")
    add("--run", metavar="FILE", help="TREC run to rerank (.gz allowed); BM25 makes one when not given")
    add("--output", required=True, metavar="FILE", help="TREC run to write")
    add("--depth", type=positive_int, default=100, metavar="N", help="documents to score per query; %(default)s")
    add(
        "--max-tokens-per-batch",
        type=positive_int,
        metavar="N",
        help="most tokens per forward pass; chosen for the device when not given",
    )
    add(
        "--long-document",
        choices=["truncate", "max", "first_max"],
        default="truncate",
        help="cut a passage that does not fit, or score it in windows",
    )
    add("--tag", default="llama-bidir", help="last column of the output")
    add("--write-run", metavar="FILE", help="keep the run that BM25 makes")
    add_identical_option(parser)
    add_job_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Reranks and prints where the run is."""
    from ..jobs.job import Job
    from ..jobs.rerank import RerankTask

    model_arguments = {**check_job_options(arguments), "long_document": arguments.long_document}
    task = RerankTask(
        corpus=arguments.corpus,
        queries=arguments.queries,
        run=arguments.run,
        depth=arguments.depth,
        tag=arguments.tag,
        write_run=arguments.write_run,
        ignore_identical_ids=arguments.ignore_identical_ids,
    )
    job = Job(
        task,
        arguments.output,
        overwrite=arguments.overwrite,
        batch_size=arguments.batch_size,
        max_tokens_per_batch=arguments.max_tokens_per_batch,
    )
    result = do_job(job, arguments, model_arguments)
    if job.ranks.rank == 0:
        speed = f", {result.num_pairs / result.seconds:.1f} pairs/s" if result.num_pairs else ""
        by = f" by process 0 of {job.ranks.size}" if job.ranks.size > 1 else ""
        print(f"run: {result.output} ({result.num_pairs} pairs scored{by} in {result.seconds:.1f} s{speed})")

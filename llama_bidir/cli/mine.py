"""Mine hard negatives for training rows, with a reranker as the teacher."""

import argparse

from .options import add_identical_option, add_job_options, check_job_options, do_job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.epilog = (
        "Each negative scores below the lowest positive of its row, by both margins. Rows are written with neg_doc, "
        "pos_score and neg_score (logits), as llama-bidir train reads them. A stopped job resumes when it is started "
        "again. For several GPUs: --device cuda:0 cuda:1, or torchrun --nproc-per-node 8 -m -- llama_bidir mine ... "
        "(without the lone --, torchrun takes --run for its own)."
    )
    add = parser.add_argument
    add("--model", required=True, metavar="M", help="the teacher: folder or Hub id of a reranker")
    add("--source", required=True, metavar="ROWS", help=".jsonl, .jsonl.gz, .json, hf://org/repo/subset or BEIR folder")
    add("--output", required=True, metavar="OUT", help=".jsonl or .jsonl.gz file")
    add("--corpus", metavar="C", help="BEIR JSON Lines that BM25 searches, or that the run is of")
    add("--run", metavar="RUN", help="TREC run of the candidates, by query_id, question_id or _id of a row")
    add("--qrels", metavar="FILE", help="a path in a BEIR folder; not needed if there is only one")
    add(
        "--candidates",
        choices=("auto", "neg_doc", "bm25", "run"),
        default="auto",
        help="auto: the run if there is one, else the neg_doc of a row, else BM25 over the corpus",
    )
    add("--depth", type=int, default=100, metavar="N", help="candidates per query; %(default)s")
    add("--num-negatives", type=int, default=7, metavar="N", help="most negatives per row; %(default)s")
    add("--absolute-margin", type=float, default=0.0, metavar="X", help="logits below the positive; %(default)s")
    add(
        "--relative-margin",
        type=float,
        default=0.95,
        metavar="X",
        help="a negative's probability (sigmoid of the score) is below this share of the positive's; %(default)s",
    )
    add("--skip-top", type=int, default=0, metavar="N", help="leave out the first N candidates; %(default)s")
    add("--max-score", type=float, metavar="X", help="highest logit of a negative")
    add("--sampling", choices=("top", "random"), default="top", help="highest scores first, or a draw; %(default)s")
    add("--seed", type=int, default=42, metavar="N", help="of the draw; %(default)s")
    add("--keep-empty", action="store_true", help="also write rows without a negative")
    add_identical_option(parser)
    add_job_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Mines and prints how many candidates were taken, and why others were not."""
    from ..jobs.mining import MiningResult, MiningTask, Selection, open_mining_job

    model_arguments = check_job_options(arguments)
    selection = Selection(
        num_negatives=arguments.num_negatives,
        absolute_margin=arguments.absolute_margin,
        relative_margin=arguments.relative_margin,
        skip_top=arguments.skip_top,
        max_score=arguments.max_score,
        sampling=arguments.sampling,
        seed=arguments.seed,
    )
    task = MiningTask(
        source=arguments.source,
        corpus=arguments.corpus,
        run=arguments.run,
        qrels=arguments.qrels,
        candidates=arguments.candidates,
        depth=arguments.depth,
        selection=selection,
        keep_empty=arguments.keep_empty,
        ignore_identical_ids=arguments.ignore_identical_ids,
    )
    job = open_mining_job(
        task, arguments.model, arguments.output, overwrite=arguments.overwrite, batch_size=arguments.batch_size
    )
    do_job(job, arguments, model_arguments)
    if job.ranks.rank == 0:
        print(MiningResult(**job.summary).format())
        print(f"rows: {arguments.output}")

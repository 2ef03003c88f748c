"""Mine hard negatives for training rows, with a reranker as the teacher."""

import argparse

from .rerank import check_devices


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.epilog = (
        "Each negative scores below the lowest positive of its row, by both margins. Rows are written with neg_doc, "
        "pos_score and neg_score (logits), as llama-bidir train reads them. A stopped job goes on when it is started "
        "again."
    )
    add = parser.add_argument
    add("--model", required=True, metavar="M", help="the teacher: folder or Hub id of a reranker")
    add("--source", required=True, metavar="ROWS", help=".jsonl, .jsonl.gz, .json, hf://org/repo/subset or BEIR folder")
    add("--output", required=True, metavar="OUT", help=".jsonl or .jsonl.gz file")
    add("--overwrite", action="store_true", help="replace OUT, and begin anew where a stopped job had other arguments")
    add("--corpus", metavar="C", help="BEIR JSON Lines that BM25 searches, or that the run is of")
    add("--run", metavar="RUN", help="TREC run of the candidates, by query_id, question_id or _id of a row")
    add("--qrels", metavar="FILE", help="of a BEIR folder, a path in it; not needed where there is one")
    add(
        "--candidates",
        choices=("auto", "neg_doc", "bm25", "run"),
        default="auto",
        help="auto: the run where there is one, else the neg_doc of a row, else BM25 over the corpus",
    )
    add("--depth", type=int, default=100, metavar="N", help="candidates a query; %(default)s")
    add("--num-negatives", type=int, default=7, metavar="N", help="most negatives a row; %(default)s")
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
    add("--batch-size", type=int, metavar="N", help="most pairs of a forward pass; by tokens when not given")
    add("--device", metavar="D", help="such as cuda:1, or several: cuda:0,cuda:1")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="that of the checkpoint when not given")
    add("--max-length", type=int, metavar="N", help="tokens of a pair; that of the checkpoint when not given")


def run(arguments: argparse.Namespace) -> None:
    """Mines and prints what became of the rows."""
    from transformers.utils import logging

    from ..jobs.mining import Selection, mine_file

    logging.disable_progress_bar()
    devices = check_devices((arguments.device or "").split(",") if arguments.device else [])
    result = mine_file(
        arguments.model,
        arguments.source,
        arguments.output,
        corpus=arguments.corpus,
        run=arguments.run,
        qrels=arguments.qrels,
        candidates=arguments.candidates,
        depth=arguments.depth,
        selection=Selection(
            num_negatives=arguments.num_negatives,
            absolute_margin=arguments.absolute_margin,
            relative_margin=arguments.relative_margin,
            skip_top=arguments.skip_top,
            max_score=arguments.max_score,
            sampling=arguments.sampling,
            seed=arguments.seed,
        ),
        keep_empty=arguments.keep_empty,
        batch_size=arguments.batch_size,
        device=devices if len(devices) > 1 else next(iter(devices), None),
        dtype=arguments.dtype,
        max_length=arguments.max_length,
        overwrite=arguments.overwrite,
    )
    print(result.format())
    print(f"rows: {arguments.output}")

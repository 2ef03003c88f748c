"""Make, fine-tune, save, reload and evaluate a small reranker, without downloads."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..options import positive_float, positive_int

if TYPE_CHECKING:
    from .steps import QuickstartResult

NUM_EXAMPLES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb."""
    parser.add_argument("--output", default="quickstart-output", metavar="DIR", help="folder for the results")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it exists")
    parser.add_argument("--model", metavar="M", help="Llama checkpoint to fine-tune; a small one is made by default")
    parser.add_argument("--train", metavar="FILE", help=".jsonl rows (query, pos_doc, neg_doc); made by default")
    parser.add_argument("--max-steps", type=positive_int, metavar="N", help="training steps; default: 900")
    parser.add_argument(
        "--learning-rate", type=positive_float, metavar="LR", help="default: 2e-3; 1e-5 suits a real Llama"
    )
    parser.add_argument("--batch-size", type=positive_int, metavar="N", help="questions per step; default: 16")


def run(arguments: argparse.Namespace) -> None:
    """Runs the quickstart and prints the results."""
    started = time.perf_counter()
    from transformers.utils import logging

    from .steps import run_quickstart

    logging.disable_progress_bar()  # for loading and saving weights; scoring and training keep theirs
    training = {
        "max_steps": arguments.max_steps,
        "learning_rate": arguments.learning_rate,
        "per_device_train_batch_size": arguments.batch_size,
    }
    result = run_quickstart(
        arguments.output,
        overwrite=arguments.overwrite,
        model=arguments.model,
        train_file=arguments.train,
        training={name: value for name, value in training.items() if value is not None},
        echo=lambda line: print(line, flush=True),
    )
    _print_result(result, Path(arguments.output), time.perf_counter() - started)


def _print_result(result: "QuickstartResult", output: Path, seconds: float) -> None:
    measures = list(next(iter(result.scores.values())))
    print(f"\n{'held-out questions':<22}" + "".join(f"{measure:>10}" for measure in measures))
    for name, scores in result.scores.items():
        print(f"{name:<22}" + "".join(f"{scores[measure]:>10.3f}" for measure in measures))
    print("\nThe best three passages of some held-out questions (* relevant):")
    test_set = result.test_set
    for query_id in list(test_set.queries)[:NUM_EXAMPLES]:
        print(f"\n{test_set.queries[query_id]}")
        for doc_id, score in sorted(result.reranked[query_id].items(), key=lambda item: -item[1])[:3]:
            mark = "*" if doc_id in test_set.qrels[query_id] else " "
            print(f"  {mark} {score:7.2f}  {test_set.corpus[doc_id]}")
    print(f"\nplot: {output / 'ndcg.png'}   reranker: {output / 'model'}   {seconds:.0f} seconds")

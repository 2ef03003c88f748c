"""Train a reranker from a recipe."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..training import CrossEncoderTrainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the verb. Those of the recipe's keys are read by [`parse_unknown`]."""
    parser.usage = "%(prog)s RECIPE [--block.key value ...] [--dry-run] [--overwrite] [--skip-bad-rows] [--debug]"
    parser.epilog = (
        "Each key of the recipe is an option, such as --training.learning_rate 1e-5, --data.train a.jsonl b.jsonl or "
        "--lora.r 8. The block may be left out if only one block has the key. For several GPUs: torchrun "
        "--nproc-per-node 8 -m llama_bidir train RECIPE. A stopped run resumes when it is started again."
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or a name that llama-bidir recipes lists")
    parser.add_argument(
        "--dry-run", action="store_true", help="only print what training would do and how much memory it needs"
    )
    parser.add_argument("--overwrite", action="store_true", help="start over and replace the run in the output folder")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out malformed rows instead of stopping")


def parse_unknown(arguments: argparse.Namespace, unknown: Sequence[str], options: Sequence[str]) -> None:
    """Reads the options of the recipe's keys into `arguments.overrides`."""
    from ..training.recipes import parse_overrides

    arguments.overrides = parse_overrides(unknown, options=options)


def run(arguments: argparse.Namespace) -> None:
    """Trains and prints where the reranker is, or prints what training would do."""
    from transformers.utils import logging

    from ..training import train
    from ..training.plan import plan
    from ..training.recipes import load_recipe

    if arguments.skip_bad_rows:
        arguments.overrides.setdefault("data", {})["skip_bad_rows"] = True
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    is_first = recipe.training.process_index == 0
    if not is_first:
        logging.disable_progress_bar()
    if arguments.dry_run:
        if is_first:
            print(plan(*recipe, overwrite=arguments.overwrite))
        return
    trainer = train(*recipe, overwrite=arguments.overwrite)
    if is_first:
        _print_result(trainer, is_adapter=recipe.lora is not None)


def _print_result(trainer: "CrossEncoderTrainer", *, is_adapter: bool) -> None:
    evaluations = [entry for entry in trainer.state.log_history if any(name.startswith("eval_") for name in entry)]
    if evaluations:
        last = {name: value for name, value in evaluations[-1].items() if name.startswith("eval_")}
        measures = (
            f"{name.removeprefix('eval_')} {value:.4f}"
            for name, value in last.items()
            if name.endswith(("loss", "@1", "@10"))
        )
        print(f"evaluation at step {evaluations[-1]['step']}: {', '.join(measures)}")
    output = trainer.args.output_dir
    print(f"{'adapter' if is_adapter else 'reranker'}: {output}")
    if is_adapter:
        print(f"to make it a plain checkpoint: llama-bidir merge --adapter {output} --output {output}-merged")

"""Types and options that several verbs share."""

import argparse
import math
import os
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

from ..utils.errors import naming

if TYPE_CHECKING:
    from ..jobs.job import Job, JobResult

DTYPES = ("float32", "bfloat16", "float16", "int8")


def say(*lines: str) -> None:
    """
    Prints the result of finished work. It is not an error if nobody reads all lines, as behind `| head -1`.

    Raises:
        OSError: standard output cannot be written, for example because the disk is full.
    """
    try:
        with naming("standard output"):
            print(*lines, sep="\n", flush=True)
    except BrokenPipeError:
        # Otherwise Python would try to write the rest when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def positive_int(text: str) -> int:
    """Reads an int above 0."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def positive_float(text: str) -> float:
    """Reads a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def add_identical_option(parser: argparse.ArgumentParser) -> None:
    """Declares the option that keeps or leaves out documents that are the query itself."""
    parser.add_argument(
        "--ignore-identical-ids",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave out documents that are the query itself, as in ArguAna and Quora; the default",
    )


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Declares where and how a job scores pairs."""
    add = parser.add_argument
    add("--overwrite", action="store_true", help="replace the output, and drop a stopped job with different options")
    add(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="most pairs per forward pass; limited by tokens alone when not given",
    )
    add("--max-length", type=positive_int, metavar="N", help="most tokens per pair; the checkpoint's when not given")
    add("--instruction", metavar="TEXT", help="for the {instruction} of the template; the checkpoint's when not given")
    add("--device", nargs="+", metavar="D", help="such as cuda:1; several get one worker process each: cuda:0 cuda:1")
    add("--dtype", choices=DTYPES, help="the checkpoint's when not given")
    add("--engine", choices=["local", "ray"], default="local", help="ray: actors of a Ray cluster")
    add("--ray-actors", type=positive_int, metavar="N", help="one per GPU when not given, or one per CPU without GPUs")


def check_job_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """
    Returns the arguments of the CrossEncoder that the options of a job name.

    Raises:
        ValueError: an option breaks its rule.
    """
    if arguments.ray_actors and arguments.engine != "ray":
        raise ValueError("--ray-actors is for --engine ray: add it, or leave out --ray-actors")
    return {
        "device": read_devices(arguments.device),
        "dtype": arguments.dtype,
        "max_length": arguments.max_length,
        "instruction": arguments.instruction,
    }


def do_job(job: "Job", arguments: argparse.Namespace, model_arguments: dict[str, Any]) -> "JobResult":
    """Does a job with the engine that the options name, and shows its progress."""
    from transformers.utils import logging

    from .. import CrossEncoder
    from ..jobs.job import run_job
    from ..jobs.ray import run_with_ray

    logging.disable_progress_bar()
    if arguments.engine == "ray":
        return run_with_ray(
            job, arguments.model, model_arguments, num_actors=arguments.ray_actors, show_progress_bar=True
        )
    with closing(CrossEncoder(arguments.model, **model_arguments)) as cross_encoder:
        return run_job(job, cross_encoder, show_progress_bar=True)


def read_devices(values: list[str] | None) -> str | list[str] | None:
    """
    Returns what `--device` names: one device, or a list of several. `a b` and `a,b` are the same.

    Raises:
        ValueError: torch does not know one of them.
    """
    from ..scoring.device import split_devices

    if not values:
        return None
    try:
        names = split_devices([name for value in values for name in value.split(",")]).workers
    except ValueError as error:
        raise ValueError(f"--device: {str(error).splitlines()[0]}") from None
    return names if len(names) > 1 else names[0]

"""
The command line: one module per verb.

A verb declares `add_arguments(parser)` and `run(arguments)`. A verb with options beyond those of its parser declares
`parse_unknown(arguments, unknown, options)`, which reads them; other verbs refuse what they do not know.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from .. import __version__
from ..utils.errors import InputTypeError, ScoreError
from ..utils.launch import check_launch, launch_number, leave_process_group
from ..utils.names import nearest
from . import calibrate, evaluate, export, merge, mine, quantize, quickstart, recipes, rerank, serve, train

VERBS = {
    "quickstart": quickstart,
    "recipes": recipes,
    "train": train,
    "rerank": rerank,
    "evaluate": evaluate,
    "mine": mine,
    "export": export,
    "merge": merge,
    "quantize": quantize,
    "calibrate": calibrate,
    "serve": serve,
}
BAD_INPUT = (ValueError, InputTypeError, ImportError, FileNotFoundError, FileExistsError, NotADirectoryError)

INTERRUPTED = 130  # the exit status that a shell reports after SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs `llama-bidir`.

    Returns:
        0 when done, 1 when the work failed, 2 for bad arguments or input, 130 when interrupted. An error is one line on
        standard error.
    """
    arguments, unknown, options = parse(argv)
    verb = VERBS[arguments.verb]
    signals = _raise_at_signals()
    try:
        check_launch()
    except ValueError as error:
        print(f"llama-bidir: error: {error}", file=sys.stderr)
        return 2
    rank = launch_number("RANK", 0)
    logging.basicConfig(level=logging.ERROR if rank else logging.WARNING, format="%(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    try:
        if hasattr(verb, "parse_unknown"):
            verb.parse_unknown(arguments, unknown, options)
        with _quiet_threads(signals):
            verb.run(arguments)
        leave_process_group()
    except (KeyboardInterrupt, Exception) as error:
        # A signal also ends worker processes, so an error about them may arrive instead of the interrupt.
        if signals or isinstance(error, KeyboardInterrupt):
            if rank == 0:
                tqdm.write("interrupted", file=sys.stderr)
            return INTERRUPTED
        if arguments.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        tqdm.write(f"llama-bidir: error{f' (process {rank})' if rank else ''}: {message}", file=sys.stderr)
        # transformers raises an OSError without a number of the system for a checkpoint that is not there.
        is_input = isinstance(error, BAD_INPUT) or (isinstance(error, OSError) and error.errno is None)
        return 2 if is_input and not isinstance(error, ScoreError) else 1
    return 0


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str], list[str]]:
    """
    Parses a command line, and exits with status 2 if it is wrong.

    Returns:
        the arguments, what remains for `parse_unknown` of the verb, and the options of the verb.
    """
    parser = argparse.ArgumentParser(prog="llama-bidir", description="Bidirectional Llama rerankers.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb_parsers = {}
    for name, verb in VERBS.items():
        summary = (verb.__doc__ or "").strip().splitlines()[0]
        verb_parser = verb_parsers[name] = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        verb_parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        verb.add_arguments(verb_parser)
    arguments, unknown = parser.parse_known_args(argv)
    verb_parser = verb_parsers[arguments.verb]
    options = [option for action in verb_parser._actions for option in action.option_strings]
    if unknown and not hasattr(VERBS[arguments.verb], "parse_unknown"):
        suggestion = nearest(unknown[0], options)
        verb_parser.error(f"unknown option {unknown[0]!r}; the nearest is {suggestion!r}")
    return arguments, unknown, options


def _raise_at_signals() -> list[int]:
    """
    Makes SIGTERM raise KeyboardInterrupt, as SIGINT does, so that the command can clean up.

    Returns:
        a list. Each of these signals is added to it when it arrives.
    """
    signals: list[int] = []
    process = os.getpid()

    def interrupt(number: int, frame: Any) -> None:
        if number == signal.SIGINT and os.getpid() != process:
            return  # a terminal also interrupts forked workers, but the parent ends them
        # torchrun forwards a signal that a terminal has already sent to all processes, so it may arrive twice.
        if not signals or number in signals:
            signals.append(number)
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell ignores SIGINT for commands in the background
        signal.signal(signal.SIGINT, interrupt)
    return signals


@contextmanager
def _quiet_threads(signals: Sequence[int]) -> Iterator[None]:
    """
    Reports errors of threads only in this process and before a signal: forked data-loading workers serve tensors from a
    thread, which fails when the command ends before they do.
    """
    process, report = os.getpid(), sys.excepthook

    def excepthook(*error: Any) -> None:
        if os.getpid() == process and not signals:
            report(*error)

    sys.excepthook = excepthook
    try:
        yield
    finally:
        sys.excepthook = report

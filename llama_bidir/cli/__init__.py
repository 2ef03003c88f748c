"""
The command line: one module a verb.

A verb declares `add_arguments(parser)` and `run(arguments)`. One that has options beyond those of its parser declares
`parse_unknown(arguments, unknown, options)`, which reads them; other verbs refuse what they do not know.
"""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence

from .. import __version__
from ..utils.errors import InputTypeError, ScoreError
from ..utils.names import nearest
from . import evaluate, export, merge, mine, quickstart, recipes, rerank, train

VERBS = {
    "quickstart": quickstart,
    "recipes": recipes,
    "train": train,
    "rerank": rerank,
    "evaluate": evaluate,
    "mine": mine,
    "export": export,
    "merge": merge,
}
BAD_INPUT = (ValueError, InputTypeError, ImportError, FileNotFoundError, FileExistsError, NotADirectoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs `llama-bidir`.

    Returns:
        0 when done, 1 when the work failed, 2 for bad arguments or input; an error is one line on standard error.
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
    verb, verb_parser = VERBS[arguments.verb], verb_parsers[arguments.verb]
    options = [option for action in verb_parser._actions for option in action.option_strings]
    if unknown and not hasattr(verb, "parse_unknown"):
        suggestion = nearest(unknown[0], options)
        verb_parser.error(f"unknown option {unknown[0]!r}; the nearest is {suggestion!r}")
    # Like an interrupt, so that nothing half-made is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rank = int(os.environ.get("RANK", 0))  # of this process, under torchrun and accelerate
    logging.basicConfig(level=logging.ERROR if rank else logging.WARNING, format="%(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    try:
        if hasattr(verb, "parse_unknown"):
            verb.parse_unknown(arguments, unknown, options)
        verb.run(arguments)
    except KeyboardInterrupt:
        if rank == 0:
            print("interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"llama-bidir: error{f' (process {rank})' if rank else ''}: {message}", file=sys.stderr)
        # transformers raises an OSError without a number of the system for a checkpoint that is not there.
        is_input = isinstance(error, BAD_INPUT) or (isinstance(error, OSError) and error.errno is None)
        return 2 if is_input and not isinstance(error, ScoreError) else 1
    return 0

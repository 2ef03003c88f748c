"""The command line: one module a verb."""

import argparse
import logging
import sys
from collections.abc import Sequence

from .. import __version__
from . import quickstart

VERBS = {"quickstart": quickstart}
BAD_INPUT = (ValueError, TypeError, ImportError, FileNotFoundError, FileExistsError, NotADirectoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs `llama-bidir`.

    Returns:
        0 when done, 1 when the work failed, 2 for bad arguments or input; an error is one line on standard error.
    """
    parser = argparse.ArgumentParser(prog="llama-bidir", description="Bidirectional Llama rerankers.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        summary = (verb.__doc__ or "").strip().splitlines()[0]
        verb_parser = verbs.add_parser(name, help=summary, description=summary)
        verb_parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        verb.add_arguments(verb_parser)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        VERBS[arguments.verb].run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        print(f"llama-bidir: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2 if isinstance(error, BAD_INPUT) else 1
    return 0

"""The command line: one module a verb."""

import argparse
import difflib
import logging
import signal
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
    verb_parsers = {}
    for name, verb in VERBS.items():
        summary = (verb.__doc__ or "").strip().splitlines()[0]
        verb_parser = verb_parsers[name] = verbs.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        verb_parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        verb.add_arguments(verb_parser)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        verb_parser = verb_parsers[arguments.verb]
        options = [option for action in verb_parser._actions for option in action.option_strings]
        nearest = difflib.get_close_matches(unknown[0], options, n=1, cutoff=0.0)[0]
        verb_parser.error(f"unknown option {unknown[0]!r}; the nearest is {nearest!r}")
    # Like an interrupt, so that nothing half-made is left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
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

"""Runs the targets and prints a table: `python -m tests.fuzz --help`."""

import argparse
import logging
import sys
import time
import traceback
import warnings

from llama_bidir.utils.tables import format_table

from .target import run_target
from .targets import TARGETS


def main() -> int:
    """Returns 1 if a property does not hold for some input, which is printed after hypothesis has shrunk it."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random input for every entry point.")
    parser.add_argument("--cases", type=int, default=50_000, metavar="N", help="of all targets; %(default)s")
    parser.add_argument("--minutes", type=float, metavar="M", help="start no more cases after this time")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="targets whose names contain one of these")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another one draws other cases; %(default)s")
    arguments = parser.parse_args()
    targets = [
        target for target in TARGETS if not arguments.only or any(name in target.name for name in arguments.only)
    ]
    if not targets:
        parser.error(f"no target has such a name; the targets are {', '.join(each.name for each in TARGETS)}")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    end = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    total = sum(target.weight for target in targets)
    rows = [("target", "cases", "seconds", "slowest (s)", "failures")]
    num_cases = num_failures = 0
    for target in targets:
        cases = -int(-arguments.cases * target.weight // total)
        outcome = run_target(target, cases, first_seed=arguments.seed, end=end)
        num_cases += outcome.cases
        num_failures += outcome.failure is not None
        failed = str(int(outcome.failure is not None))
        rows.append((target.name, f"{outcome.cases:,}", f"{outcome.seconds:.1f}", f"{outcome.slowest:.2f}", failed))
        sys.stderr.write("  ".join(rows[-1]) + "\n")
        if outcome.failure is not None:
            traceback.print_exception(outcome.failure, limit=-8, chain=False)
    rows.append(("all", f"{num_cases:,}", f"{sum(float(row[2]) for row in rows[1:]):.1f}", "", str(num_failures)))
    sys.stdout.write("\n".join(format_table(rows, "<>>>>")) + "\n")
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())

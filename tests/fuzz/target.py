"""A target, how it is run, and what its checks have in common."""

import atexit
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

# Cases of a round, after which a run looks at the clock.
ROUND = 250
# A case that takes longer counts as a hang.
HANG_SECONDS = 60


class Target(NamedTuple):
    """
    An entry point and a property that holds for any input.

    Args:
        name: the name in the table and of the test.
        check: called with what the strategies draw; raises an exception if the property does not hold.
        strategies: by argument of `check`.
        weight: the share of the cases of a run, relative to the other targets. A slow target has a small one.
        test_cases: cases in the test suite.
    """

    name: str
    check: Callable[..., None]
    strategies: dict[str, st.SearchStrategy[Any]]
    weight: float = 1.0
    test_cases: int = 100


class Outcome(NamedTuple):
    """Cases that were run, their seconds, those of the slowest case, and the failure, if there was one."""

    cases: int
    seconds: float
    slowest: float
    failure: BaseException | None


def run_target(target: Target, cases: int, *, first_seed: int | None = None, end: float | None = None) -> Outcome:
    """
    Runs cases of a target until one fails.

    Args:
        target: what to run.
        cases: how many; those that shrink a failure are not counted.
        first_seed: of the draws; None draws the same cases each time.
        end: the time of `time.monotonic` after which no further round starts.
    """
    started, slowest, done = time.monotonic(), 0.0, 0

    def case(drawn: dict[str, Any]) -> None:
        nonlocal slowest, done
        done += 1
        start = time.perf_counter()
        with hangs_raise():
            target.check(**drawn)
        slowest = max(slowest, time.perf_counter() - start)

    case.__name__ = target.check.__name__
    for number in count():
        left = cases - done
        if left <= 0 or (end is not None and time.monotonic() >= end):
            return Outcome(done, time.monotonic() - started, slowest, None)
        before = done
        test = given(st.fixed_dictionaries(target.strategies))(case)
        test = settings(
            max_examples=left if first_seed is None else min(left, ROUND),
            deadline=None,
            database=None,
            derandomize=first_seed is None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],  # the others trace every line, which is slow
        )(test)
        test = test if first_seed is None else seed(f"{first_seed} {number}")(test)
        try:
            test()
        except (Exception, HangError) as failure:
            return Outcome(min(cases, done), time.monotonic() - started, slowest, failure)
        if first_seed is None or done == before:
            return Outcome(done, time.monotonic() - started, slowest, None)
    raise AssertionError


class HangError(BaseException):
    """A case took too long. It is not an Exception, so no handler of the code under test swallows it."""


@contextmanager
def hangs_raise(seconds: int = HANG_SECONDS) -> Iterator[None]:
    """Makes a case that runs longer fail with the place where it is."""

    def stop(number: int, frame: Any) -> None:
        raise HangError(f"a case took more than {seconds} seconds")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


@cache
def workspace() -> Path:
    """A folder for files of the targets, removed at exit."""
    folder = tempfile.mkdtemp(prefix="llama-bidir-fuzz-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def new_folder(name: str) -> Path:
    """Makes an empty folder in the workspace in place of a former one of that name."""
    folder = workspace() / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Exception | None]:
    """Returns the result and None, or None and the ValueError, TypeError or OSError; any other exception passes."""
    try:
        return function(*args, **kwargs), None
    except (ValueError, TypeError, OSError) as error:
        return None, error
    except RecursionError:
        pass
    raise AssertionError("RecursionError")  # here, because hypothesis follows the thousand causes that it may have


def check_message(error: Exception, *parts: object) -> None:
    """Checks that an error is one of the package's own and that its message holds the parts."""
    message = str(error)
    assert message, f"{type(error).__name__} without a message"
    for part in parts:
        assert str(part) in message, f"{type(error).__name__} does not name {str(part)!r}: {message!r}"

"""Makes scoring work in a forked process, which must not use its parent's locks, workers and OpenMP threads."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol
from weakref import WeakSet

import torch


class AfterFork(Protocol):
    """An object that must change in a forked process."""

    def after_fork(self) -> None:
        """Runs in the new process, before anything else."""


_registered: "WeakSet[AfterFork]" = WeakSet()
_is_forked = False
_num_threads: int | None = None


def register(changes: AfterFork) -> None:
    """Calls `after_fork` of an object in every process that is forked while the object exists."""
    _registered.add(changes)


class Lock:
    """
    A lock that is free in a forked process, even if a thread of the parent holds it: this thread does not exist in the
    forked process and could not release the lock. The lock is reentrant.
    """

    def __init__(self) -> None:
        self.after_fork()
        register(self)

    def after_fork(self) -> None:
        self._lock = threading.RLock()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Holds the lock until the context closes."""
        with self._lock:
            yield


def leave_threads_of_parent() -> None:
    """
    In a forked process, makes the calling thread compute on one core from now on. Otherwise, OpenMP would wait forever
    for threads that exist only in the parent. Threads that start later can use several cores.
    """
    global _num_threads
    if _is_forked and torch.get_num_threads() > 1:
        _num_threads = torch.get_num_threads()
        torch.set_num_threads(1)


def scoring_threads() -> int:
    """Returns the number of torch's threads for scoring. [`leave_threads_of_parent`] does not change it."""
    return _num_threads or torch.get_num_threads()


def _start_anew() -> None:
    global _is_forked
    _is_forked = True
    for changes in list(_registered):
        changes.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)

"""What a forked process must not take over from its parent: held locks, worker processes and OpenMP's threads."""

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
        """Called in the new process, before anything else runs there."""


_registered: "WeakSet[AfterFork]" = WeakSet()
_is_forked = False
_num_threads: int | None = None


def register(changes: AfterFork) -> None:
    """Has an object change in every process that is forked while the object lives."""
    _registered.add(changes)


class Lock:
    """
    A lock that is free in a forked process, whoever holds it in the parent: the thread that would release it does not
    exist there. The thread that holds it may take it again.
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
    In a forked process, lets the calling thread compute without help from now on. Its OpenMP would wait forever for the
    threads that only the parent has. Threads that are started later can have helpers.
    """
    global _num_threads
    if _is_forked and torch.get_num_threads() > 1:
        _num_threads = torch.get_num_threads()
        torch.set_num_threads(1)


def scoring_threads() -> int:
    """The number of torch's threads for scoring, which [`leave_threads_of_parent`] does not change."""
    return _num_threads or torch.get_num_threads()


def _start_anew() -> None:
    global _is_forked
    _is_forked = True
    for changes in list(_registered):
        changes.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)

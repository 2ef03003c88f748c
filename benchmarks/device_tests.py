"""Runs the package's tests for a device, and records the outcome of each by name."""

from pathlib import Path
from typing import Any

import pytest

from .cells import Cells
from .machine import Deadline

ROOT = Path(__file__).parents[1]


class Recorder:
    """
    A plugin of pytest that writes each outcome into a file immediately.

    Args:
        cells: the file, in which a cell is the name of a test.
        deadline: no test starts after it.
    """

    def __init__(self, cells: Cells, deadline: Deadline):
        self.cells, self.deadline = cells, deadline
        self.passed = () if cells.again else {row["name"] for row in cells.rows if row["outcome"] == "passed"}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leaves out the tests that have passed before."""
        done = [item for item in items if item.nodeid in self.passed]
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item.nodeid not in self.passed]

    def pytest_collectreport(self, report: Any) -> None:
        """Records a file that cannot be imported as failed."""
        if report.failed:
            self._record(report.nodeid, "failed", 0.0, report.longreprtext)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Records a test once it has passed, has failed or is skipped."""
        if report.when == "call" or not report.passed:
            reason = report.longrepr[2] if report.skipped else report.longreprtext
            self._record(report.nodeid, report.outcome, report.duration, reason)

    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Stops at the deadline. True tells pytest not to run the test."""
        if not self.deadline.is_over():
            return None
        item.session.shouldstop = "the time of this run is over"
        return True

    def _record(self, name: str, outcome: str, seconds: float, reason: str) -> None:
        lines = reason.strip().splitlines()
        row = {"name": name, "outcome": outcome, "seconds": seconds, "reason": lines[-1] if lines else None}
        self.cells.add([row])


def run_device_tests(cells: Cells, deadline: Deadline) -> None:
    """Runs the tests with the marker `gpu` that have not passed before, and prints how many had which outcome."""
    arguments = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    recorder = Recorder(cells, deadline)
    pytest.main([*arguments, "--rootdir", str(ROOT), str(ROOT / "tests")], plugins=[recorder])
    outcomes = [row["outcome"] for row in cells.rows]
    print(", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped")))

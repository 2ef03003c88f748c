"""A file of measurements that a stopped run resumes: each measured cell is written immediately."""

import json
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Cells:
    """
    The rows of a JSON file, by cell. A cell is what is measured once, such as a model and a workload.

    The file has three lists: `machines`, the rows under the name of the section, and `skipped` with the reason of each
    cell that could not be measured. A row has the fields of its cell, the name of the hardware, the date, and in
    `machine` the index of the entry with the versions and the card.

    Args:
        path: the file. It is created with the first cell.
        section: the name of the list of rows.
        machine: the description of this machine (see [`~machine.describe_machine`]).
        key: the fields that identify a cell.
        by_hardware: a row of other hardware is another cell.
        again: measure all cells again.
        retry: measure the cells that were skipped.
    """

    def __init__(
        self,
        path: Path,
        section: str,
        machine: Mapping[str, Any],
        key: Iterable[str],
        *,
        by_hardware: bool = True,
        again: bool = False,
        retry: bool = False,
    ):
        self.path, self.section = path, section
        self.key = ("hardware", *key) if by_hardware else tuple(key)
        self.again, self.retry = again, retry
        self.hardware = machine["hardware"]
        self.results: dict[str, list[Row]] = {"machines": [], section: [], "skipped": []}
        if path.exists():
            self.results |= json.loads(path.read_text(encoding="utf-8"))
        # A machine with the same versions and card is the same entry, whatever the date of the first run.
        known = [{**entry, "date": None} for entry in self.results["machines"]]
        current = {**machine, "date": None}
        if current not in known:
            self.results["machines"].append(dict(machine))
            known.append(current)
        self.machine = known.index(current)

    @property
    def rows(self) -> list[Row]:
        """The rows of this hardware."""
        return [row for row in self.results[self.section] if row["hardware"] == self.hardware]

    def is_missing(self, **cell: Any) -> bool:
        """Returns whether a cell is to be measured on this hardware."""
        done = self.results[self.section] + ([] if self.retry else self.results["skipped"])
        return self.again or self._cell(cell) not in map(self._cell, done)

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows, in place of those of the same cells, and writes the file. A row that was in it keeps its date."""
        fields = {"hardware": self.hardware, "machine": self.machine, "date": datetime.now(UTC).isoformat()}
        added = [{**fields, **row} for row in rows]
        for row in added:
            self._remove(row)
        self.results[self.section] += added
        self._write()

    def skip(self, reason: str, **cell: Any) -> None:
        """Records why a cell could not be measured, prints it, and writes the file. Rows that were measured stay."""
        entry = {"hardware": self.hardware, "machine": self.machine, **cell, "reason": reason}
        print(f"{', '.join(map(str, cell.values()))}: skipped: {reason}", flush=True)
        self.results["skipped"] = [row for row in self.results["skipped"] if self._cell(row) != self._cell(entry)]
        self.results["skipped"].append(entry)
        self._write()

    def _remove(self, added: Row) -> None:
        for name in (self.section, "skipped"):
            self.results[name] = [row for row in self.results[name] if self._cell(row) != self._cell(added)]

    def _cell(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple({"hardware": self.hardware, **row}.get(name) for name in self.key)

    def _write(self) -> None:
        # A stop in the middle of writing leaves the old file whole.
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

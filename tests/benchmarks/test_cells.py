"""The file of cells, from which a stopped run resumes, and the tests that are recorded in one."""

import json

import pytest

from benchmarks.cells import Cells
from benchmarks.device_tests import Recorder
from benchmarks.machine import Deadline

CARD = {"hardware": "card", "date": "2026-01-01", "versions": {"torch": "2"}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cells.json"


def cells(path, machine=CARD, **options):
    return Cells(path, "speed", machine, ["model", "workload"], **options)


def test_a_cell_is_written_immediately_and_not_measured_again(path):
    first = cells(path)
    assert first.is_missing(model="1b", workload="nq")
    first.add([{"model": "1b", "workload": "nq", "seconds": 2.0}])
    resumed = cells(path, {**CARD, "date": "2026-01-02"})
    assert not resumed.is_missing(model="1b", workload="nq")
    assert resumed.is_missing(model="1b", workload="long")
    resumed.add([{"model": "1b", "workload": "long", "seconds": 3.0}])
    results = json.loads(path.read_text())
    dates = [row.pop("date") for row in results["speed"]]
    assert results == {
        "machines": [CARD],
        "speed": [
            {"hardware": "card", "machine": 0, "model": "1b", "workload": "nq", "seconds": 2.0},
            {"hardware": "card", "machine": 0, "model": "1b", "workload": "long", "seconds": 3.0},
        ],
        "skipped": [],
    }
    resumed.add(resumed.rows)
    assert [row["date"] for row in cells(path).rows] == dates
    assert cells(path, again=True).is_missing(model="1b", workload="nq")


def test_another_card_has_cells_of_its_own(path):
    cells(path).add([{"model": "1b", "workload": "nq", "seconds": 2.0}])
    other = cells(path, {**CARD, "hardware": "other card"})
    assert other.is_missing(model="1b", workload="nq")
    other.add([{"model": "1b", "workload": "nq", "seconds": 1.0}])
    assert [row["seconds"] for row in other.rows] == [1.0]
    assert [row["seconds"] for row in cells(path).rows] == [2.0]


def test_rows_of_other_versions_name_them(path):
    cells(path).add([{"model": "1b", "workload": "nq"}])
    newer = {**CARD, "versions": {"torch": "3"}}
    cells(path, newer).add([{"model": "1b", "workload": "long"}])
    results = json.loads(path.read_text())
    assert [results["machines"][row["machine"]]["versions"]["torch"] for row in results["speed"]] == ["2", "3"]


def test_a_skipped_cell_has_a_reason_until_it_is_measured(path):
    cells(path).skip("no vLLM", model="1b", workload="nq")
    assert not cells(path).is_missing(model="1b", workload="nq")
    retried = cells(path, retry=True)
    assert [row["reason"] for row in retried.results["skipped"]] == ["no vLLM"]
    assert retried.is_missing(model="1b", workload="nq")
    retried.add([{"model": "1b", "workload": "nq", "seconds": 2.0}])
    retried.add([{"model": "1b", "workload": "nq", "seconds": 1.0}])
    assert retried.results["skipped"] == []
    assert [row["seconds"] for row in retried.rows] == [1.0]


def test_a_run_of_tests_is_recorded_by_name_and_resumes(path, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "from pathlib import Path\n"
        "calls = Path(__file__).with_name('calls')\n"
        "def test_good():\n"
        "    calls.write_text(calls.read_text() + '.' if calls.exists() else '.')\n"
        "def test_bad():\n"
        "    assert 1 == 2, 'one is not two'\n"
        "@pytest.mark.skip(reason='needs another card')\n"
        "def test_skipped(): pass\n"
    )
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    for _ in range(2):
        recorded = Cells(path, "tests", CARD, ["name"])
        arguments = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--rootdir", str(tmp_path)]
        pytest.main([*arguments, "-c", "/dev/null", str(tmp_path)], plugins=[Recorder(recorded, Deadline(0))])
    rows = {row["name"]: row for row in json.loads(path.read_text())["tests"]}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "test_broken.py": "failed",
        "test_some.py::test_good": "passed",
        "test_some.py::test_bad": "failed",
        "test_some.py::test_skipped": "skipped",
    }
    assert rows["test_some.py::test_skipped"]["reason"] == "Skipped: needs another card"
    assert "No module named 'no_such_module'" in rows["test_broken.py"]["reason"]
    assert (tmp_path / "calls").read_text() == "."


def test_no_test_starts_after_the_deadline(path, tmp_path, capsys):
    (tmp_path / "test_late.py").write_text("def test_late(): pass\n")
    recorded = Cells(path, "tests", CARD, ["name"])
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", "/dev/null", str(tmp_path)]
    pytest.main(arguments, plugins=[Recorder(recorded, Deadline(-1))])
    assert recorded.rows == []
    assert "run the same command again" in capsys.readouterr().out

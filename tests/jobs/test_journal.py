"""The state of a job on disk: what a kill leaves, and whom a lock keeps out."""

import os
import signal
import sys

import pytest
from helpers import names

from llama_bidir.jobs.journal import Journal, StateFile

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")


def in_killed_process(work):
    """Calls a function in a process of its own, which is then killed without any cleanup."""
    child = os.fork()
    if not child:
        work()
        os.kill(os.getpid(), signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_a_kill_within_a_transaction_loses_that_transaction_alone(tmp_path):
    path = tmp_path / "out.partial"

    def work():
        state = StateFile(path, "rerank")
        state.append(0, b"first" * 1000)
        # Changed pages are written to the file before the transaction ends.
        state._database.execute("PRAGMA cache_size = 1")
        state._database.execute("BEGIN")
        state._database.execute("UPDATE windows SET record = zeroblob(5000)")
        for number in range(1, 200):
            state.append(number, b"lost" * 1000)

    in_killed_process(work)
    assert names(tmp_path) == ["out.partial", "out.partial-journal"]
    state = StateFile(path, "rerank")
    assert list(state.records()) == [(0, b"first" * 1000)]
    state.close()
    assert names(tmp_path) == ["out.partial"]


def test_a_journal_is_removed_with_what_a_kill_left_beside_it(tmp_path):
    def work():
        state = StateFile(tmp_path / "out.partial-1", "rerank")
        state._database.execute("PRAGMA cache_size = 1")
        state._database.execute("BEGIN")
        for number in range(200):
            state.append(number, b"lost" * 1000)

    in_killed_process(work)
    assert names(tmp_path) == ["out.partial-1", "out.partial-1-journal"]
    journal = Journal(tmp_path / "out", "rerank")
    journal.start({"depth": 1}, {}, overwrite=False)
    assert names(tmp_path) == ["out.partial"]
    journal.remove()
    assert names(tmp_path) == []


def test_a_process_that_still_writes_is_not_disturbed(tmp_path):
    journal, straggler = Journal(tmp_path / "out", "rerank"), Journal(tmp_path / "out", "rerank", rank=1)
    journal.start({"depth": 1}, {}, overwrite=False)
    straggler.own.append(3, b"")
    journal.close()  # killed, while the other process goes on
    with pytest.raises(RuntimeError, match=r"out\.partial-1: another process is at work on this output"):
        journal.start({"depth": 1}, {}, overwrite=False)
    journal.close()
    straggler.close()
    journal.start({"depth": 1}, {}, overwrite=False)
    assert journal.done() == {3}


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_records_of_several_processes_are_in_order_and_complete(tmp_path):
    ranks = [Journal(tmp_path / "out", "rerank", rank=rank) for rank in range(3)]
    ranks[0].start({}, {}, overwrite=False)
    for number, rank in ((4, 1), (0, 0), (3, 1), (1, 2), (2, 1)):
        ranks[rank].own.append(number, b"%d" % number)
    for journal in ranks[1:]:
        journal.close()
    assert list(ranks[0].records(5)) == [b"0", b"1", b"2", b"3", b"4"]
    with pytest.raises(RuntimeError, match=r"out\.partial: window 5 is missing"):
        list(ranks[0].records(6))
    ranks[0].close()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("UPDATE notes SET value = '{' WHERE name = 'arguments'", "the note 'arguments' is not JSON"),
        ("UPDATE notes SET value = NULL WHERE name = 'settings'", "the note 'settings' is not JSON"),
        ("UPDATE notes SET value = '[]' WHERE name = 'settings'", "its arguments and settings are not objects of JSON"),
        ("UPDATE windows SET record = 7", "the record of window 0 is not bytes"),
        ("DROP TABLE windows", "no such table: windows"),
    ],
)
def test_damaged_content_is_named(tmp_path, change, reason):
    journal = Journal(tmp_path / "out", "rerank")
    journal.start({"depth": 1}, {}, overwrite=False)
    journal.own.append(0, b"record")
    journal.own._database.execute(change)
    journal.close()

    def resume():
        journal.start({"depth": 1}, {}, overwrite=False)
        list(journal.records(1))

    with pytest.raises(ValueError, match=rf"out\.partial: the journal is damaged: {reason}; remove it to start over$"):
        resume()
    journal.close()


def test_damaged_pages_are_named(tmp_path):
    journal = Journal(tmp_path / "out", "rerank")
    journal.start({"depth": 1}, {}, overwrite=False)
    journal.own.append(0, b"record")
    (page,) = journal.own._database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'windows'").fetchone()
    journal.close()
    with journal.path.open("r+b") as file:
        file.seek(4096 * (page - 1))
        file.write(b"\xff" * 4096)
    message = r"out\.partial: the journal is damaged: database disk image is malformed; remove it to start over$"
    with pytest.raises(ValueError, match=message):
        journal.start({"depth": 1}, {}, overwrite=False)
    journal.close()


def test_a_damaged_header_is_named(tmp_path):
    journal = Journal(tmp_path / "out", "rerank")
    journal.start({"depth": 1}, {}, overwrite=False)
    journal.close()
    with journal.path.open("r+b") as file:
        file.seek(18)
        file.write(b"\x02\x02")  # a write-ahead log, which SQLite cannot open without locks
    with pytest.raises(ValueError, match=r"out\.partial: is not a journal of rerank: move it away"):
        journal.start({"depth": 1}, {}, overwrite=False)

"""Mining that is killed resumes to the same bytes, alone and under torchrun."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import count_windows, lines, names, write

pytest.importorskip("datasets")

from llama_bidir.jobs.journal import StateFile
from llama_bidir.jobs.mining import MiningTask, Selection, mine_file

SCRIPT = Path(__file__).parents[1] / "mine_tiny.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
WORDS = ["bees", "hive", "clover", "sun", "Paris", "France", "Seine", "garden", "flowers", "white"]
ROWS = [
    {
        "id": number,
        "query": f"where is the {word}?",
        "pos_doc": f"The {word} is here.",
        "neg_doc": [f"The {other} is not {word}." for other in WORDS if other != word],
    }
    for number, word in enumerate(WORDS)
]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(*arguments, launcher=(sys.executable,)):
    """Mines in a process of its own, or in two under torchrun."""
    return subprocess.Popen(
        [*launcher, str(SCRIPT), *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process):
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return error


@pytest.fixture
def long_source(tmp_path):
    rows = [{**row, "id": f"{number} {row['id']}"} for number in range(12) for row in ROWS]
    return write(tmp_path / "rows.jsonl", lines(*rows))


@pytest.mark.slow
def test_a_killed_job_resumes_to_the_same_bytes(long_source, tmp_path, reranker_checkpoint):
    whole, output = tmp_path / "whole.jsonl.gz", tmp_path / "killed.jsonl.gz"
    finish(start(reranker_checkpoint, long_source, whole))
    seed = int.from_bytes(os.urandom(4))
    draw = random.Random(seed)
    journal = tmp_path / "killed.jsonl.gz.partial"
    for num_windows in sorted(draw.sample(range(1, 55), 3)):
        process = start(reranker_checkpoint, long_source, output, 0.02)
        while process.poll() is None and count_windows(journal) < num_windows:
            time.sleep(draw.random() / 100)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL, seed
        assert not output.exists()
    assert "pairs are scored" in finish(start(reranker_checkpoint, long_source, output))
    assert output.read_bytes() == whole.read_bytes(), seed
    assert Path(f"{output}.summary").read_text() == Path(f"{whole}.summary").read_text()
    assert not [name for name in names(tmp_path) if "partial" in name]


@pytest.mark.slow
def test_two_killed_processes_write_the_rows_of_one(long_source, tmp_path, reranker_checkpoint):
    psutil = pytest.importorskip("psutil")
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    finish(start(reranker_checkpoint, long_source, one))
    process = start(reranker_checkpoint, long_source, two, 0.05, launcher=TORCHRUN)
    journals = [tmp_path / "two.jsonl.partial", tmp_path / "two.jsonl.partial-1"]
    while process.poll() is None and not all(count_windows(journal) > 3 for journal in journals):
        time.sleep(0.01)
    for child in [process, *psutil.Process(process.pid).children(recursive=True)]:
        child.kill()
    process.wait()
    assert not two.exists()
    assert all(0 < count_windows(journal) < 30 for journal in journals)
    finish(start(reranker_checkpoint, long_source, two, launcher=TORCHRUN))
    assert two.read_bytes() == one.read_bytes()
    assert Path(f"{two}.summary").read_text() == Path(f"{one}.summary").read_text()  # of both processes
    assert not [name for name in names(tmp_path) if "partial" in name]


@pytest.fixture
def stopped(tmp_path, reranker_checkpoint, monkeypatch):
    """A job that an interrupt stopped after 4 of its 5 windows: its source and its output."""
    append = StateFile.append

    def append_until_interrupted(state, number, record):
        append(state, number, record)
        if number == 3:
            raise KeyboardInterrupt

    source, output = write(tmp_path / "rows.jsonl", lines(*ROWS)), tmp_path / "out.jsonl"
    with monkeypatch.context() as context:
        context.setattr(StateFile, "append", append_until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            mine_file(str(reranker_checkpoint), source, output, window_pairs=16)
    return source, output


def test_different_arguments_are_refused_with_what_changed(stopped, tmp_path, reranker_checkpoint):
    source, output = stopped
    journal = tmp_path / "out.jsonl.partial"
    kept = journal.read_bytes()
    assert count_windows(journal) == 4
    arguments = {"depth": 5, "selection": Selection(num_negatives=3, relative_margin=1)}
    with pytest.raises(
        ValueError,
        match=r"out\.jsonl\.partial: holds a stopped run with different arguments: depth was 100 and is 5; "
        r"num_negatives was 7 and is 3; relative_margin was 0\.95 and is 1\. Use the same arguments to resume, ",
    ):
        mine_file(str(reranker_checkpoint), source, output, **arguments)
    assert journal.read_bytes() == kept
    os.utime(source, ns=(0, 0))
    with pytest.raises(
        ValueError, match=r"different arguments: source was \['.*rows\.jsonl \(\d+ bytes, changed at \d+ ns"
    ):
        mine_file(str(reranker_checkpoint), source, output)
    mine_file(str(reranker_checkpoint), source, output, **arguments, overwrite=True)
    assert all(len(row["neg_doc"]) <= 3 for row in read(output))
    assert not [name for name in names(tmp_path) if "partial" in name]


def test_the_window_of_the_first_start_holds(stopped, tmp_path, reranker_checkpoint, caplog):
    source, output = stopped
    result = mine_file(str(reranker_checkpoint), source, output)
    assert f"resuming from {output}.partial: 80 of 100 pairs are scored" in caplog.messages
    whole = mine_file(str(reranker_checkpoint), source, tmp_path / "whole.jsonl", window_pairs=16)
    assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert result == whole


def test_a_job_that_scored_nothing_does_not_hold_its_arguments(tmp_path, reranker_checkpoint, monkeypatch):
    source, output = write(tmp_path / "rows.jsonl", lines(*ROWS)), tmp_path / "out.jsonl"
    with monkeypatch.context() as context:
        context.setattr(MiningTask, "record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mine_file(str(reranker_checkpoint), source, output)
    assert (tmp_path / "out.jsonl.partial").exists()
    mine_file(str(reranker_checkpoint), source, output, depth=2)
    assert all(len(row["neg_doc"]) <= 2 for row in read(output))


@pytest.mark.parametrize("content", ["12\n", "my notes\n", '{"model": ["/a/mod'])
def test_a_file_that_is_not_a_journal_is_kept(content, tmp_path, reranker_checkpoint):
    source = write(tmp_path / "rows.jsonl", lines(*ROWS))
    other = write(tmp_path / "out.jsonl.partial", content)
    with pytest.raises(ValueError, match=r"out\.jsonl\.partial: is not a journal of mine: move it away"):
        mine_file(str(reranker_checkpoint), source, tmp_path / "out.jsonl", overwrite=True)
    assert other.read_text() == content
    write(tmp_path / "out.jsonl", "mined before")
    with pytest.raises(FileExistsError):
        mine_file(str(reranker_checkpoint), source, tmp_path / "out.jsonl")
    assert other.read_text() == content


def test_two_processes_do_not_mine_into_one_output(stopped, reranker_checkpoint):
    source, output = stopped
    state = StateFile(output.with_name("out.jsonl.partial"), "mine")
    with pytest.raises(RuntimeError, match=r"out\.jsonl\.partial: another process is at work on this output"):
        mine_file(str(reranker_checkpoint), source, output, depth=5, overwrite=True)
    state.close()
    assert mine_file(str(reranker_checkpoint), source, output).num_rows == 10


@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_kill_after_the_rows_were_moved_is_made_good(is_deleted, stopped, tmp_path, reranker_checkpoint, monkeypatch):
    source, output = stopped
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mine_file(str(reranker_checkpoint), source, output)
    mined = output.read_bytes()
    assert (tmp_path / "out.jsonl.partial").exists()
    if is_deleted:  # by somebody who wants it again
        output.unlink()
    result = mine_file(str(reranker_checkpoint), source, output)
    assert (result.num_rows, result.num_written) == (10, mined.count(b"\n"))
    assert names(tmp_path) == ["out.jsonl", "rows.jsonl"]
    assert output.read_bytes() == mined
    with pytest.raises(FileExistsError, match=r"out\.jsonl"):
        mine_file(str(reranker_checkpoint), source, output)

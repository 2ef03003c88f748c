"""Interrupts, full disks and readers that leave: one line, the right exit status, and nothing lost."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import command, count_windows, lines, names, write, write_collection

pytest.importorskip("datasets")

from llama_bidir.cli import main
from llama_bidir.data import load_rows

LLAMA_BIDIR = [sys.executable, "-m", "llama_bidir"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, which is full."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    (path / "fill").write_bytes(bytes(256 * 1024))
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.fixture
def evaluation(folder):
    write(folder / "qrels.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    write(folder / "run.trec", "q1 Q0 d1 1 1 t\n")
    return ["evaluate", "--qrels", "qrels.tsv", "--run", "run.trec", "--json", "out.json"]


def test_outputs_are_whole_when_nobody_reads_the_table(evaluation, folder):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed_pipe:
        result = subprocess.run(
            [*LLAMA_BIDIR, *evaluation], stdout=closed_pipe, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (result.returncode, "Broken pipe" in result.stderr, "Traceback" in result.stderr) == (0, False, False)
    assert '"nDCG@10": 1.0' in (folder / "out.json").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_standard_output_is_an_error_after_the_work(evaluation, folder):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*LLAMA_BIDIR, *evaluation], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 1
    assert "llama-bidir: error: [Errno 28] No space left on device: 'standard output'" in result.stderr
    assert "Traceback" not in result.stderr
    assert '"nDCG@10": 1.0' in (folder / "out.json").read_text()


def start_and_signal(arguments, journal, number):
    """Starts a command, sends a signal when some windows are recorded, and returns its status and standard error."""
    with subprocess.Popen(
        [*LLAMA_BIDIR, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and count_windows(journal) < 2:
            time.sleep(0.02)
        process.send_signal(number)
        _, error = process.communicate()
    return process.returncode, error


@pytest.mark.parametrize(("verb", "number"), [("rerank", signal.SIGINT), ("mine", signal.SIGTERM)])
def test_an_interrupted_job_says_so_exits_with_130_and_resumes(verb, number, tmp_path, reranker_checkpoint, caplog):
    if verb == "rerank":
        files = write_collection(tmp_path, num_queries=40, num_documents=60, depth=50)
        output, whole = tmp_path / "out.trec", tmp_path / "whole.trec"
        arguments, again = (
            command(files, reranker_checkpoint, path, "--device=cpu", "--batch-size=4") for path in (output, whole)
        )
    else:
        rows = [
            {"query": f"q {n}", "pos_doc": f"p {n}", "neg_doc": [f"n {n} {k}" for k in range(50)]} for n in range(400)
        ]
        source = write(tmp_path / "rows.jsonl", lines(*rows))
        output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
        options = [
            f"--model={reranker_checkpoint}",
            f"--source={source}",
            "--device=cpu",
            "--batch-size=4",
            "--keep-empty",
        ]
        arguments, again = (["mine", *options, f"--output={path}"] for path in (output, whole))
    status, error = start_and_signal(arguments, output.with_name(f"{output.name}.partial"), number)
    assert status == 130
    assert error.splitlines()[-1] == "interrupted"
    assert "Traceback" not in error
    assert not output.exists()
    assert main(arguments) == main(again) == 0
    assert any(message.startswith("resuming from") for message in caplog.messages)
    assert output.read_bytes() == whole.read_bytes()
    assert not [name for name in names(tmp_path) if "partial" in name]


def test_a_full_disk_stops_a_job_with_its_path_and_the_job_resumes(small_disk, tmp_path, reranker_checkpoint, capsys):
    files = write_collection(tmp_path)
    output = small_disk / "out.trec"
    arguments = command(files, reranker_checkpoint, output, "--device=cpu")
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(rf"llama-bidir: error: .*{re.escape(str(output))}", error)
    assert "full" in error or "No space left" in error
    assert not output.exists()
    (small_disk / "fill").unlink()
    assert main(arguments) == 0
    assert names(small_disk) == ["out.trec"]


def test_a_full_disk_under_the_cache_is_told_with_its_path(small_disk, tmp_path):
    rows = write(tmp_path / "rows.jsonl", lines({"query": "q", "pos_doc": "p", "neg_doc": ["n"]}))
    with pytest.raises(OSError, match=re.escape(str(small_disk))) as raised:
        load_rows(rows, cache_dir=small_disk)
    assert raised.value.errno == errno.ENOSPC
    (small_disk / "fill").unlink()
    assert load_rows(rows, cache_dir=small_disk)["query"][:] == ["q"]

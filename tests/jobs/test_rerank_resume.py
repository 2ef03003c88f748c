"""Reranking that is killed goes on to the same bytes, alone and under torchrun."""

import itertools
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from helpers import command, count_windows, lines, names, read_lines_of, write, write_collection
from tokenizers.normalizers import Lowercase

pytest.importorskip("datasets")

from llama_bidir import CrossEncoder
from llama_bidir.cli import main
from llama_bidir.jobs import scoring
from llama_bidir.jobs.journal import StateFile
from llama_bidir.jobs.rerank import RerankTask, rerank_run
from llama_bidir.jobs.rerank import task as rerank_task
from llama_bidir.scoring import pipeline

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


@pytest.fixture
def reranker(reranker_checkpoint):
    return CrossEncoder(reranker_checkpoint, device="cpu")


@pytest.fixture
def files(tmp_path):
    return write_collection(tmp_path)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(scoring, "CPU_WINDOW_PAIRS", 25)


class StopError(Exception):
    """What a test raises in the place of a kill."""


def stop_after(monkeypatch, owner, name, num_calls):
    """Lets a method be called so often, and raises at the next call."""
    method, calls = getattr(owner, name), iter(range(num_calls))

    def wrapper(*args, **kwargs):
        if next(calls, None) is None:
            raise StopError
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


def stopped_journal(reranker, files, output, monkeypatch, num_windows):
    """The journal of a run that is stopped when it has scored so many windows."""
    with monkeypatch.context() as patch:
        stop_after(patch, pipeline.Scorer, "_score_chunk", num_windows)
        with pytest.raises(StopError):
            rerank_run(reranker, **files.arguments(), output=output)
    return output.with_name(f"{output.name}.partial")


def test_a_job_stopped_after_any_window_leads_to_the_same_run(reranker, files, tmp_path, monkeypatch, caplog):
    expected = rerank_run(reranker, **files.arguments(), output=tmp_path / "whole.trec").output.read_bytes()
    output = tmp_path / "out.trec"
    for num_windows in range(6):
        journal = stopped_journal(reranker, files, output, monkeypatch, num_windows)
        result = rerank_run(reranker, **files.arguments(), output=output)
        assert result.num_pairs == 110 - 20 * num_windows
        assert output.read_bytes() == expected
        assert names(tmp_path) == ["corpus.jsonl", "out.trec", "queries.jsonl", "run.trec", "whole.trec"]
        output.unlink()
    assert f"resuming from {journal}: 80 of 110 pairs are scored" in caplog.messages


def test_a_window_that_another_program_removed_is_scored_again(reranker, files, tmp_path, monkeypatch):
    expected = rerank_run(reranker, **files.arguments(), output=tmp_path / "whole.trec").output.read_bytes()
    journal = stopped_journal(reranker, files, tmp_path / "out.trec", monkeypatch, num_windows=4)
    with closing(sqlite3.connect(journal)) as database, database:
        database.execute("DELETE FROM windows WHERE number = 1")
    result = rerank_run(reranker, **files.arguments(), output=tmp_path / "out.trec")
    assert (result.num_pairs, result.output.read_bytes()) == (50, expected)


def test_an_empty_file_from_a_kill_at_the_start_is_used(reranker, files, tmp_path):
    (tmp_path / "out.trec.partial").touch()
    assert rerank_run(reranker, **files.arguments(), output=tmp_path / "out.trec").num_pairs == 110
    assert not [name for name in names(tmp_path) if "partial" in name]


def test_a_stop_at_any_step_is_made_good(reranker, files, tmp_path, monkeypatch):
    pytest.importorskip("bm25s")
    options = {"corpus": files.corpus, "queries": files.queries}
    write(files.queries, lines({"_id": "q0", "text": "bees of the hive"}, {"_id": "q1", "text": "white clover"}))
    before = names(tmp_path)
    expected = rerank_run(reranker, **options, output=tmp_path / "a.trec", write_run=tmp_path / "a").output.read_bytes()
    bm25 = (tmp_path / "a").read_bytes()
    for owner, method in ((Path, "replace"), (Path, "unlink"), (StateFile, "note"), (StateFile, "append")):
        for num_calls in itertools.count():
            with monkeypatch.context() as patch:
                stop_after(patch, owner, method, num_calls)
                try:
                    rerank_run(reranker, **options, output=tmp_path / "b.trec", write_run=tmp_path / "b")
                except StopError:
                    is_stopped = True
                else:
                    is_stopped = False
            assert not (tmp_path / "b.trec").exists() or (tmp_path / "b.trec").read_bytes() == expected
            if is_stopped:
                rerank_run(reranker, **options, output=tmp_path / "b.trec", write_run=tmp_path / "b")
            assert (tmp_path / "b.trec").read_bytes() == expected
            assert (tmp_path / "b").read_bytes() == bm25
            assert names(tmp_path) == sorted([*before, "a", "a.trec", "b", "b.trec"])
            (tmp_path / "b").unlink()
            (tmp_path / "b.trec").unlink()
            if not is_stopped:
                break  # all calls were tried
        assert num_calls > 0


@pytest.mark.parametrize("change", ["removed", "write_run", "partial"])
def test_the_run_of_bm25_is_made_again_when_it_is_missing(change, reranker, files, tmp_path, monkeypatch):
    pytest.importorskip("bm25s")
    inputs = {"corpus": files.corpus, "queries": files.queries, "depth": 6}
    expected = rerank_run(reranker, **inputs, output=tmp_path / "whole.trec").output.read_bytes()
    output = tmp_path / "out.trec"
    keep = {"write_run": tmp_path / "kept.trec.gz"} if change == "write_run" else {}
    with monkeypatch.context() as patch:
        stop_after(patch, pipeline.Scorer, "_score_chunk", 1)
        with pytest.raises(StopError):
            rerank_run(reranker, **inputs, **keep, output=output)
    working = output.with_name("out.trec.partial-bm25")
    if change != "write_run":
        working.unlink()
    if change == "partial":  # as after a kill while it is made again
        with monkeypatch.context() as patch:
            stop_after(patch, rerank_task, "run_lines", 2)
            with pytest.raises(StopError):
                rerank_run(reranker, **inputs, output=output)
        assert working.exists()
    rerank_run(reranker, **inputs, output=output)
    assert output.read_bytes() == expected
    assert not list(tmp_path.glob("out.trec.partial*"))


def test_a_change_of_any_weight_or_of_the_tokenizer_is_noticed(reranker):
    before = scoring.describe_scoring(reranker)
    weight = reranker.model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight[-1, -1] += 1e-3
    assert scoring.describe_scoring(reranker)["weights"] != before["weights"]
    with torch.no_grad():
        weight[-1, -1] -= 1e-3
    reranker.tokenizer.backend_tokenizer.normalizer = Lowercase()
    assert scoring.describe_scoring(reranker)["tokenizer"] != before["tokenizer"]


def test_changed_arguments_are_refused_with_what_changed(reranker, files, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.trec"
    journal = stopped_journal(reranker, files, output, monkeypatch, num_windows=2)
    size, mtime = files.run.stat().st_size, files.run.stat().st_mtime_ns
    content = journal.read_bytes()
    with pytest.raises(ValueError, match="holds a stopped run") as raised:
        rerank_run(reranker, **files.arguments(), output=output, depth=7, tag="other")
    assert str(raised.value) == (
        f"{journal}: holds a stopped run with different arguments: depth was 100 and is 7; tag was 'llama-bidir' and "
        "is 'other'. Use the same arguments to resume, overwrite (--overwrite) to start over, or another output"
    )
    write(files.run, files.run.read_text() + "\n")
    os.utime(files.run, ns=(mtime + 5, mtime + 5))
    with pytest.raises(ValueError, match=f"run.size was {size} and is {size + 1}; run.mtime_ns was {mtime} and is "):
        rerank_run(reranker, **files.arguments(), output=output)
    os.truncate(files.run, size)
    os.utime(files.run, ns=(mtime, mtime))
    reranker.model.score.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"different arguments: weights was '\w{16}' and is '\w{16}'\. Use"):
        rerank_run(reranker, **files.arguments(), output=output)
    checkpoint = reranker.config.name_or_path
    assert main(command(files, checkpoint, output, "--device", "cpu", "--max-length", 60)) == 2
    error = capsys.readouterr().err
    changed = "different arguments: max_length was 256 and is 60"
    assert f"llama-bidir: error: {journal}: holds a stopped run with {changed}" in error
    assert journal.read_bytes() == content
    result = rerank_run(reranker, **files.arguments(), output=output, overwrite=True)
    assert result.num_pairs == 110


@pytest.mark.parametrize("content", ["mine\n", b'01234567 {"arguments": {}}\n' * 500, "database", "mine's journal"])
@pytest.mark.parametrize("name", ["out.trec.partial", "out.trec.partial-1"])
def test_another_file_in_the_place_of_a_journal_is_kept(name, content, reranker, files, tmp_path):
    path = tmp_path / name
    if content == "database":
        with closing(sqlite3.connect(path)) as database:
            database.execute("CREATE TABLE windows (number INTEGER)")
    elif content == "mine's journal":
        StateFile(path, "mine").close()
    else:
        write(path, content)
    kept = path.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(
            ValueError, match=rf"{re.escape(str(path))}: is not a journal of rerank: move it away, or choose"
        ):
            rerank_run(reranker, **files.arguments(), output=tmp_path / "out.trec", overwrite=overwrite)
    assert path.read_bytes() == kept


def test_other_files_with_like_names_are_kept(reranker, files, tmp_path, monkeypatch):
    others = [tmp_path / f"out.trec.partial{end}" for end in ("-notes", "-1.txt", "-1-old", "s")]
    for path in others:
        path.write_text("mine")
    stopped_journal(reranker, files, tmp_path / "out.trec", monkeypatch, num_windows=1)
    rerank_run(reranker, **files.arguments(), output=tmp_path / "out.trec", depth=5, overwrite=True)
    assert [name for name in names(tmp_path) if "partial" in name] == sorted(path.name for path in others)


def test_two_jobs_do_not_write_to_one_output(reranker, files, tmp_path, monkeypatch):
    output = tmp_path / "out.trec"

    def start_another(task, window, scores):
        rerank_run(reranker, **files.arguments(), output=output)

    monkeypatch.setattr(RerankTask, "record", start_another)
    with pytest.raises(RuntimeError, match=r"out\.trec\.partial: another process is at work on this output: wait for"):
        rerank_run(reranker, **files.arguments(), output=output)


def test_something_that_appears_at_the_output_meanwhile_is_kept(reranker, files, tmp_path, monkeypatch):
    output, record = tmp_path / "out.trec", RerankTask.record

    def appear(task, window, scores):
        output.write_text("mine")
        return record(task, window, scores)

    with monkeypatch.context() as patch:
        patch.setattr(RerankTask, "record", appear)
        with pytest.raises(FileExistsError, match=r"out\.trec' exists: pass overwrite"):
            rerank_run(reranker, **files.arguments(), output=output)
    assert output.read_text() == "mine"
    output.unlink()
    assert rerank_run(reranker, **files.arguments(), output=output).num_pairs == 0  # all was scored


def run_command(arguments, log):
    """A process that reranks as the command line does."""
    with open(log, "a", buffering=1) as file:
        sys.stderr = sys.stdout = file
        sys.exit(main(arguments))


@pytest.mark.slow
def test_five_kills_at_random_moments_change_no_byte(reranker_checkpoint, tmp_path):
    files = write_collection(tmp_path, num_queries=100, num_documents=80, depth=50)
    # Forked from a process that has imported the package, so that a start takes no seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llama_bidir.jobs.rerank", "transformers.models.llama.modeling_llama"])

    def start(output):
        arguments = command(files, reranker_checkpoint, output, "--device", "cpu")
        process = context.Process(target=run_command, args=(arguments, tmp_path / "log"))
        process.start()
        return process

    whole = start(tmp_path / "whole.trec")
    whole.join()
    assert whole.exitcode == 0, (tmp_path / "log").read_text()
    expected = (tmp_path / "whole.trec").read_bytes()
    output, journal = tmp_path / "out.trec", tmp_path / "out.trec.partial"
    seed = int.from_bytes(os.urandom(4))
    draw, num_kills, sizes = random.Random(seed), 0, []
    while num_kills < 5:
        process = start(output)
        before = count_windows(journal)
        while process.is_alive() and count_windows(journal) <= before:
            assert not output.exists() or output.read_bytes() == expected
        deadline = time.perf_counter() + draw.uniform(0, 0.3)
        while process.is_alive() and time.perf_counter() < deadline:
            assert not output.exists() or output.read_bytes() == expected
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (seed, process.exitcode, (tmp_path / "log").read_text())
        sizes.append(count_windows(journal))
        num_kills += 1
    last = start(output)
    last.join()
    assert last.exitcode == 0, (seed, (tmp_path / "log").read_text())
    assert output.read_bytes() == expected, seed
    assert sizes == sorted(sizes)
    assert "resuming from" in (tmp_path / "log").read_text()
    assert not [name for name in names(tmp_path) if "partial" in name]


def torchrun(arguments, **environment):
    # Before `--`, torchrun would take `--run` for an option of its own.
    return subprocess.Popen(
        [*TORCHRUN, "-m", "--", "llama_bidir", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.slow
def test_two_processes_write_the_run_of_one(reranker_checkpoint, tmp_path):
    psutil = pytest.importorskip("psutil")
    files = write_collection(tmp_path, num_queries=100, num_documents=60, depth=40)
    alone = subprocess.run(
        [sys.executable, "-m", "llama_bidir", *command(files, reranker_checkpoint, tmp_path / "one.trec")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    output = tmp_path / "two.trec"
    process = torchrun(command(files, reranker_checkpoint, output))
    journals = [tmp_path / "two.trec.partial", tmp_path / "two.trec.partial-1"]
    while process.poll() is None and not count_windows(journals[1]):
        time.sleep(0.005)
    for child in [process, *psutil.Process(process.pid).children(recursive=True)]:
        child.kill()
    process.wait()
    assert not output.exists()
    assert all(journal.exists() for journal in journals)
    again = torchrun(command(files, reranker_checkpoint, output))
    _, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    assert "resuming from" in error
    assert output.read_bytes() == (tmp_path / "one.trec").read_bytes()
    assert not [name for name in names(tmp_path) if "partial" in name]


@pytest.mark.slow
def test_processes_fail_together(reranker_checkpoint, tmp_path):
    files = write_collection(tmp_path, num_queries=40, num_documents=60, depth=40)
    script = tmp_path / "fail.py"
    script.write_text(
        "import os, sys\n"
        "from llama_bidir.cli import main\n"
        "from llama_bidir.jobs.rerank import RerankTask\n"
        "if os.environ['RANK'] == os.environ['BAD_RANK']:\n"
        "    RerankTask.record = lambda *_: 1 / 0\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    for rank in "01":
        start = time.perf_counter()
        result = subprocess.run(
            [*TORCHRUN, "--", str(script), *command(files, reranker_checkpoint, tmp_path / "out.trec")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "BAD_RANK": rank},
            check=False,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert result.returncode != 0
        assert "division by zero" in result.stderr
        assert not (tmp_path / "out.trec").exists()
        assert time.perf_counter() - start < 60


def test_a_run_of_one_window_and_of_text_in_other_scripts(reranker, files, tmp_path):
    write(files.corpus, lines({"_id": "ä", "text": "Zürich"}, {"_id": "日本", "text": "東京"}))
    write(files.run, "q0 Q0 日本 1 1 x\nq0 Q0 ä 2 0 x\n")
    rerank_run(reranker, **files.arguments(), output=tmp_path / "out.trec")
    assert sorted(doc_id for doc_id, *_ in read_lines_of(tmp_path / "out.trec")["q0"]) == ["ä", "日本"]

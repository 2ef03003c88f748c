"""Reranking and mining on a local Ray."""

import os
import signal

import numpy as np
import pytest
from helpers import command, lines, names, write, write_collection

pytest.importorskip("ray.data")
pytest.importorskip("psutil")
pytest.importorskip("datasets")

import psutil
import ray
import torch

from llama_bidir import CrossEncoder
from llama_bidir.cli import main
from llama_bidir.jobs.job import Job
from llama_bidir.jobs.journal import StateFile
from llama_bidir.jobs.mining import mine_file
from llama_bidir.jobs.ray import CrossEncoderActor, run_with_ray
from llama_bidir.jobs.rerank import RerankTask, rerank_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=3, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


def actors(name):
    """Process ids of the actors of a class."""
    own = psutil.Process().children(recursive=True)
    found = []
    for process in own:
        try:
            if name in " ".join(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_an_actor_scores_the_batches_of_a_pipeline(reranker_checkpoint):
    rows = [{"id": n, "query": f"bees {n % 5}", "passage": "hive " * (n % 7)} for n in range(40)]
    scored = ray.data.from_items(rows).map_batches(
        CrossEncoderActor,
        fn_constructor_args=(str(reranker_checkpoint),),
        fn_constructor_kwargs={"device": "cpu"},
        compute=ray.data.ActorPoolStrategy(size=2),
        batch_size=8,
    )
    scores = {row["id"]: row["score"] for row in scored.take_all()}
    expected = CrossEncoder(reranker_checkpoint, device="cpu").predict([(r["query"], r["passage"]) for r in rows])
    assert sorted(scores) == list(range(40))
    np.testing.assert_allclose([scores[n] for n in range(40)], expected, rtol=1e-5, atol=1e-6)


def test_an_actor_names_the_column_that_is_missing(reranker_checkpoint):
    actor = CrossEncoderActor(reranker_checkpoint, device="cpu", query_column="question")
    with pytest.raises(ValueError, match="the batch has no column 'question', only query, passage: name query_column"):
        actor({"query": ["a"], "passage": ["b"]})


@pytest.fixture
def one_thread():
    """The number of threads that Ray gives to an actor. Another number sums in another order."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_two_actors_one_of_them_killed_write_the_run_of_one_process(
    reranker_checkpoint, tmp_path, monkeypatch, one_thread
):
    files = write_collection(tmp_path, num_queries=200, num_documents=80, depth=50)
    cache = {"cache_dir": str(tmp_path / "cache")}
    reranker = CrossEncoder(reranker_checkpoint, device="cpu")
    expected = rerank_run(reranker, **files.arguments(), **cache, output=tmp_path / "one.trec").output.read_bytes()
    killed, recorded = [], []
    append = StateFile.append

    def append_and_kill(state, number, record):
        append(state, number, record)
        recorded.append(number)
        if len(recorded) == 2:
            killed.extend(actors("_WindowActor")[:1])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(StateFile, "append", append_and_kill)
    job = Job(RerankTask(**files.arguments(), **cache), tmp_path / "two.trec")
    result = run_with_ray(job, str(reranker_checkpoint), {"device": "cpu"}, num_actors=2)
    assert len(killed) == 1
    assert result.num_pairs == 199 * 50
    assert sorted(recorded) == list(range(len(job.windows)))
    assert (tmp_path / "two.trec").read_bytes() == expected
    assert not [name for name in names(tmp_path) if "partial" in name]


def test_actors_mine_the_rows_of_one_process(reranker_checkpoint, tmp_path, monkeypatch, one_thread, capsys):
    rows = [
        {"query": f"bees {n}", "pos_doc": "clover " * (n % 5 + 1), "neg_doc": [f"hive {n * k}" for k in range(9)]}
        for n in range(120)
    ]
    source = write(tmp_path / "rows.jsonl", lines(*rows))
    expected = mine_file(str(reranker_checkpoint), source, tmp_path / "one.jsonl", device="cpu")
    monkeypatch.chdir(tmp_path)
    arguments = [f"--model={reranker_checkpoint}", f"--source={source}", "--output=two.jsonl", "--device=cpu"]
    assert main(["mine", *arguments, "--engine=ray", "--ray-actors=2"]) == 0
    assert capsys.readouterr().out == f"{expected.format()}\nrows: two.jsonl\n"
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert names(tmp_path) == ["one.jsonl", "rows.jsonl", "two.jsonl"]


def test_a_score_that_has_no_rank_is_a_failure_at_work(reranker_checkpoint, tmp_path, capsys):
    files = write_collection(tmp_path)
    broken = CrossEncoder(reranker_checkpoint, device="cpu")
    broken.model.score.weight.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    arguments = command(files, tmp_path / "broken", tmp_path / "out.trec", "--engine=ray", "--ray-actors=1")
    assert main(arguments) == 1
    assert "is nan and has no rank" in capsys.readouterr().err

"""Reranking on a local Ray."""

import os
import signal

import numpy as np
import pytest
from helpers import names, write_collection

pytest.importorskip("ray.data")
pytest.importorskip("psutil")
pytest.importorskip("datasets")

import psutil
import ray
import torch

from llama_bidir import CrossEncoder
from llama_bidir.jobs.rerank import CrossEncoderActor, RerankJob, rerank_run, rerank_with_ray

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


def test_two_actors_one_of_them_killed_write_the_run_of_one_process(reranker_checkpoint, tmp_path, monkeypatch):
    files = write_collection(tmp_path, num_queries=200, num_documents=80, depth=50)
    cache = {"cache_dir": str(tmp_path / "cache")}
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what Ray gives to an actor: sums of other parts differ in the last bit
    try:
        reranker = CrossEncoder(reranker_checkpoint, device="cpu")
        expected = rerank_run(reranker, **files.arguments(), **cache, output=tmp_path / "one.trec").output.read_bytes()
    finally:
        torch.set_num_threads(num_threads)
    killed, recorded = [], []
    record = RerankJob.record

    def record_and_kill(job, number, scores):
        record(job, number, scores)
        recorded.append(number)
        if len(recorded) == 2:
            killed.extend(actors("_WindowActor")[:1])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(RerankJob, "record", record_and_kill)
    job = RerankJob(**files.arguments(), **cache, output=tmp_path / "two.trec")
    result = rerank_with_ray(job, str(reranker_checkpoint), {"device": "cpu"}, num_actors=2)
    assert len(killed) == 1
    assert result.num_pairs == 199 * 50
    assert sorted(recorded) == list(range(len(job.windows)))
    assert (tmp_path / "two.trec").read_bytes() == expected
    assert not [name for name in names(tmp_path) if "partial" in name]

"""The routes: requests and answers of each API, limits, errors, keys, logs and metrics."""

import asyncio
import json
import logging
import threading
import time

import numpy as np
import pytest
import torch
from helpers import make_model, make_tokenizer

from llama_bidir import CrossEncoder

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("prometheus_client")
from pydantic import ValidationError
from starlette.testclient import TestClient

from llama_bidir.serving.app import make_app
from llama_bidir.serving.bodies import Limits
from llama_bidir.serving.metrics import Metrics
from llama_bidir.serving.requests import BodyError, RerankBody, ScoreBody, read_rerank
from llama_bidir.serving.scorer import ServedReranker

QUERY = "where do bees find their way?"
DOCUMENTS = ["Honey bees navigate by the sun.", "", "Paris lies on the Seine.", "the garden was full of clover " * 9]
TEMPLATE = "{instruction} q: {query} p: {passage}"


@pytest.fixture
def cross_encoder():
    model = make_model(rerank_max_length=64, prompt_template=TEMPLATE, instruction="Find it.")
    return CrossEncoder(model, make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"))


@pytest.fixture
def serve(cross_encoder):
    served = []

    def serve(*, limits=None, api_key=None, **options):
        metrics = Metrics()
        reranker = ServedReranker(cross_encoder, "tiny", on_batch=metrics.count_batch, **options)
        served.append(reranker)
        app = make_app(reranker, metrics, limits=limits, api_key=api_key)
        client = TestClient(app, raise_server_exceptions=False)
        client.reranker = reranker
        return client

    yield serve
    for reranker in served:
        reranker.close()


def ask(client, path="/v1/rerank", **body):
    return client.post(path, json={"query": QUERY, "documents": DOCUMENTS, **body})


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank(serve, cross_encoder, path):
    expected = cross_encoder.rank(QUERY, DOCUMENTS)
    answer = ask(serve(), path, return_documents=True).json()
    assert [result["index"] for result in answer["results"]] == [result["corpus_id"] for result in expected]
    assert_close([result["relevance_score"] for result in answer["results"]], [each["score"] for each in expected])
    assert [each["document"] for each in answer["results"]] == [
        {"text": DOCUMENTS[each["corpus_id"]]} for each in expected
    ]
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("rerank-")
    assert answer["usage"]["total_tokens"] > 64  # one document fills the maximum length


def test_options_of_rerank(serve, cross_encoder):
    client = serve()
    objects = [{"text": text, "title": "ignored"} for text in DOCUMENTS]
    whole = ask(client).json()["results"]
    best = ask(client, documents=objects, top_n=2, model="any", max_tokens_per_doc=4096).json()["results"]
    assert [(each["index"], each.get("document")) for each in best] == [(each["index"], None) for each in whole[:2]]
    defaults = ask(client, top_n=0, return_documents=None, instruction=None, model=None).json()["results"]
    assert defaults == whole  # what vLLM's client sends
    assert [each["index"] for each in ask(client, documents=["same"] * 3).json()["results"]] == [0, 1, 2]
    other = {each["index"]: each["relevance_score"] for each in ask(client, instruction="Why?").json()["results"]}
    expected = cross_encoder.predict([(QUERY, text) for text in DOCUMENTS], instruction="Why?")
    assert_close([other[index] for index in range(4)], expected)


def test_rerank_of_text_embeddings_inference(serve, cross_encoder):
    client = serve()
    scores = cross_encoder.predict([(QUERY, text) for text in DOCUMENTS])
    body = {"query": QUERY, "texts": DOCUMENTS, "truncate": True}
    raw = client.post("/rerank", json={**body, "raw_scores": True, "return_text": True}).json()
    assert [each["index"] for each in raw] == np.argsort(-scores, kind="stable").tolist()
    assert_close([each["score"] for each in raw], -np.sort(-scores))
    assert [each["text"] for each in raw] == [DOCUMENTS[each["index"]] for each in raw]
    between = client.post("/rerank", json=body).json()
    assert_close([each["score"] for each in between], 1 / (1 + np.exp(np.sort(-scores))))
    refused = client.post("/rerank", json={**body, "truncate": False})
    assert refused.status_code == 422
    assert refused.json() == {
        "error": "1 inputs have more than 64 tokens: send truncate: true to cut them",
        "error_type": "Validation",
    }
    cross_encoder.config.calibration = {"slope": 2.0, "offset": -1.0}
    calibrated = client.post("/rerank", json=body).json()
    assert_close([each["score"] for each in calibrated], 1 / (1 + np.exp(2 * np.sort(-scores) + 1)))


@pytest.mark.parametrize(("first", "second"), [("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2")])
def test_score(serve, cross_encoder, first, second):
    client = serve()
    scores = cross_encoder.predict([(QUERY, text) for text in DOCUMENTS])
    answer = client.post("/score", json={first: QUERY, second: DOCUMENTS, "model": "tiny"}).json()
    assert [each["index"] for each in answer["data"]] == [0, 1, 2, 3]
    assert_close([each["score"] for each in answer["data"]], scores)
    paired = client.post("/v1/score", json={first: [QUERY] * 2, second: DOCUMENTS[:2]}).json()
    assert_close([each["score"] for each in paired["data"]], scores[:2])
    single = client.post("/score", json={first: QUERY, second: DOCUMENTS[0]}).json()
    assert_close([each["score"] for each in single["data"]], scores[:1])


def test_probabilities(serve, cross_encoder):
    cross_encoder.config.calibration = {"slope": 500.0, "offset": 5000.0}
    expected = [each["corpus_id"] for each in cross_encoder.rank(QUERY, DOCUMENTS)]
    results = ask(serve(activation_fn="probability")).json()["results"]
    assert [each["relevance_score"] for each in results] == [1.0] * 4
    assert [each["index"] for each in results] == expected


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/rerank", [], "the body must be a JSON object with query and documents, got list"),
        ("/rerank", {"documents": ["a"]}, "query: Field required"),
        ("/rerank", {"query": 5, "documents": ["a"]}, "query: Input should be a valid string"),
        ("/rerank", {"query": "q"}, "documents: Field required"),
        ("/rerank", {"query": "q", "documents": []}, "documents: List should have at least 1 item"),
        ("/rerank", {"query": "q", "documents": "ab"}, "documents: Input should be a valid list"),
        ("/rerank", {"query": "q", "documents": ["a", 5]}, "documents.1: must be a string or an object with text"),
        ("/rerank", {"query": "q", "documents": [{}]}, "documents.0: must be a string or an object with text"),
        (
            "/rerank",
            {"query": "q", "documents": ["a"], "top_n": -1},
            "top_n: Input should be greater than or equal to 0",
        ),
        ("/rerank", {"query": "q", "texts": [None]}, "texts.0: Input should be a valid string"),
        ("/score", {"text_1": "q"}, "text_2: Field required"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a"] * 3}, "text_1 must be one text, or as many as text_2"),
        ("/score", {"text_1": [], "text_2": []}, "text_1 must be one text, or as many as text_2"),
        ("/rerank", {"query": "\ud800", "documents": ["a"]}, "without lone surrogates"),
        ("/rerank", {"query": "q", "documents": ["a"], "instruction": "long " * 80}, "max_length 64 leaves no room"),
        ("/rerank", {"query": "q", "documents": ["a"] * 51}, "documents: at most 50 are allowed, got 51"),
    ],
)
def test_a_wrong_body_is_told(serve, path, body, message):
    answer = serve(limits=Limits(documents=50)).post(
        path, content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 422
    content = answer.json()
    said = content["message"] if "message" in content else content["error"]
    assert message in said


def test_limits(serve):
    client = serve(limits=Limits(body_bytes=2000), max_tokens_per_request=100)
    assert client.post("/rerank", content=b"{").json()["message"].startswith("the body is not JSON:")
    large = ask(client, documents=["x" * 3000])
    assert (large.status_code, large.json()["error"]["code"]) == (413, 413)
    assert large.json()["message"] == "the body has more than 2000 bytes: send fewer or shorter documents"

    def parts():
        yield b'{"query": "'
        yield b"x" * 3000

    assert client.post("/rerank", content=parts()).status_code == 413  # without a Content-Length
    many = ask(client, documents=[f"honey bees {number}" for number in range(10)])
    assert many.status_code == 413
    assert many.json()["message"].startswith("the request has more than 100 tokens, which is the limit: send fewer")
    # Each pair renders its query: a small body can be a large amount of text.
    wide = ask(client, query="x" * 300, documents=[str(number) for number in range(30)])
    assert (wide.status_code, wide.json()["message"][:33]) == (413, "the prompts have 9050 characters,")
    zipped = client.post("/rerank", content=b"zipped", headers={"Content-Encoding": "gzip"})
    assert zipped.status_code == 415
    assert client.get("/nothing").json()["message"] == "Not Found"
    assert client.get("/nothing").status_code == 404
    assert client.get("/rerank").status_code == 405


class Slow:
    """An engine that waits for a signal."""

    def __init__(self, engine):
        self.engine, self.go, self.fails = engine, threading.Event(), None

    def logits(self, sequences, **options):
        assert self.go.wait(timeout=20)
        if self.fails is not None:
            raise self.fails
        return self.engine.logits(sequences, **options)


def make_slow(client, cross_encoder):
    slow = Slow(cross_encoder.engine())
    client.reranker.batcher._engine = lambda: slow
    return slow


def test_a_full_queue(serve, cross_encoder):
    client = serve(max_waiting=1)
    slow = make_slow(client, cross_encoder)
    answers = []
    first = threading.Thread(target=lambda: answers.append(ask(client)))
    first.start()
    while not client.reranker.batcher.num_waiting:
        time.sleep(0.01)
    refused = ask(client)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert "1 requests are waiting, which is the limit" in refused.json()["message"]
    busy = client.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS, "truncate": True})
    assert (busy.status_code, busy.json()["error_type"]) == (429, "Overloaded")
    slow.go.set()
    first.join()
    assert answers[0].status_code == 200


def test_the_bodies_of_all_requests_are_limited(serve, cross_encoder):
    client = serve(limits=Limits(all_bodies_bytes=2000))
    slow = make_slow(client, cross_encoder)
    answers = []
    first = threading.Thread(target=lambda: answers.append(ask(client, documents=["a" * 1200])))
    first.start()
    while not client.reranker.batcher.num_waiting:
        time.sleep(0.01)
    refused = ask(client, documents=["b" * 1200])
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert refused.json()["message"] == ("the requests in progress have more than 2000 bytes together: ask again later")
    slow.go.set()
    first.join()
    assert answers[0].status_code == 200
    assert ask(client, documents=["b" * 1200]).status_code == 200


def test_a_deadline(serve, cross_encoder):
    client = serve(limits=Limits(seconds=0.3), max_waiting=1)
    slow = make_slow(client, cross_encoder)
    late = ask(client)
    assert late.status_code == 504
    assert late.json()["message"].startswith("no answer within 0.3 s")
    assert client.reranker.batcher.num_waiting == 0
    slow.go.set()


def test_a_client_that_hangs_up_frees_its_place(serve, cross_encoder):
    client = serve()
    slow = make_slow(client, cross_encoder)
    body = json.dumps({"query": QUERY, "documents": DOCUMENTS}).encode()
    messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
    sent = []

    async def call():
        scope = {"type": "http", "method": "POST", "path": "/rerank", "headers": [], "query_string": b""}
        scope |= {"http_version": "1.1", "scheme": "http", "root_path": "", "client": None, "server": None}

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        await asyncio.wait_for(client.app({**scope}, receive, send), timeout=10)

    asyncio.run(call())
    assert sent[0]["status"] == 499
    slow.go.set()
    assert ask(client).status_code == 200
    assert client.reranker.batcher.num_waiting == 0


@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.OutOfMemoryError("no memory"), 507), (RuntimeError("a worker process died"), 500)],
)
def test_a_failure_of_the_device_is_one_error(serve, cross_encoder, error, status, caplog):
    client = serve()
    slow = make_slow(client, cross_encoder)
    slow.go.set()
    slow.fails = error
    failed = ask(client)
    assert failed.status_code == status
    assert str(error) in failed.json()["message"]
    slow.fails = None
    assert ask(client).status_code == 200


def test_nan_is_one_error(serve, cross_encoder):
    client = serve()
    weight = cross_encoder.model.score.weight
    kept = weight.data.clone()
    weight.data.fill_(torch.nan)
    failed = ask(client)
    assert failed.status_code == 500
    assert failed.json()["message"].startswith("the score of document 0 is nan: ")
    weight.data.copy_(kept)
    assert ask(client).status_code == 200


@pytest.mark.parametrize("given", [None, "Bearer wrong", "Bearer ", "secret-key", "Basic secret-key", "Bearer sécret"])
def test_a_wrong_key(serve, given):
    client = serve(api_key="secret-key")
    headers = {} if given is None else {"Authorization": given.encode()}
    answer = client.post("/rerank", json={"query": "q", "documents": ["a"]}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "invalid_request_error")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/models", headers=headers).status_code == 401
    assert client.get("/metrics", headers=headers).status_code == 401
    assert client.get("/health", headers=headers).json() == {"status": "ready"}
    assert client.head("/health").status_code == client.head("/").status_code == client.get("/").status_code == 200
    assert client.get("/redoc").status_code == 404


@pytest.mark.parametrize("given", ["Bearer secret-key", "bearer secret-key", "Bearer  secret-key"])
def test_a_right_key(serve, given):
    client = serve(api_key="secret-key")
    right = {"Authorization": given}
    assert client.post("/rerank", json={"query": "q", "documents": ["a"]}, headers=right).status_code == 200
    assert client.get("/v1/models", headers=right).json()["data"][0]["id"] == "tiny"


def test_a_body_of_wrong_elements_gives_one_error(monkeypatch):
    """Pydantic would collect an error for each element of each alternative, which takes seconds and gigabytes."""
    with pytest.raises(ValidationError) as raised:
        RerankBody.model_validate({"query": "q", "documents": [1] * 1000})
    assert raised.value.error_count() <= 2
    with pytest.raises(ValidationError) as raised:
        ScoreBody.model_validate({"text_1": "q", "text_2": [1] * 1000})
    assert raised.value.error_count() <= 2
    with pytest.raises(BodyError, match="documents: at most 10 are allowed, got 1000"):
        read_rerank({"query": "q", "documents": [1] * 1000}, 10)


def test_no_text_is_logged_and_metrics_count(serve, cross_encoder, caplog):
    client = serve()
    with caplog.at_level(logging.INFO):
        ask(client, documents=["SECRET one", "SECRET two"])
        ask(client, documents=["SECRET"], query="SECRET", instruction="SECRET " * 90)
        slow = make_slow(client, cross_encoder)
        slow.go.set()
        slow.fails = ValueError("SECRET")
        ask(client, documents=["SECRET"])
    assert "SECRET" not in caplog.text
    assert [
        record.getMessage().rsplit(" ", 2)[0] for record in caplog.records if record.getMessage().endswith(" ms")
    ] == [
        "/v1/rerank 200",
        "/v1/rerank 422",
        "/v1/rerank 422",
    ]
    lines = client.get("/metrics").text.splitlines()
    assert 'llama_bidir_requests_total{route="/v1/rerank",status="200"} 1.0' in lines
    assert 'llama_bidir_requests_total{route="/v1/rerank",status="422"} 2.0' in lines
    assert "llama_bidir_pairs_total 2.0" in lines
    assert "llama_bidir_waiting_requests 0.0" in lines


def test_answers_are_the_same_under_load(serve, cross_encoder):
    """1,000 requests at once, large and small, each with its own texts."""
    client = serve()
    rng = np.random.default_rng(0)
    bodies = [
        [f"{'bees ' * int(rng.integers(0, 9))}{number} {place}" for place in range(30 if number % 50 == 0 else 2)]
        for number in range(1000)
    ]
    expected = cross_encoder.rank_batch([QUERY] * 1000, bodies, show_progress_bar=False)

    async def ask_all():
        import httpx

        transport = httpx.ASGITransport(app=client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120) as web:
            return await asyncio.gather(
                *(web.post("/rerank", json={"query": QUERY, "documents": each}) for each in bodies)
            )

    answers = asyncio.run(ask_all())
    assert {answer.status_code for answer in answers} == {200}
    for answer, ranking in zip(answers, expected, strict=True):
        found = {each["index"]: each["relevance_score"] for each in answer.json()["results"]}
        assert_close([found[each["corpus_id"]] for each in ranking], [each["score"] for each in ranking])


def test_the_page_asks_nobody_else(serve):
    client = serve()
    page = client.get("/").text
    assert "http://" not in page
    assert "https://" not in page
    assert 'lang="en"' in page
    schema = client.get("/openapi.json").json()
    assert {"/rerank", "/v1/rerank", "/v2/rerank", "/score", "/health", "/v1/models", "/metrics"} <= schema[
        "paths"
    ].keys()
    body = schema["paths"]["/rerank"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert [one["title"] for one in body["oneOf"]] == ["RerankBody", "TeiBody"]
    assert "$ref" not in json.dumps(body)

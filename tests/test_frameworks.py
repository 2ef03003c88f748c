"""The blocks of docs/frameworks.md, each run with the framework itself."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers import make_model, make_tokenizer

from llama_bidir import CrossEncoder
from llama_bidir.checkpoints.export import export_reranker

PAGE = (Path(__file__).parents[1] / "docs" / "frameworks.md").read_text(encoding="utf-8")
QUERY = "how do bees find their way?"
THEIR_OWN = "The frameworks' own wrappers"
PASSAGES = ["By the sun.", "A hive holds a queen.", "Trains run on rails.", "They see polarised light.", ""]


@pytest.fixture
def ranking(tmp_path, monkeypatch):
    """Saves the reranker that the page names and returns its best three passages, with their scores."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")
    reranker = CrossEncoder(make_model(temperature=0.5, rerank_max_length=48), tokenizer)
    reranker.save_pretrained("my-reranker")
    return [(PASSAGES[item["corpus_id"]], item["score"]) for item in reranker.rank(QUERY, PASSAGES, top_k=3)]


def run_block(section: str, number: int = 0) -> dict:
    """Runs a block of a section and returns the names that it defines."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.split(f"\n## {section}\n")[1], flags=re.DOTALL)
    names: dict = {"__name__": "page"}
    exec(compile(blocks[number].replace("512", "48"), section, "exec"), names)
    return names


def assert_same(found, expected):
    assert [text for text, _ in found] == [text for text, _ in expected]
    np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], rtol=1e-5, atol=1e-6)


def test_langchain(ranking):
    pytest.importorskip("langchain_classic")
    from langchain_core.documents import Document

    names = run_block("LangChain")
    found = names["compressor"].compress_documents([Document(text) for text in PASSAGES], QUERY)
    scores = names["compressor"].model.score([(QUERY, text) for text in PASSAGES])
    assert_same([(document.page_content, scores[PASSAGES.index(document.page_content)]) for document in found], ranking)


def test_llama_index(ranking):
    schema = pytest.importorskip("llama_index.core.schema")
    nodes = [schema.NodeWithScore(node=schema.TextNode(text=text), score=0.0) for text in PASSAGES]
    found = run_block("LlamaIndex")["postprocessor"].postprocess_nodes(nodes, query_str=QUERY)
    assert_same([(item.node.text, item.score) for item in found], ranking)
    assert {item.score for item in nodes} == {0.0}


def test_haystack(ranking):
    haystack = pytest.importorskip("haystack")
    pipeline = haystack.Pipeline()
    pipeline.add_component("ranker", run_block("Haystack")["ranker"])
    documents = [haystack.Document(content=text) for text in PASSAGES]
    found = pipeline.run({"ranker": {"query": QUERY, "documents": documents}})["ranker"]["documents"]
    assert_same([(document.content, document.score) for document in found], ranking)


def test_rerankers(ranking):
    pytest.importorskip("rerankers")
    ranker = run_block("rerankers")["ranker"]
    found = ranker.rank(QUERY, PASSAGES)
    assert [item.doc_id for item in found] == [PASSAGES.index(item.text) for item in found]
    assert_same([(item.text, item.score) for item in found.top_k(3)], ranking)
    assert ranker.score(QUERY, ranking[0][0]) == pytest.approx(ranking[0][1], rel=1e-5)


@pytest.fixture
def exported(ranking):
    export_reranker("my-reranker", "my-reranker-st", format="sentence-transformers")
    return "my-reranker-st"


def test_langchains_own_cross_encoder(ranking, exported):
    pytest.importorskip("langchain_community")
    texts = [text for text, _ in ranking]
    scores = run_block(THEIR_OWN, 0)["cross_encoder"].score([(QUERY, text) for text in texts])
    assert_same(list(zip(texts, scores, strict=True)), ranking)


def test_llama_indexs_own_postprocessor(ranking, exported):
    pytest.importorskip("llama_index.postprocessor.sbert_rerank")
    schema = pytest.importorskip("llama_index.core.schema")
    nodes = [schema.NodeWithScore(node=schema.TextNode(text=text), score=0.0) for text in PASSAGES]
    found = run_block(THEIR_OWN, 1)["postprocessor"].postprocess_nodes(nodes, query_str=QUERY)
    assert_same([(item.node.text, item.score) for item in found], ranking)


def test_haystacks_own_ranker(ranking, exported):
    pytest.importorskip("haystack_integrations.components.rankers.sentence_transformers")
    haystack = pytest.importorskip("haystack")
    documents = [haystack.Document(content=text) for text in PASSAGES]
    found = run_block(THEIR_OWN, 2)["ranker"].run(query=QUERY, documents=documents)
    assert_same([(document.content, document.score) for document in found["documents"]], ranking)

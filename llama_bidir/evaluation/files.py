"""BEIR and TREC files: a corpus, queries, qrels and runs."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from .measures import Qrels, Run


def write_corpus(path: str | os.PathLike[str], corpus: Mapping[str, str]) -> None:
    """Writes documents as BEIR JSONL (`_id`, `title`, `text`); the title is empty."""
    rows = [{"_id": doc_id, "title": "", "text": text} for doc_id, text in corpus.items()]
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_queries(path: str | os.PathLike[str], queries: Mapping[str, str]) -> None:
    """Writes queries as BEIR JSONL (`_id`, `text`)."""
    rows = [{"_id": query_id, "text": text} for query_id, text in queries.items()]
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_qrels(path: str | os.PathLike[str], qrels: Qrels) -> None:
    """Writes qrels as BEIR TSV with its header."""
    lines = ["query-id\tcorpus-id\tscore"]
    lines += [f"{query_id}\t{doc_id}\t{value}" for query_id, docs in qrels.items() for doc_id, value in docs.items()]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_run(path: str | os.PathLike[str], run: Run, tag: str) -> None:
    """Writes a 6-column TREC run, by falling score; ranks are 1-based and equal scores keep their order."""
    lines = []
    for query_id, docs in run.items():
        ranked = sorted(docs.items(), key=lambda item: -item[1])
        lines += [
            f"{query_id} Q0 {doc_id} {rank} {score!r} {tag}" for rank, (doc_id, score) in enumerate(ranked, start=1)
        ]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")

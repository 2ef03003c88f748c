"""BEIR and TREC files: a corpus, queries, qrels and runs."""

import json
import os
from collections.abc import Collection, Container, Iterable, Mapping
from pathlib import Path

from ..data import trec
from ..data.files import check_file
from .measures import Qrels, Run


def read_qrels(path: str | os.PathLike[str]) -> dict[str, dict[str, int]]:
    """
    Reads qrels, BEIR's TSV with its header or TREC's four columns; `.gz` is decompressed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line breaks its rule, or a document is judged twice and differently, with file and line.
    """
    path = check_file(path)
    qrels: dict[str, dict[str, int]] = {}
    for line, query_id, doc_id, relevance in trec.read_qrels(path):
        first = qrels.setdefault(query_id, {}).setdefault(doc_id, relevance)
        if first != relevance:
            raise ValueError(
                f"{path}:{line}: score: the document {doc_id!r} of query {query_id!r} is judged {relevance} here and "
                f"{first} in line {_first_line(trec.read_qrels(path), query_id, doc_id)}; keep one of the lines"
            )
    return qrels


def read_run(path: str | os.PathLike[str]) -> dict[str, dict[str, float]]:
    """
    Reads a TREC run of six columns; `.gz` is decompressed. Only the scores count, as for trec_eval, not the ranks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line breaks its rule, or a query has a document twice, with file and line.
    """
    path = check_file(path)
    run: dict[str, dict[str, float]] = {}
    for line, query_id, doc_id, _, score in trec.read_run(path):
        documents = run.setdefault(query_id, {})
        if doc_id in documents:
            raise ValueError(
                f"{path}:{line}: doc-id: the query {query_id!r} has the document {doc_id!r} already, in line "
                f"{_first_line(trec.read_run(path), query_id, doc_id)}; keep one of the lines"
            )
        documents[doc_id] = score
    return run


def read_queries(path: str | os.PathLike[str], qrels: Qrels, qrels_path: str | os.PathLike[str]) -> dict[str, str]:
    """
    Reads the texts of the judged queries.

    Args:
        path: JSON Lines (`_id`, `text`); `.gz` is decompressed.
        qrels: the judgements.
        qrels_path: where they were read from, for errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line breaks its rule, or a judged query is not there, with file and line.
    """
    texts = trec.read_queries(check_file(path))
    if not qrels.keys() <= texts.keys():
        line, query_id = next(
            (entry.line, entry.query_id) for entry in trec.read_qrels(Path(qrels_path)) if entry.query_id not in texts
        )
        raise ValueError(
            f"{os.fspath(qrels_path)}:{line}: query-id: there is no query {query_id!r} in {os.fspath(path)}; the "
            "queries must hold every judged one"
        )
    return {query_id: texts[query_id] for query_id in qrels}


def read_documents(path: str | os.PathLike[str], keep: Container[str], runs: Mapping[Path, Run]) -> dict[str, str]:
    """
    Reads the texts of some documents of a corpus, without the others in memory.

    Args:
        path: JSON Lines (`_id`, `title`, `text`); `.gz` is decompressed.
        keep: the doc_ids.
        runs: runs whose documents must all be in the corpus, by the file that they were read from.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line breaks its rule, or a document of a run is not there, with file and line.
    """
    unknown = {doc_id for run in runs.values() for documents in run.values() for doc_id in documents}
    texts = {}
    for doc_id, text in trec.read_documents(check_file(path)):
        unknown.discard(doc_id)
        if doc_id in keep:
            texts[doc_id] = text
    for run_path, run in runs.items():
        _check_known(run_path, run, unknown, os.fspath(path))
    return texts


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
        for rank, (doc_id, score) in enumerate(ranked, start=1):
            lines.append(f"{query_id} Q0 {doc_id} {rank} {float(score)!r} {tag}")
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _first_line(entries: Iterable[trec.Judgement | trec.RunEntry], query_id: str, doc_id: str) -> int:
    """Returns the line of a document of a query; read again, so that good files cost no memory for their lines."""
    return next(entry.line for entry in entries if (entry.query_id, entry.doc_id) == (query_id, doc_id))


def _check_known(path: Path, run: Run, unknown: Collection[str], corpus: str) -> None:
    if not any(doc_id in unknown for documents in run.values() for doc_id in documents):
        return
    for entry in trec.read_run(path):
        if entry.query_id in run and entry.doc_id in unknown:
            raise ValueError(
                f"{path}:{entry.line}: doc-id: there is no document {entry.doc_id!r} in {corpus}; the corpus must hold "
                "every document of the run"
            )

"""Training rows of a folder in BEIR's layout: relevant documents from qrels, negatives from a first-stage run."""

import os
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..utils.extras import require
from .arrow import (
    DocumentFiles,
    FileStamp,
    check_documents,
    error_record,
    index_documents,
    row_features,
    row_record,
    stamp,
    write_dataset,
)
from .files import check_file
from .rows import Row
from .trec import Judgement, read_documents, read_qrels, read_queries, read_run

if TYPE_CHECKING:
    from datasets import Dataset

QRELS_NAMES = ("qrels.tsv", "qrels.tsv.gz", "qrels/train.tsv", "qrels/train.tsv.gz", "qrels.trec", "qrels.txt")
UNKNOWN = -1


class BeirFiles(NamedTuple):
    """The files of a BEIR folder, beside its runs."""

    corpus: Path
    queries: Path
    qrels: Path


def load_beir(
    folder: Path,
    *,
    qrels: str | None = None,
    run: str | None = None,
    depth: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple["Dataset", "Dataset"]:
    """
    Reads a BEIR folder: a row for each query with a relevant document, in the order of the qrels. Its negatives are
    the documents of the run that are not judged relevant, by rank; a query without a run entry has none.

    Args:
        folder, qrels, run: see [`find_files`].
        depth: how many documents of the run to look at for each query; None is all of them.
        cache_dir: see [`write_dataset`].

    Returns:
        the records of the rows, whose passages are row numbers, and the documents (column `text`) that these count in.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a line of a file breaks its rule, or no query has a relevant document. A query whose text or whose
            documents are not in the folder becomes a record with `error`.
    """
    datasets = require("datasets", "train")
    files, run_path = find_files(folder, qrels=qrels), find_run(folder, run)
    text = datasets.Value("string")
    documents = write_dataset(
        _generate_documents,
        datasets.Features(id=text, text=text),
        {"path": os.fspath(files.corpus), "state": stamp(files.corpus)},
        cache_dir,
    )
    arguments = {
        "documents": check_documents(documents, os.fspath(files.corpus)),
        "queries": os.fspath(files.queries),
        "qrels": os.fspath(files.qrels),
        "run": os.fspath(run_path),
        "depth": depth,
        "states": tuple(map(stamp, files)),
    }
    return write_dataset(_generate_rows, row_features("int64"), arguments, cache_dir), documents


def find_files(folder: Path, *, qrels: str | None = None) -> BeirFiles:
    """
    Finds the files of a BEIR folder.

    Args:
        folder: holds `corpus.jsonl` and `queries.jsonl`, each maybe with `.gz`.
        qrels: a path in the folder (or absolute); by default the one file of `qrels.tsv`, `qrels/train.tsv`,
            `qrels.trec`, `qrels.txt`.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: several could be meant, with their names.
    """
    return BeirFiles(
        corpus=_choose(folder, "corpus", None, ["corpus.jsonl", "corpus.jsonl.gz"], "corpus.jsonl or corpus.jsonl.gz"),
        queries=_choose(
            folder, "queries", None, ["queries.jsonl", "queries.jsonl.gz"], "queries.jsonl or queries.jsonl.gz"
        ),
        qrels=_choose(folder, "qrels", qrels, QRELS_NAMES, "qrels.tsv or qrels/train.tsv"),
    )


def find_run(folder: Path, run: str | None = None) -> Path:
    """
    Finds a run in a BEIR folder: a path in it (or an absolute one), by default the one of `run*.trec`, `run*.trec.gz`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several, with their names.
    """
    return _choose(folder, "run", run, list_runs(folder), "run*.trec or run*.trec.gz")


def list_runs(folder: Path) -> list[str]:
    """Returns the names of the runs in a folder."""
    return sorted(file.name for pattern in ("run*.trec", "run*.trec.gz") for file in folder.glob(pattern))


def _choose(folder: Path, kind: str, name: str | None, candidates: Iterable[str], rule: str) -> Path:
    if name is not None:
        return check_file(folder / name)
    found = [candidate for candidate in candidates if (folder / candidate).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder}: there is no {rule} in the folder")
    if len(found) > 1:
        fix = f"name one with {kind}:" if kind in ("qrels", "run") else "remove one"
        raise ValueError(f"{folder}: there are several files of {kind}: {', '.join(found)}; {fix}")
    return folder / found[0]


def _generate_documents(path: str, state: FileStamp, version: int) -> Iterator[dict[str, str]]:
    for doc_id, text in read_documents(Path(path)):
        yield {"id": doc_id, "text": text}


def _generate_rows(
    documents: DocumentFiles,
    queries: str,
    qrels: str,
    run: str,
    depth: int | None,
    states: tuple[FileStamp, ...],
    version: int,
) -> Iterator[dict[str, Any]]:
    judgements = _read_judgements(Path(qrels))
    texts = read_queries(Path(queries))
    index = index_documents(documents)
    entries = _read_entries(Path(run), judgements, index)
    for query_id, judged in judgements.items():
        relevant = [judgement for judgement in judged.values() if judgement.relevance >= 1]
        if not relevant:
            continue
        try:
            if query_id not in texts:
                raise ValueError(f"{qrels}:{relevant[0].line}: query-id: there is no query {query_id!r} in {queries}")
            positives = [_find(index, judgement.doc_id, f"{qrels}:{judgement.line}") for judgement in relevant]
            ranked = _rank(entries.get(query_id, array("q")), run)[:depth]
            known = set(positives)
            negatives = [number for number in ranked if number not in known]
            yield row_record(Row(texts[query_id], positives, negatives, None, None))
        except ValueError as error:
            yield error_record(error)


def _read_judgements(path: Path) -> dict[str, dict[str, Judgement]]:
    """Returns the judgements of each query by document."""
    judgements: dict[str, dict[str, Judgement]] = {}
    for judgement in read_qrels(path):
        first = judgements.setdefault(judgement.query_id, {}).setdefault(judgement.doc_id, judgement)
        if first.relevance != judgement.relevance:
            raise ValueError(
                f"{path}:{judgement.line}: score: the document {judgement.doc_id!r} of query {judgement.query_id!r} is "
                f"judged {judgement.relevance} here and {first.relevance} in line {first.line}; keep one of the lines"
            )
    if all(judgement.relevance < 1 for judged in judgements.values() for judgement in judged.values()):
        raise ValueError(f"{path}: no query has a relevant document, one with a score of 1 or more")
    return judgements


def _read_entries(path: Path, query_ids: Collection[str], index: Mapping[str, int]) -> dict[str, "array[int]"]:
    """Returns rank, line and row number of each entry of the queries, flat, as a run can have very many of them."""
    entries: dict[str, array[int]] = {}
    for entry in read_run(path):
        if entry.query_id in query_ids:
            number = index.get(entry.doc_id, UNKNOWN)
            entries.setdefault(entry.query_id, array("q")).extend((entry.rank, entry.line, number))
    if not entries:
        raise ValueError(f"{path}: the run has no entry for a query of the qrels; they must be about the same queries")
    return entries


def _rank(entries: "array[int]", run: str) -> list[int]:
    """Returns the row numbers of a query's entries by rank, and in the order of the file where ranks are equal."""
    numbers: dict[int, int] = {}
    for _, line, number in sorted(zip(entries[::3], entries[1::3], entries[2::3], strict=True)):
        if number == UNKNOWN:
            raise ValueError(f"{run}:{line}: doc-id: there is no such document in the corpus")
        if numbers.setdefault(number, line) != line:
            raise ValueError(f"{run}:{line}: doc-id: the query has the document already, in line {numbers[number]}")
    return list(numbers)


def _find(index: Mapping[str, int], doc_id: str, where: str) -> int:
    if doc_id not in index:
        raise ValueError(f"{where}: corpus-id: there is no document {doc_id!r} in the corpus")
    return index[doc_id]

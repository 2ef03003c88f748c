"""Rows to mine negatives for, with all that their source says of them."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...data import load_rows
from ...data.arrow import FileStamp, stamp, write_dataset
from ...data.beir_folder import BeirFiles, find_files, find_run, list_runs
from ...data.corpus import Corpus, open_corpus
from ...data.files import read_id, read_json, read_json_lines
from ...data.hub import PREFIX
from ...data.trec import read_qrels, read_queries
from ...utils.extras import require
from ...utils.validation import describe
from .documents import number_documents
from .windows import as_list

QUERY_IDS = ("query_id", "question_id", "_id")
DOC_IDS = ("id", "_id", "doc_id")


class SourceRow(NamedTuple):
    """
    A row as its source has it.

    Args:
        where: what errors call it, such as `train.jsonl:12`.
        fields: of the training schema and others. Passages that the source names by identifier are there as texts.
        positive_ids: identifiers of its positives, where the source has some.
    """

    where: str
    fields: dict[str, Any]
    positive_ids: frozenset[str] = frozenset()

    @property
    def query_id(self) -> str:
        """The identifier that a run calls the query by; raises ValueError where there is none."""
        name = next((name for name in QUERY_IDS if self.fields.get(name) is not None), None)
        if name is None:
            raise ValueError(
                f"{self.where}: a row must have query_id, question_id or _id to be found in a run; add one, or leave "
                "the run out"
            )
        return read_id(self.fields, name, self.where)


class MiningSource(NamedTuple):
    """
    Where rows come from.

    Args:
        read: yields the rows, from the start at each call; what breaks its rule raises ValueError.
        stamps: what changes when the rows do.
        corpus, run: of a BEIR folder; the run only where there is one.
    """

    read: Callable[[], Iterator[SourceRow]]
    stamps: list[str]
    corpus: Corpus | None = None
    run: Path | None = None
    files: Sequence[Path] = ()


def describe_state(path: str | os.PathLike[str]) -> str:
    """Path, size and time of change of a file, which tell two states of it apart."""
    state = stamp(path)
    return f"{state.path} ({state.size} bytes, changed at {state.mtime_ns} ns)"


def open_source(
    source: str, *, qrels: str | None = None, run: str | None = None, takes_run: bool = True
) -> MiningSource:
    """
    Opens the rows that [`load_rows`] reads under the same name.

    All fields of a row are kept where the source is a `*.jsonl` file or a `*.json` file of the corpus-id layout, whose
    passages become texts. Rows of a BEIR folder, one for each query with a relevant document, have `query_id`, `query`
    and `pos_doc`; those of the Hub have the fields of the training schema.

    Args:
        source: a `*.jsonl`, `*.jsonl.gz`, `*.json` or `*.json.gz` file, `hf://org/repo/subset`, or a BEIR folder.
        qrels: of a BEIR folder, a path in it (see [`find_files`]).
        run: of a BEIR folder, instead of its own one.
        takes_run: whether a run of a BEIR folder is of use.

    Raises:
        FileNotFoundError, OSError: it is not there or cannot be read.
        ValueError: it breaks its rule. Lines of a `*.jsonl` file are not looked at yet.
    """
    path, name = Path(source), source.lower()
    if path.is_dir() and not source.startswith(PREFIX):
        return _open_beir(path, qrels, run, takes_run=takes_run)
    if qrels is not None:
        raise ValueError(f"{source}: qrels can be given for a BEIR folder only, and this is none")
    if name.endswith((".jsonl", ".jsonl.gz")):
        return MiningSource(lambda: _read_jsonl(path), [describe_state(path)], files=[path])
    dataset = load_rows(source)
    if name.endswith((".json", ".json.gz")):
        # Memory-mapped like the rows, so that the fields beside the schema need no memory either.
        datasets = require("datasets", "train")
        features = datasets.Features(row=datasets.Value("string"))
        records = write_dataset(_generate_data, features, {"path": os.fspath(path), "state": stamp(path)}, None)
        return MiningSource(lambda: _read_corpus_id(path, dataset, records), [describe_state(path)], files=[path])
    return MiningSource(lambda: _read_dataset(source, dataset), [f"{source} ({dataset._fingerprint})"])


def _read_jsonl(path: Path) -> Iterator[SourceRow]:
    for number, fields in read_json_lines(path):
        yield SourceRow(f"{path}:{number}", fields, _find_ids(fields))


def _find_ids(fields: Mapping[str, Any]) -> frozenset[str]:
    """Identifiers of positives that are objects, beside their text."""
    return frozenset().union(*map(identify, as_list(fields.get("pos_doc"))))


def identify(passage: Any) -> frozenset[str]:
    """Identifiers of a passage that is an object, beside its text."""
    if not isinstance(passage, Mapping):
        return frozenset()
    return frozenset(str(passage[name]) for name in DOC_IDS if passage.get(name) is not None)


def _read_corpus_id(path: Path, dataset: Any, records: Any) -> Iterator[SourceRow]:
    for number, (row, record) in enumerate(zip(dataset, records, strict=True)):
        fields = json.loads(record["row"])
        items = as_list(fields["pos_doc"])
        ids = frozenset(str(item["id"] if isinstance(item, Mapping) else item) for item in items)
        # The scores of the documents, if they had some, are in the rows.
        texts = {name: row[name] for name in ("pos_doc", "neg_doc")}
        yield SourceRow(f"{path}: data[{number}]", {**fields, **texts, "pos_score": None, "neg_score": None}, ids)


def _generate_data(path: str, state: FileStamp, version: int) -> Iterator[dict[str, str]]:
    for row in read_json(Path(path))["data"]:
        yield {"row": json.dumps(row)}


def _read_dataset(source: str, dataset: Any) -> Iterator[SourceRow]:
    for number, row in enumerate(dataset):
        yield SourceRow(f"{source}: row {number}", row)


def _open_beir(folder: Path, qrels: str | None, run: str | None, *, takes_run: bool) -> MiningSource:
    files = find_files(folder, qrels=qrels)
    run_path = None
    if takes_run and (run is not None or list_runs(folder)):  # BM25 can search the corpus of a folder without one
        run_path = find_run(folder, None if run is None else os.path.abspath(run))
    corpus = open_corpus(files.corpus)
    queries = read_queries(files.queries)
    relevant = _read_relevant(files, corpus, queries)
    return MiningSource(
        lambda: _read_beir(files, corpus, queries, relevant),
        [describe_state(path) for path in (files.corpus, files.queries, files.qrels)],
        corpus,
        run_path,
        [files.corpus, files.queries, files.qrels],
    )


def _read_relevant(files: BeirFiles, corpus: Corpus, queries: Mapping[str, str]) -> dict[str, dict[int, None]]:
    """The numbers of the relevant documents of each query that has some, in the order of the qrels."""
    index = number_documents(corpus)
    judged: dict[tuple[str, str], tuple[int, int]] = {}
    relevant: dict[str, dict[int, None]] = {}
    for line, query_id, doc_id, value in read_qrels(files.qrels):
        where = f"{files.qrels}:{line}"
        first, first_line = judged.setdefault((query_id, doc_id), (value, line))
        if first != value:
            raise ValueError(
                f"{where}: score: the document {doc_id!r} of query {query_id!r} is judged {value} here and {first} in "
                f"line {first_line}; keep one of the lines"
            )
        if value < 1:
            continue
        if query_id not in queries:
            raise ValueError(f"{where}: query-id: there is no query {query_id!r} in {files.queries}")
        if doc_id not in index:
            raise ValueError(f"{where}: corpus-id: there is no document {doc_id!r} in {files.corpus}")
        relevant.setdefault(query_id, {})[index[doc_id]] = None
    if not relevant:
        raise ValueError(f"{files.qrels}: no query has a relevant document, one with a score of 1 or more")
    return relevant


def _read_beir(
    files: BeirFiles, corpus: Corpus, queries: Mapping[str, str], relevant: Mapping[str, Mapping[int, None]]
) -> Iterator[SourceRow]:
    for query_id, numbers in relevant.items():
        rows = list(numbers)
        fields = {"query_id": query_id, "query": queries[query_id], "pos_doc": corpus.texts(rows)}
        yield SourceRow(f"{files.qrels}: query {describe(query_id)}", fields, frozenset(corpus.ids(rows)))

"""Rows to mine negatives for, with all fields of their source."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...data import load_rows
from ...data.arrow import FileStamp, stamp, write_dataset
from ...data.beir_folder import RelevantDocuments, find_files, find_run, list_runs
from ...data.corpus import Corpus, open_corpus
from ...data.files import as_id, read_id, read_json, read_json_lines
from ...data.foreign_rows import read_foreign
from ...data.hub import PREFIX
from ...data.identical import QUERY_IDS, identify
from ...data.normalized import find_normalized
from ...data.rows import as_list
from ...data.sources import not_beir
from ...utils.extras import require
from ...utils.validation import describe


class SourceRow(NamedTuple):
    """
    A row as its source has it.

    Args:
        where: the name of the row in errors, such as `train.jsonl:12`.
        fields: of the training schema and others. Texts stand in place of passages that the source names by identifier.
        positive_ids: identifiers of its positives, if the source has some.
    """

    where: str
    fields: dict[str, Any]
    positive_ids: frozenset[str] = frozenset()

    @property
    def query_id(self) -> str:
        """The identifier of the query in a run; raises ValueError when the row has none."""
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
        read: yields the rows, from the start at each call; raises ValueError for one that breaks its rule.
        stamps: strings that change when the rows do.
        corpus, run: of a BEIR folder; None for a run that it does not have.
        files: the files that are read.
    """

    read: Callable[[], Iterator[SourceRow]]
    stamps: list[str]
    corpus: Corpus | None = None
    run: Path | None = None
    files: Sequence[Path] = ()


def describe_state(path: str | os.PathLike[str]) -> str:
    """Describes the state of a file (see [`stamp`]) as text, to compare it with another state."""
    state = stamp(path)
    return f"{state.path} ({state.size} bytes, changed at {state.mtime_ns} ns, content {state.content})"


def open_source(
    source: str,
    *,
    qrels: str | None = None,
    run: str | None = None,
    takes_run: bool = True,
    ignore_identical_ids: bool = True,
) -> MiningSource:
    """
    Opens the rows that [`load_rows`] reads under the same name.

    Rows of a `*.jsonl` file, or of a `*.json` file in the corpus-id layout, keep all their fields, and the latter get
    texts for their passages. Fields of other tools become ours (see [`~data.foreign_rows`]). Rows of a BEIR folder, one
    for each query with a relevant document, have `query_id`, `query`, `pos_doc` and, if the qrels are graded,
    `pos_relevance`. Rows of the Hub and of a folder in the normalized Arrow layout have the fields of the training
    schema.

    Args:
        source: a `*.jsonl`, `*.jsonl.gz`, `*.json` or `*.json.gz` file, `hf://org/repo/subset`, or a BEIR folder.
        qrels: for a BEIR folder, a path in it (see [`find_files`]).
        run: for a BEIR folder, the path of a run to use instead of its own.
        takes_run: whether to look for a run in a BEIR folder.
        ignore_identical_ids: see [`load_rows`], for rows that it reads.

    Raises:
        FileNotFoundError, OSError: the source is missing or cannot be read.
        ValueError: the source breaks its rule. Lines of a `*.jsonl` file are not read yet.
    """
    path, name = Path(source), source.lower()
    is_normalized = not source.startswith(PREFIX) and find_normalized(path) is not None
    if path.is_dir() and not source.startswith(PREFIX) and not is_normalized:
        return _open_beir(path, qrels, run, takes_run=takes_run)
    if qrels is not None:
        raise not_beir(source, ["qrels"])
    if name.endswith((".jsonl", ".jsonl.gz")):
        return MiningSource(lambda: _read_jsonl(path), [describe_state(path)], files=[path])
    dataset = load_rows(source, ignore_identical_ids=ignore_identical_ids)
    if name.endswith((".json", ".json.gz")) and not is_normalized:
        # Memory-mapped like the rows, so the fields beside the schema need no memory either.
        datasets = require("datasets", "train")
        features = datasets.Features(row=datasets.Value("string"))
        records = write_dataset(_generate_data, features, {"path": os.fspath(path), "state": stamp(path)}, None)
        return MiningSource(lambda: _read_corpus_id(path, dataset, records), [describe_state(path)], files=[path])
    return MiningSource(lambda: _read_dataset(source, dataset), [f"{source} ({dataset._fingerprint})"])


def _read_jsonl(path: Path) -> Iterator[SourceRow]:
    for number, given in read_json_lines(path):
        fields, _ = read_foreign(given, f"{path}:{number}")
        yield SourceRow(f"{path}:{number}", fields, _find_ids(fields))


def _find_ids(fields: Mapping[str, Any]) -> frozenset[str]:
    """Identifiers of positives that are objects, beside their text."""
    return frozenset().union(*map(identify, as_list(fields.get("pos_doc"))))


def _read_corpus_id(path: Path, dataset: Any, records: Any) -> Iterator[SourceRow]:
    for number, (row, record) in enumerate(zip(dataset, records, strict=True)):
        fields = json.loads(record["row"])
        items = as_list(fields["pos_doc"])
        ids = frozenset(as_id(item["id"] if isinstance(item, Mapping) else item) for item in items)
        # Any scores of the source belong to its own negatives.
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
    documents = RelevantDocuments(files, corpus.index())
    documents.drop_missing()
    relevant = {query_id: documents.read(query_id) for query_id in documents.judgements}
    return MiningSource(
        lambda: _read_beir(files.qrels, corpus, relevant), list(map(describe_state, files)), corpus, run_path, files
    )


def _read_beir(
    qrels: Path, corpus: Corpus, relevant: Mapping[str, tuple[str, list[int], list[float]]]
) -> Iterator[SourceRow]:
    for query_id, (query, rows, relevance) in relevant.items():
        fields: dict[str, Any] = {"query_id": query_id, "query": query, "pos_doc": corpus.texts(rows)}
        if set(relevance) != {1.0}:
            fields["pos_relevance"] = relevance
        yield SourceRow(f"{qrels}: query {describe(query_id)}", fields, frozenset(corpus.ids(rows)))

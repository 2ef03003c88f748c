"""
Training rows that name their passages by identifier, in NeMo AutoModel's corpus-id layout.

A JSON file holds `corpus`, the folders of documents, and `data`, the rows. Each folder holds documents and a
`merlin_metadata.json` with its `class` and `corpus_id`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.extras import require
from ..utils.validation import describe
from .arrow import FileStamp, error_record, load_folder, record_features, row_record, stamp, write_dataset
from .corpus import Corpus, cache_documents, join_texts
from .files import read_id, read_json
from .identical import find_identical, find_query_id
from .rows import PASSAGE_COLUMNS, drop_negatives, parse_row

if TYPE_CHECKING:
    from datasets import Dataset

METADATA = "merlin_metadata.json"
ID_COLUMNS = {"TextQADataset": "id", "WikiSSNQDataset": "docid"}


def load_corpus_id(
    path: Path, cache_dir: str | os.PathLike[str] | None, *, ignore_identical_ids: bool = True
) -> tuple["Dataset", "Dataset"]:
    """
    Reads a JSON file in the corpus-id layout.

    Args:
        path: the file.
        cache_dir, ignore_identical_ids: see [`load_rows`].

    Returns:
        the records of the rows, whose passages are row numbers, and the documents (column `text`) that these refer to.

    Raises:
        FileNotFoundError: the file, a folder of documents or its metadata is missing.
        ValueError: one of them breaks its rule. A row that breaks its rule becomes a record with `error`.
    """
    datasets = require("datasets", "train")
    arguments: dict[str, Any] = {"path": os.fspath(path), "state": stamp(path)}
    # A dataset of its own, so that processes that find both in the cache need not parse the whole file.
    folders = write_dataset(_generate_folders, datasets.Features(folder=datasets.Value("string")), arguments, cache_dir)
    corpora: dict[str, Corpus] = {}
    for index, folder in enumerate(folders["folder"][:]):
        corpus_id, id_column = _read_metadata(Path(folder), f"{path}: corpus[{index}]")
        if corpus_id not in corpora:
            corpora[corpus_id] = open_folder(Path(folder), id_column, cache_dir)
        elif (name := corpora[corpus_id].name) != folder:
            raise ValueError(
                f"{path}: corpus[{index}]: {folder} has the corpus_id {corpus_id!r} of {name}; give each folder a "
                "corpus_id of its own"
            )
    arguments |= {"corpora": corpora, "ignore_identical_ids": ignore_identical_ids}
    rows = write_dataset(_generate_rows, record_features("int64"), arguments, cache_dir)
    return rows, join_texts(corpora.values())


def open_folder(folder: Path, id_column: str, cache_dir: str | os.PathLike[str] | None) -> Corpus:
    """
    Opens the documents of a folder: its JSON Lines files, or whatever `datasets.load_dataset` finds there for `train`.

    Raises:
        ValueError: they cannot be read.
    """
    datasets = require("datasets", "train")
    lines = sorted(file for pattern in ("*.jsonl", "*.jsonl.gz") for file in folder.glob(pattern))
    if lines:
        # Not by `datasets`, which takes the metadata for documents too, and whose errors name no line.
        chosen = [os.fspath(file) for file in lines if "train" in file.name] or [os.fspath(file) for file in lines]
        return Corpus(cache_documents(chosen, cache_dir, id_field=id_column), os.fspath(folder))
    try:
        documents = load_folder(folder, cache_dir)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise ValueError(
            f"{folder}: the documents cannot be read: {reason}; the folder must hold parquet, arrow or jsonl files "
            f"with the columns {id_column} and text"
        ) from error
    return Corpus(documents, os.fspath(folder), id_column=id_column)


def corpus_rows(
    rows: Iterable[tuple[str, Any]],
    corpora: Mapping[str, Corpus],
    *,
    corpus_id: str | None = None,
    first: int = 0,
    ignore_identical_ids: bool = True,
) -> Iterator[dict[str, Any]]:
    """
    Yields the records of rows that name their passages by identifier.

    Args:
        rows: pairs of the name of a row in errors, and the row. A row has `question` (or `query`) and `corpus_id`, and
            identifiers or objects with `id` in `pos_doc` and `neg_doc`. Teacher scores are in `pos_score` and
            `neg_score`, or in the `score` of every object.
        corpora: the corpora by `corpus_id`. Their documents are numbered in this order.
        corpus_id: the corpus of all rows. The rows then need not name it.
        first: the number of the first document.
        ignore_identical_ids: see [`load_rows`].
    """
    indices, starts = {}, {}
    for name, corpus in corpora.items():
        indices[name], starts[name] = corpus.index(first), first
        first += len(corpus)
    for where, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"{where}: a row must be an object with question, corpus_id and pos_doc, got {describe(row)}"
                )
            name = read_id(row, "corpus_id", where) if corpus_id is None else corpus_id
            if name not in indices:
                known = ", ".join(map(repr, indices))
                raise ValueError(f"{where}: corpus_id: there is no corpus {name!r}; the file's corpora are {known}")
            parsed = parse_row(_with_scores(row), where, _passage_reader(name, indices[name]))
            mask = np.zeros(len(parsed.negatives), dtype=bool)
            if ignore_identical_ids and parsed.negatives:
                numbers = [number - starts[name] for number in parsed.negatives]
                mask = find_identical(corpora[name], find_query_id(row), parsed.query, numbers)
            yield row_record(*drop_negatives(parsed, mask.tolist()))
        except ValueError as error:
            yield error_record(error)


def _passage_reader(corpus_id: str, index: Mapping[str, int]) -> Callable[[Any, str], int]:
    def read_number(item: Any, where: str) -> int:
        document_id = read_id(item if isinstance(item, Mapping) else {"id": item}, "id", where)
        if document_id not in index:
            raise ValueError(f"{where}: the corpus {corpus_id!r} has no document {document_id!r}")
        return index[document_id]

    return read_number


def _with_scores(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the row with the `score` of its documents, if each has one, as `pos_score` and `neg_score`."""
    lists = [row.get(field) or [] for field in PASSAGE_COLUMNS]
    has_scores = all(
        isinstance(documents, list)
        and all(isinstance(item, Mapping) and item.get("score") is not None for item in documents)
        for documents in lists
    )
    if not has_scores or row.get("pos_score") is not None or row.get("neg_score") is not None:
        return row
    pos_score, neg_score = ([item["score"] for item in documents] for documents in lists)
    return {**row, "pos_score": pos_score, "neg_score": neg_score}


def _read_metadata(folder: Path, where: str) -> tuple[str, str]:
    """Returns the `corpus_id` of a folder and the column of its documents' identifiers."""
    path = folder / METADATA
    if not path.is_file():
        raise FileNotFoundError(f"{where}: there is no file {os.fspath(path)!r}, which must name class and corpus_id")
    metadata = read_json(path)
    if metadata.get("class") not in ID_COLUMNS:
        raise ValueError(
            f"{path}: class must be one of {', '.join(ID_COLUMNS)}, as only documents with a text are supported, got "
            f"{describe(metadata.get('class'))}"
        )
    return read_id(metadata, "corpus_id", str(path)), ID_COLUMNS[metadata["class"]]


def _generate_folders(path: str, state: FileStamp, version: int) -> Iterator[dict[str, Any]]:
    corpus = read_json(Path(path)).get("corpus")
    entries = [corpus] if isinstance(corpus, Mapping) else corpus
    if not isinstance(entries, list) or not entries:
        raise ValueError(
            f"{path}: corpus must be an object with the path of a folder, or a list of them, got {describe(corpus)}; "
            "rows that hold their texts themselves belong in a .jsonl file, one per line"
        )
    for index, entry in enumerate(entries):
        folder = entry.get("path") if isinstance(entry, Mapping) else None
        if not isinstance(folder, str) or not folder:
            raise ValueError(
                f"{path}: corpus[{index}] must be an object with the path of a folder, got {describe(entry)}"
            )
        yield {"folder": os.path.normpath(os.path.join(os.path.dirname(state.path), folder))}


def _generate_rows(
    path: str, state: FileStamp, corpora: dict[str, Corpus], ignore_identical_ids: bool, version: int
) -> Iterator[dict[str, Any]]:
    data = read_json(Path(path)).get("data")
    if not isinstance(data, list) or not data:
        raise ValueError(f"{path}: data must be a list of rows, got {describe(data)}")
    rows = ((f"{path}: data[{index}]", row) for index, row in enumerate(data))
    yield from corpus_rows(rows, corpora, ignore_identical_ids=ignore_identical_ids)

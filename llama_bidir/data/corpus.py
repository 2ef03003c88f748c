"""A corpus and queries in BEIR's JSON Lines, and the documents of any corpus as a memory-mapped dataset."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..utils.extras import require
from ..utils.validation import check_text, describe
from .arrow import ArrowFiles, FileStamp, iterate_column, stamp, write_dataset
from .files import as_id, check_file, read_id, read_json_lines
from .identical import is_same_text, plain_text, text_key

if TYPE_CHECKING:
    from datasets import Dataset

Numbers = npt.NDArray[np.int64]
ID_TYPES = ("string", "large_string", "int64", "int32")
TEXT_TYPES = ("string", "large_string")
# Columns with a key of each document's text, with and without its title. Only documents from JSON Lines have them.
KEY_COLUMNS = ("whole_key", "text_key")


class Corpus:
    """
    Documents by row number, memory-mapped. A pickle, and so the key of a cache, holds the names of the files alone.

    Args:
        dataset: the documents, with a column of identifiers and the column `text`.
        name: the name of the corpus in errors, such as the path of its file.
        id_column: the column of identifiers, strings or ints.

    Raises:
        ValueError: a column is missing or has another type, or a document has no identifier or no text.
    """

    def __init__(self, dataset: "Dataset", name: str, *, id_column: str = "id"):
        for column, types in ((id_column, ID_TYPES), ("text", TEXT_TYPES)):
            if column not in dataset.column_names:
                columns = ", ".join(dataset.column_names)
                raise ValueError(f"{name}: the documents must have the columns {id_column} and text, got {columns}")
            type_ = getattr(dataset.features[column], "dtype", dataset.features[column])
            if type_ not in types:
                raise ValueError(f"{name}: the column {column} must be one of {', '.join(types)}, got {type_}")
            if (values := dataset.data.column(column)).null_count:
                row = values.is_null().index(True).as_py()
                raise ValueError(f"{name}: row {row}: the document has no {column}")
        self.dataset, self.name, self.id_column = dataset, name, id_column
        self._ids = dataset.select_columns(id_column).with_format("arrow")
        self._texts = dataset.select_columns("text").with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (ArrowFiles.of(self.dataset), self.name, self.id_column)

    @property
    def path(self) -> Path:
        """The path of the file, for a corpus that [`open_corpus`] has opened."""
        return Path(self.name)

    def ids(self, rows: Sequence[int]) -> list[str]:
        """Returns the identifiers of documents."""
        return [as_id(value) for value in self._ids[list(rows)][self.id_column].to_pylist()]

    def texts(self, rows: Sequence[int]) -> list[str]:
        """Returns the texts of documents."""
        return self._texts[list(rows)]["text"].to_pylist()

    def all_ids(self) -> Iterator[str]:
        """Yields the identifier of each document."""
        for part in iterate_column(self.dataset, self.id_column):
            yield from map(as_id, part.to_pylist())

    def all_texts(self) -> Iterator[str]:
        """Yields the text of each document."""
        for part in iterate_column(self.dataset, "text"):
            yield from part.to_pylist()

    def has_text(self, text: str, rows: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Returns which documents have the given text, with or without their title. White space is ignored."""
        rows = np.asarray(rows, dtype=np.int64)
        if not plain_text(text):
            return np.zeros(len(rows), dtype=bool)
        if self._keys is not None:
            return (self._keys[rows] == text_key(text)).any(axis=1)
        column = self.dataset.data.column("text")
        return np.array([is_same_text(text, column[row].as_py()) for row in rows.tolist()], dtype=bool)

    @cached_property
    def _keys(self) -> Numbers | None:
        if not set(KEY_COLUMNS) <= set(self.dataset.column_names):
            return None
        return np.stack([self.dataset.data.column(name).to_numpy() for name in KEY_COLUMNS], axis=1)

    def text_bytes(self) -> Numbers:
        """Returns the length of each document's text in UTF-8 bytes."""
        pc = require("pyarrow.compute", "train")
        return pc.binary_length(self.dataset.data.column("text")).to_numpy().astype(np.int64)

    def index(self, first: int = 0) -> dict[str, int]:
        """
        Returns the row number of each identifier.

        Args:
            first: the number of the first document, where several corpora are numbered in a row.

        Raises:
            ValueError: two documents have the same identifier.
        """
        index: dict[str, int] = {}
        for number, doc_id in enumerate(self.all_ids(), start=first):
            if index.setdefault(doc_id, number) != number:
                raise ValueError(
                    f"{self.name}: row {number - first}: the document {doc_id!r} is there already, in row "
                    f"{index[doc_id] - first}; give each document an identifier of its own"
                )
        return index


def _reopen(files: ArrowFiles, name: str, id_column: str) -> Corpus:
    return Corpus(files.open(), name, id_column=id_column)


def open_corpus(path: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> Corpus:
    """
    Opens a corpus in BEIR's JSON Lines. The first time, the file is read, checked and written as an Arrow file.

    Args:
        path: of the file.
        cache_dir: where the Arrow file is kept (see [`write_dataset`]).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line breaks its rule, with file and line.
    """
    return Corpus(cache_documents([os.fspath(path)], cache_dir), os.fspath(path))


def cache_documents(
    paths: Sequence[str], cache_dir: str | os.PathLike[str] | None, *, id_field: str | None = None
) -> "Dataset":
    """
    Returns the documents of JSON Lines files, with the columns `id`, `text` and `KEY_COLUMNS`.

    Args:
        paths: the files.
        cache_dir: see [`open_corpus`].
        id_field: the field with the identifiers, for files in another format than BEIR's, which have no titles.

    Raises:
        FileNotFoundError, ValueError: as [`open_corpus`] does.
    """
    datasets = require("datasets", "train")
    text = datasets.Value("string")
    arguments = {"paths": tuple(paths), "states": tuple(map(stamp, paths)), "id_field": id_field}
    features = datasets.Features(id=text, text=text, **dict.fromkeys(KEY_COLUMNS, datasets.Value("int64")))
    return write_dataset(_generate_documents, features, arguments, cache_dir)


def join_texts(corpora: Iterable[Corpus]) -> "Dataset":
    """Returns the texts of several corpora, one after another, as a dataset with the column `text`."""
    return require("datasets", "train").concatenate_datasets(
        [corpus.dataset.select_columns("text") for corpus in corpora]
    )


def read_documents(path: Path) -> Iterator[tuple[str, str]]:
    """
    Yields the identifier and the text of each document of a corpus (`_id`, `title`, `text`), in the order of the file.

    A document's text is `title + " " + text`, or just `text` when there is no title.

    Raises:
        ValueError: a line breaks its rule, an `_id` comes twice, or there is no document, with file and line.
    """
    for doc_id, title, text in read_titled_documents(path):
        yield doc_id, join_title(title, text)


def read_titled_documents(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yields the identifier, the title and the text of each document of a corpus, as [`read_documents`] reads it."""
    return _read_texts(path, "document")


def join_title(title: str, text: str) -> str:
    """Returns the text of a document with a title, which may be empty."""
    return f"{title} {text}" if title else text


def read_queries(path: Path) -> dict[str, str]:
    """
    Returns the text of each query of a JSON Lines file (`_id`, `text`), in the order of the file.

    Raises:
        ValueError: a line breaks its rule, an `_id` comes twice, or there is no query, with file and line.
    """
    return {query_id: text for query_id, _, text in _read_texts(path, "query")}


def read_corpus(path: str | os.PathLike[str]) -> dict[str, str]:
    """
    Returns the text of each document by doc_id, in the order of the file: `title + " " + text`, or just `text` when
    there is no title.

    Args:
        path: JSON Lines (`_id`, `title`, `text`), also compressed (`.gz`). All texts are held in memory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line breaks its rule, an `_id` comes twice, or there is no document, with file and line.
    """
    return dict(read_documents(check_file(path)))


def write_corpus(path: str | os.PathLike[str], corpus: Mapping[str, str]) -> None:
    """Writes documents as BEIR JSONL (`_id`, `title`, `text`); the title is empty."""
    _write_lines(path, [{"_id": doc_id, "title": "", "text": text} for doc_id, text in corpus.items()])


def write_queries(path: str | os.PathLike[str], queries: Mapping[str, str]) -> None:
    """Writes queries as BEIR JSONL (`_id`, `text`)."""
    _write_lines(path, [{"_id": query_id, "text": text} for query_id, text in queries.items()])


def _write_lines(path: str | os.PathLike[str], rows: Iterable[Mapping[str, str]]) -> None:
    # Encode before opening the file, so that a text that cannot be encoded leaves the file unchanged.
    Path(path).write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _generate_documents(
    paths: tuple[str, ...], states: tuple[FileStamp, ...], id_field: str | None, version: int
) -> Iterator[dict[str, str | int]]:
    for path in paths:
        for identifier, title, text in _read_texts(Path(path), "document", id_field):
            whole, key = join_title(title, text), text_key(text)
            keys = (text_key(whole) if title else key, key)
            yield {"id": identifier, "text": whole, **dict(zip(KEY_COLUMNS, keys, strict=True))}


def _read_texts(path: Path, kind: str, id_field: str | None = None) -> Iterator[tuple[str, str, str]]:
    is_beir, id_field = id_field is None, id_field or "_id"
    lines: dict[str, int] = {}
    for number, row in read_json_lines(path):
        where = f"{path}:{number}"
        identifier = read_id(row, id_field, where)
        if lines.setdefault(identifier, number) != number:
            raise ValueError(
                f"{where}: {id_field}: the {kind} {identifier!r} is there already, in line {lines[identifier]}; keep "
                "one of the lines"
            )
        has_title = is_beir and kind == "document" and row.get("title") is not None
        text = _read_text(row, "text", where)
        yield identifier, _read_text(row, "title", where) if has_title else "", text
    if is_beir and not lines:
        raise ValueError(f"{path}:1: the file has no lines; it needs one JSON object per line, one for each {kind}")


def _read_text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {field} must be a string, got {describe(value)}; correct or remove the line")
    return check_text(f"{where}: {field}", value)

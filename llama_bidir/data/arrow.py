"""Rows and documents as memory-mapped Arrow files, written once and shared by all processes that read them."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..utils.extras import require
from .files import check_file
from .rows import Row

if TYPE_CHECKING:
    from datasets import Dataset, Features

# Part of every cache key: raise it when the same sources become other records.
RECORD_VERSION = 1
DOCUMENT_FIELDS = ("pos_doc", "neg_doc")


class FileStamp(NamedTuple):
    """What tells two states of a file apart: its absolute path, its size in bytes and when it changed, in ns."""

    path: str
    size: int
    mtime_ns: int


def stamp(path: str | os.PathLike[str]) -> FileStamp:
    """Returns the state of a file; raises FileNotFoundError where there is none."""
    status = check_file(path).stat()
    return FileStamp(os.path.abspath(path), status.st_size, status.st_mtime_ns)


def write_dataset(
    generate: Callable[..., Iterator[Mapping[str, Any]]],
    features: "Features",
    arguments: Mapping[str, Any],
    cache_dir: str | os.PathLike[str] | None,
) -> "Dataset":
    """
    Returns the records of a generator as a memory-mapped dataset, written when no process has done so before.

    Args:
        generate: a function of a module; one process at a time calls it, and the others wait for its file.
        features: of the records.
        arguments: of `generate`; plain values, because they and the function's name are the key of the cache. They
            include the stamps of the files that are read.
        cache_dir: where the file is kept; None is the cache of `datasets`.

    Raises:
        ValueError, OSError: whatever `generate` raises.
    """
    datasets = require("datasets", "train")
    try:
        with no_progress_bars():
            return datasets.Dataset.from_generator(
                generate,
                features=features,
                gen_kwargs={**arguments, "version": RECORD_VERSION},
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            )
    except datasets.exceptions.DatasetGenerationError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keeps `datasets` from drawing bars, which would stand between the lines of a log and beside an error."""
    datasets = require("datasets", "train")
    was_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            datasets.enable_progress_bars()


def row_features(document_type: str) -> "Features":
    """Features of the records of rows: `document_type` is `string` for texts, `int64` for row numbers of documents."""
    datasets = require("datasets", "train")
    text, number = datasets.Value("string"), datasets.Value("float64")
    documents = [datasets.Value(document_type)]
    return datasets.Features(
        query=text, pos_doc=documents, neg_doc=documents, pos_score=[number], neg_score=[number], error=text
    )


def row_record(row: Row[Any]) -> dict[str, Any]:
    """The record of a row that is right."""
    return {**dict(zip(("query", *DOCUMENT_FIELDS, "pos_score", "neg_score"), row, strict=True)), "error": None}


def error_record(error: ValueError) -> dict[str, Any]:
    """The record of a row that is not: it travels with the others, so that all of them are known after one reading."""
    return {**row_record(Row("", [], [], None, None)), "error": str(error)}


def split_errors(dataset: "Dataset") -> tuple["Dataset", list[str]]:
    """Returns the rows that are right, without the column `error`, and the errors of the others."""
    pc = require("pyarrow.compute", "train")
    errors = dataset.data.column("error")
    messages = errors.drop_null().to_pylist()
    rows = dataset.remove_columns("error")
    if messages:
        # Signed, because `datasets` searches for numpy's unsigned numbers with fractions.
        rows = rows.select(pc.indices_nonzero(errors.is_null()).cast("int64").to_numpy())
    return rows, messages


class DocumentTexts:
    """
    A transform of `datasets` that puts texts in place of the row numbers in `pos_doc` and `neg_doc` as rows are read.

    Args:
        documents: a memory-mapped dataset with the column `text`, which the row numbers count in.
    """

    def __init__(self, documents: "Dataset"):
        self.documents = documents.select_columns("text").with_format("arrow")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        fields = [field for field in DOCUMENT_FIELDS if field in batch]
        numbers = sorted({number for field in fields for documents in batch[field] for number in documents})
        texts = dict(zip(numbers, self.documents[numbers]["text"].to_pylist(), strict=True))
        read = {field: [[texts[number] for number in documents] for documents in batch[field]] for field in fields}
        return {**batch, **read}


class DocumentFiles(NamedTuple):
    """
    The Arrow files of documents, in plain values that a cache key can hold and a generator can open.

    Args:
        name: what errors call the documents.
        paths: of the Arrow files, in order.
        fingerprint: changes with the content.
        id_column: the column of identifiers, strings or ints.
        first_row: the row number of the first document, where several corpora are counted through.
    """

    name: str
    paths: tuple[str, ...]
    fingerprint: str
    id_column: str = "id"
    first_row: int = 0


def check_documents(dataset: "Dataset", name: str, *, id_column: str = "id", first_row: int = 0) -> DocumentFiles:
    """
    Returns the files of a dataset of documents.

    Raises:
        ValueError: a column is missing or of another type, or a document has no text.
    """
    for column, kinds in (
        (id_column, ("string", "large_string", "int64", "int32")),
        ("text", ("string", "large_string")),
    ):
        if column not in dataset.column_names:
            columns = ", ".join(dataset.column_names)
            raise ValueError(f"{name}: the documents must have the columns {id_column} and text, got {columns}")
        kind = getattr(dataset.features[column], "dtype", dataset.features[column])
        if kind not in kinds:
            raise ValueError(f"{name}: the column {column} must be one of {', '.join(kinds)}, got {kind}")
        null = dataset.data.column(column).is_null().index(True).as_py()
        if null >= 0:
            raise ValueError(f"{name}: row {null}: the document has no {column}")
    paths = tuple(file["filename"] for file in dataset.cache_files)
    return DocumentFiles(name, paths, dataset._fingerprint, id_column, first_row)


def index_documents(documents: DocumentFiles) -> dict[str, int]:
    """Returns the row number of each identifier; raises ValueError where two documents share one."""
    index: dict[str, int] = {}
    number = documents.first_row
    for batch in iterate_files(documents.paths, [documents.id_column]):
        for value in batch[documents.id_column]:
            if index.setdefault(str(value), number) != number:
                row, first = number - documents.first_row, index[str(value)] - documents.first_row
                raise ValueError(
                    f"{documents.name}: row {row}: the document {str(value)!r} is there already, in row {first}; an "
                    "identifier must be one document's"
                )
            number += 1
    return index


def iterate_files(paths: tuple[str, ...], columns: list[str] | None = None) -> Iterator[dict[str, list[Any]]]:
    """Yields the columns of Arrow files that `datasets` has written, 1,000 rows at a time."""
    datasets = require("datasets", "train")
    for path in paths:
        dataset = datasets.Dataset.from_file(str(Path(path)))
        selected = dataset if columns is None else dataset.select_columns(columns)
        for batch in selected.with_format("arrow").iter(1000):
            yield batch.to_pydict()

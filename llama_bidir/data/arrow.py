"""Rows and documents as memory-mapped Arrow files, written once and shared by all processes that read them."""

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..utils.errors import naming
from ..utils.extras import require
from .files import check_file
from .rows import COLUMNS, OPTIONAL_COLUMNS, PASSAGE_COLUMNS, TrainingRow

if TYPE_CHECKING:
    from datasets import Dataset, Features

# Part of every cache key: raise it when the same sources give different records.
RECORD_VERSION = 5
# The digest takes 0.7 s per GiB. Larger files are distinguished by their inode and change time instead.
MOST_HASHED_BYTES = 4 * 2**30
# The clock of a file system ticks every few milliseconds, so a second change soon after the first may leave the same
# time. The digest of a file that changed more recently than this is not kept.
SETTLED_NS = 2 * 10**9


class FileStamp(NamedTuple):
    """
    The state of a file.

    Args:
        path: absolute.
        size: in bytes.
        mtime_ns: modification time in nanoseconds.
        content: a digest of the bytes, because tar, rsync and other tools can give different files the same size and
            time. For a file above `MOST_HASHED_BYTES`, the inode and the time of its last change, which users cannot
            set.
    """

    path: str
    size: int
    mtime_ns: int
    content: str


def stamp(path: str | os.PathLike[str]) -> FileStamp:
    """Returns the state of a file; raises FileNotFoundError when there is none."""
    status, name = check_file(path).stat(), os.path.abspath(path)
    identity = f"{status.st_dev}-{status.st_ino}-{status.st_ctime_ns}"
    if status.st_size <= MOST_HASHED_BYTES:
        is_settled = time.time_ns() - status.st_ctime_ns > SETTLED_NS
        digest = _digest if is_settled else _digest.__wrapped__
        return FileStamp(name, status.st_size, status.st_mtime_ns, digest(name, status.st_size, identity))
    return FileStamp(name, status.st_size, status.st_mtime_ns, identity)


@cache
def _digest(path: str, size: int, identity: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def write_dataset(
    generate: Callable[..., Iterator[Mapping[str, Any]]],
    features: "Features",
    arguments: Mapping[str, Any],
    cache_dir: str | os.PathLike[str] | None,
) -> "Dataset":
    """
    Returns the records of a generator as a memory-mapped dataset. The file is written if it is not in the cache yet.

    Args:
        generate: a module-level function. One process at a time calls it, and the others wait for its file.
        features: the features of the records.
        arguments: the arguments of `generate`. Their pickled values and the name of the function are the key of the
            cache, so they must include the stamps of the files that are read.
        cache_dir: where the file is kept; None is the cache of `datasets`.

    Raises:
        ValueError, OSError: `generate` raised it, or the cache cannot be written.
    """
    datasets = require("datasets", "train")
    cache = datasets.config.HF_DATASETS_CACHE if cache_dir is None else os.fspath(cache_dir)
    try:
        with naming(cache), _no_progress_bars():
            return datasets.Dataset.from_generator(
                generate,
                features=features,
                gen_kwargs={**arguments, "version": RECORD_VERSION},
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            )
    except datasets.exceptions.DatasetGenerationError as error:
        if error.__cause__ is None:
            raise
        with naming(cache):
            raise error.__cause__ from None
    except OSError as error:
        if error.errno is not None or error.filename is not None:
            raise
        # `datasets` raises this before it writes anything.
        raise OSError(errno.ENOSPC, str(error), cache) from None


def load_folder(folder: Path, cache_dir: str | os.PathLike[str] | None) -> "Dataset":
    """
    Returns the split `train` of a folder as a memory-mapped dataset.

    `datasets` recognizes the files of a folder only by their times. Each content of the folder therefore gets its own
    cache.
    """
    states = [stamp(path) for path in sorted(folder.rglob("*")) if path.is_file()]
    content = hashlib.blake2b(repr(states).encode(), digest_size=16).hexdigest()
    base = require("datasets", "train").config.HF_DATASETS_CACHE if cache_dir is None else cache_dir
    return load_train_split(os.fspath(folder), cache_dir=Path(base) / f"llama-bidir-folder-{content}")


def load_train_split(*names: str, cache_dir: str | os.PathLike[str] | None) -> "Dataset":
    """Returns the split `train` of a folder, or of a dataset on the Hub and its configuration, memory-mapped."""
    with _no_progress_bars():
        return require("datasets", "train").load_dataset(
            *names,
            split="train",
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            keep_in_memory=False,
        )


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keeps `datasets` from drawing progress bars between the lines of a log and beside an error."""
    datasets = require("datasets", "train")
    was_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not was_disabled:
            datasets.enable_progress_bars()


class ArrowFiles(NamedTuple):
    """
    A memory-mapped dataset as plain values, for a cache key.

    Args:
        paths: of its Arrow files, in order.
        fingerprint: changes with the content.
    """

    paths: tuple[str, ...]
    fingerprint: str

    @classmethod
    def of(cls, dataset: "Dataset") -> "ArrowFiles":
        return cls(tuple(file["filename"] for file in dataset.cache_files), dataset._fingerprint)

    def open(self) -> "Dataset":
        datasets = require("datasets", "train")
        return datasets.concatenate_datasets([datasets.Dataset.from_file(path) for path in self.paths])


def row_features(passage_type: str) -> "Features":
    """Features of the records of rows; `passage_type` is `string` for texts and `int64` for rows of a corpus."""
    datasets = require("datasets", "train")
    text = datasets.Value("string")
    kinds = {"text": text, "passages": [datasets.Value(passage_type)], "numbers": [datasets.Value("float64")]}
    return datasets.Features({name: kinds[kind] for name, kind in COLUMNS.items()}, error=text)


def record_features(passage_type: str) -> "Features":
    """Returns the features of cached rows: those of [`row_features`], and the number of left-out negatives."""
    datasets = require("datasets", "train")
    return datasets.Features(row_features(passage_type), num_identical=datasets.Value("int64"))


def row_record(row: TrainingRow, num_identical: int = 0) -> dict[str, Any]:
    """Returns the record of a valid row. `num_identical` of its negatives were the query itself and are left out."""
    return {**dict(zip(COLUMNS, row, strict=True)), "error": None, "num_identical": num_identical}


def error_record(error: ValueError) -> dict[str, Any]:
    """Returns the record of an invalid row. It stands among the others, so one reading finds all errors."""
    return {**row_record(TrainingRow("", [], [])), "error": str(error)}


def split_errors(dataset: "Dataset") -> tuple["Dataset", list[str], int]:
    """Returns the columns of valid rows, the errors of the other rows, and how many negatives were left out."""
    pc = require("pyarrow.compute", "train")
    errors = dataset.data.column("error")
    messages = errors.drop_null().to_pylist()
    num_identical = pc.sum(dataset.data.column("num_identical")).as_py() or 0
    unused = [name for name in OPTIONAL_COLUMNS if dataset.data.column(name).null_count == len(dataset.data)]
    rows = dataset.remove_columns(["error", "num_identical", *unused])
    if messages:
        # Signed, because `datasets` searches for numpy's unsigned numbers with fractions.
        rows = rows.select(pc.indices_nonzero(errors.is_null()).cast("int64").to_numpy())
    return rows, messages, num_identical


def are_valid(rows: Any) -> bool:
    """
    Whether the Arrow columns of `rows` alone show that every row is valid, as they do for what [`load_rows`] returns.

    This looks at types, lengths, nulls and numbers but reads no text, so it is cheap for any number of rows. False
    means that the rows have to be parsed, not that one of them is invalid.
    """
    if not hasattr(rows, "features") or not isinstance(rows, require("datasets", "train").Dataset):
        return False
    has_texts = not isinstance(rows.format["format_kwargs"].get("transform"), DocumentTexts)
    schema = row_features("string" if has_texts else "int64").arrow_schema
    columns = [name for name in COLUMNS if name in rows.features or name not in OPTIONAL_COLUMNS]
    if list(rows.features.arrow_schema) != [schema.field(name) for name in columns]:
        return False
    if set(rows.format["columns"]) != set(columns) or (rows.format["type"] is not None and has_texts):
        return False
    pc = require("pyarrow.compute", "train")
    table = {name: rows.data.column(name) for name in columns}
    sizes = {name: pc.list_value_length(table[name]) for name in columns if COLUMNS[name] != "text"}
    items = {name: pc.list_flatten(table[name]) for name in sizes}
    numbers = [name for name in columns if COLUMNS[name] == "numbers"]
    of_rows = [
        pc.greater(sizes["pos_doc"], 0),
        pc.equal(table["pos_score"].is_null(), table["neg_score"].is_null()),
        # Numbers are aligned with the passages of the same prefix, such as pos_score with pos_doc.
        *(pc.equal(sizes[name], sizes[f"{name[:3]}_doc"]) for name in numbers),
    ]
    if rows._indices is not None:  # the table also holds rows that were left out, such as those with an error
        of_rows = [condition.take(rows._indices.column(0)) for condition in of_rows]
    of_items = [pc.is_finite(items[name]) for name in numbers]
    of_items += [pc.greater(items[name], 0) for name in numbers if name == "pos_relevance"]
    has_nulls = any(table[name].null_count for name in ("query", *PASSAGE_COLUMNS)) or any(
        column.null_count for column in items.values()
    )
    return not has_nulls and all(pc.all(condition, min_count=0).as_py() for condition in of_rows + of_items)


def iterate_column(rows: "Dataset", name: str) -> Iterator[Any]:
    """Yields a column as Arrow arrays of at most 1,000 rows, as it is stored."""
    for batch in rows.select_columns([name]).with_format("arrow").iter(1000):
        yield batch.column(name).combine_chunks()


def have_negatives(rows: Any) -> Any:
    """Returns an `np.ndarray` of bools: whether each row has a negative that is not also one of its positives."""
    columns = zip(iterate_column(rows, "pos_doc"), iterate_column(rows, "neg_doc"), strict=True)
    return np.array(
        [
            not set(negatives) <= set(positives)
            for column in columns
            for positives, negatives in zip(*(part.to_pylist() for part in column), strict=True)
        ],
        dtype=bool,
    )


class DocumentTexts:
    """
    A transform of `datasets` that replaces the row numbers in `pos_doc` and `neg_doc` by texts when rows are read.

    Args:
        documents: a memory-mapped dataset with the column `text`, which the numbers are rows of.
    """

    def __init__(self, documents: "Dataset"):
        self.documents = documents.select_columns("text").with_format("arrow")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        fields = [field for field in PASSAGE_COLUMNS if field in batch]
        numbers = sorted({number for field in fields for documents in batch[field] for number in documents})
        texts = dict(zip(numbers, self.documents[numbers]["text"].to_pylist(), strict=True))
        read = {field: [[texts[number] for number in documents] for documents in batch[field]] for field in fields}
        return {**batch, **read}

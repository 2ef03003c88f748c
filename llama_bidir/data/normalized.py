"""
Training rows in NeMo AutoModel's normalized Arrow layout: a folder with `metadata.json`, Arrow files of rows, and Arrow
files of the documents that the rows name.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..utils.extras import require
from ..utils.validation import describe
from .arrow import ArrowFiles, FileStamp, record_features, stamp, write_dataset
from .corpus import Corpus, join_texts
from .corpus_id import corpus_rows
from .files import check_file, read_id, read_json
from .rows import PASSAGE_COLUMNS

if TYPE_CHECKING:
    from datasets import Dataset

METADATA = "metadata.json"
FORMAT = "nemo_automodel_normalized_vl_retrieval_arrow"
JSON_COLUMNS = {f"{column}_json": column for column in PASSAGE_COLUMNS}


class Part(NamedTuple):
    """The rows of a folder, and the corpora of their documents by `corpus_id`."""

    folder: str
    rows: ArrowFiles
    corpora: dict[str, Corpus]


def find_normalized(path: Path) -> Path | None:
    """
    Returns the folder if `path` is one in this layout, or its `metadata.json`, else None. Folders of other kinds may
    have a `metadata.json` too.
    """
    folder = path.parent if path.name == METADATA and path.is_file() else path
    try:
        return folder if read_json(folder / METADATA).get("format") == FORMAT else None
    except (OSError, ValueError):
        return None


def load_normalized(
    folder: Path, cache_dir: str | os.PathLike[str] | None, *, ignore_identical_ids: bool = True
) -> tuple["Dataset", "Dataset"]:
    """
    Reads a folder in the layout.

    `metadata.json` has `format`, `train_shards` (Arrow files of rows) and `corpora`, each with a `corpus_id` and its
    `shards` (Arrow files with `id` and `text`); or instead of the two, `sources`, each with the `path` of such a
    folder. A row has `question`, `corpus_id` and lists of `id` in `pos_doc` and `neg_doc`, or JSON of these lists in
    `pos_doc_json` and `neg_doc_json`. Images are not read.

    Args:
        folder: holds `metadata.json`.
        cache_dir, ignore_identical_ids: see [`load_rows`].

    Returns:
        the records of the rows, whose passages are row numbers, and the documents (column `text`) that these refer to.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file breaks its rule, or a document has no text. A row that breaks its rule becomes a record with
            `error`.
    """
    parts = tuple(_open_parts(folder))
    files = [path for part in parts for path in (*part.rows.paths, *_paths(part))]
    states = tuple(stamp(path) for path in files)
    arguments = {"parts": parts, "states": states, "ignore_identical_ids": ignore_identical_ids}
    rows = write_dataset(_generate_rows, record_features("int64"), arguments, cache_dir)
    return rows, join_texts(corpus for part in parts for corpus in part.corpora.values())


def _open_parts(folder: Path) -> Iterator[Part]:
    path = check_file(folder / METADATA)
    metadata = read_json(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT!r}, got {describe(metadata.get('format'))}")
    if "sources" in metadata:
        for where, source in _entries(metadata, "sources", path):
            yield from _open_parts(folder / _name(source, "path", where))
        return
    corpora: dict[str, Corpus] = {}
    for where, entry in _entries(metadata, "corpora", path):
        corpus_id = read_id(entry, "corpus_id", where)
        if corpus_id in corpora:
            raise ValueError(f"{where}: the corpus_id {corpus_id!r} is there already")
        documents = _open_shards(folder, entry.get("shards"), f"{where}: shards", ("id", "text"))
        _check_texts(documents, where)
        corpora[corpus_id] = Corpus(documents, f"{folder}: {corpus_id}")
    rows = _open_shards(folder, metadata.get("train_shards"), f"{path}: train_shards", ("question", "corpus_id"))
    yield Part(os.fspath(folder), ArrowFiles.of(rows), corpora)


def _entries(metadata: Mapping[str, Any], name: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    entries = metadata.get(name)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: {name} must be a list with at least one object, got {describe(entries)}")
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise ValueError(f"{path}: {name}[{index}] must be an object, got {describe(entry)}")
        yield f"{path}: {name}[{index}]", entry


def _name(entry: Mapping[str, Any], field: str, where: str) -> str:
    name = entry.get(field)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: {field} must be the name of a folder, got {describe(name)}")
    return name


def _open_shards(folder: Path, names: Any, where: str, columns: tuple[str, ...]) -> "Dataset":
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where} must be a list of Arrow files, got {describe(names)}")
    datasets = require("datasets", "train")
    shards = []
    for name in names:
        file = check_file(folder / name)
        try:
            shards.append(datasets.Dataset.from_file(os.fspath(file)))
        except Exception as error:  # pyarrow has no common class
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{file}: this is not an Arrow file of the library datasets: {reason}") from error
        if missing := [column for column in columns if column not in shards[-1].column_names]:
            found = ", ".join(shards[-1].column_names)
            raise ValueError(f"{file}: the column {missing[0]} is missing; the columns are {found}")
    return datasets.concatenate_datasets(shards)


def _check_texts(documents: "Dataset", where: str) -> None:
    """Raises ValueError for a document without a text, such as an image."""
    pc = require("pyarrow.compute", "train")
    texts = documents.data.column("text")
    is_bare = texts.is_null()
    if "image_jpeg" in documents.column_names:
        images = documents.data.column("image_jpeg").cast("binary")  # a column of nulls has no type
        has_image = pc.greater(pc.fill_null(pc.binary_length(images), 0), 0)
        is_bare = pc.or_(is_bare, pc.and_(pc.fill_null(pc.equal(pc.binary_length(texts), 0), False), has_image))
    if pc.any(is_bare).as_py():
        document_id = documents.data.column("id")[is_bare.to_pylist().index(True)].as_py()
        raise ValueError(f"{where}: the document {document_id!r} has no text: images are not supported")


def _paths(part: Part) -> Iterator[str]:
    for corpus in part.corpora.values():
        yield from ArrowFiles.of(corpus.dataset).paths


def _generate_rows(
    parts: tuple[Part, ...], states: tuple[FileStamp, ...], ignore_identical_ids: bool, version: int
) -> Iterator[dict[str, Any]]:
    first = 0
    for folder, files, corpora in parts:
        rows = ((f"{folder}: row {number}", _read_json_columns(row)) for number, row in enumerate(files.open()))
        yield from corpus_rows(rows, corpora, first=first, ignore_identical_ids=ignore_identical_ids)
        first += sum(map(len, corpora.values()))


def _read_json_columns(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row with lists in place of their JSON. Text that is not JSON stays, and is taken for an identifier."""
    for name, column in JSON_COLUMNS.items():
        if isinstance(text := row.pop(name, None), str):
            try:
                row[column] = json.loads(text)
            except ValueError:
                row[column] = text
    return row

"""Training rows of a JSON Lines file."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arrow import FileStamp, error_record, record_features, row_record, stamp, write_dataset
from .files import parse_json, read_lines
from .foreign_rows import read_foreign
from .identical import find_query_id, is_query
from .rows import as_list, drop_negatives, no_rows, parse_row

if TYPE_CHECKING:
    from datasets import Dataset


def load_jsonl(path: Path, cache_dir: str | os.PathLike[str] | None, *, ignore_identical_ids: bool = True) -> "Dataset":
    """
    Returns the records of a file with one row per line (see [`parse_row`]); blank lines are skipped.

    Args:
        path: the file.
        cache_dir, ignore_identical_ids: see [`load_rows`].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not valid UTF-8 text or has no rows. A line that breaks its rule becomes a record with
            `error`.
    """
    arguments = {"path": os.fspath(path), "state": stamp(path), "ignore_identical_ids": ignore_identical_ids}
    return write_dataset(_generate_rows, record_features("string"), arguments, cache_dir)


def _generate_rows(path: str, state: FileStamp, ignore_identical_ids: bool, version: int) -> Iterator[dict[str, Any]]:
    is_empty = True
    for number, line in read_lines(Path(path)):
        is_empty = False
        try:
            fields, where = parse_json(line, Path(path), number), f"{path}:{number}"
            row = parse_row(fields, where)
            fields, _ = read_foreign(fields, where)
            pairs = zip(as_list(fields.get("neg_doc")), row.negatives, strict=True)
            query_id = find_query_id(fields)
            mask = [ignore_identical_ids and is_query(query_id, row.query, *pair) for pair in pairs]
            yield row_record(*drop_negatives(row, mask))
        except ValueError as error:
            yield error_record(error)
    if is_empty:
        raise no_rows(path)

"""Training rows of a JSON Lines file."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arrow import FileStamp, error_record, row_features, row_record, stamp, write_dataset
from .files import parse_json, read_lines
from .rows import no_rows, parse_row

if TYPE_CHECKING:
    from datasets import Dataset


def load_jsonl(path: Path, cache_dir: str | os.PathLike[str] | None) -> "Dataset":
    """
    Returns the records of a file with one row per line (see [`parse_row`]); blank lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not whole UTF-8 text or has no rows. A line that breaks its rule becomes a record with
            `error`.
    """
    arguments = {"path": os.fspath(path), "state": stamp(path)}
    return write_dataset(_generate_rows, row_features("string"), arguments, cache_dir)


def _generate_rows(path: str, state: FileStamp, version: int) -> Iterator[dict[str, Any]]:
    is_empty = True
    for number, line in read_lines(Path(path)):
        is_empty = False
        try:
            yield row_record(parse_row(parse_json(line, Path(path), number), f"{path}:{number}"))
        except ValueError as error:
            yield error_record(error)
    if is_empty:
        raise no_rows(path)

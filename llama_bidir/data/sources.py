"""Where training rows come from."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..extras import require
from .rows import TrainingRow, parse_row

if TYPE_CHECKING:
    from datasets import Dataset


def load_rows(source: str | os.PathLike[str]) -> "Dataset":
    """
    Reads a file of training rows.

    Args:
        source: a `*.jsonl` or `*.jsonl.gz` file with one row a line (see [`parse_row`]).

    Returns:
        a `datasets.Dataset` with the columns `query` (string), `pos_doc` and `neg_doc` (lists of strings).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the name has another ending, the file has no rows, or a line is malformed, with file, line and
            field.
    """
    path = Path(source)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"training rows are read from a .jsonl or .jsonl.gz file, got {os.fspath(source)!r}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(source)!r} to read training rows from")
    rows = list(_read_jsonl(path))
    if not rows:
        raise ValueError(
            f"{path}: the file has no rows; it needs one JSON object a line, with query, pos_doc and neg_doc"
        )
    dataset = require("datasets", "train").Dataset
    return dataset.from_dict(
        {
            "query": [row.query for row in rows],
            "pos_doc": [row.positives for row in rows],
            "neg_doc": [row.negatives for row in rows],
        }
    )


def _read_jsonl(path: Path) -> Iterator[TrainingRow]:
    number = 0
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield parse_row(_parse_json(line, f"{path}:{number}"), f"{path}:{number}")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}:{number + 1}: the file must be whole UTF-8 text ({error})") from error


def _open_text(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _parse_json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: a line must be one JSON object: {error.msg} at column {error.colno}") from error

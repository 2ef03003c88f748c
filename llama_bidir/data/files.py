"""Text files as lines and JSON, with errors that name the file and the line."""

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ..utils.validation import check_text, describe

# Characters that separate columns and end lines. Other white space, such as U+00A0, belongs to a text or identifier.
BLANKS = " \t\r\n"


class _RepeatedKeyError(ValueError):
    """An object repeats a key. Python's JSON reader would silently take the last value."""


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_make_object)


def check_file(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a file; raises FileNotFoundError when there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}")
    return Path(path)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """
    Yields the number (from 1) and the text of each non-blank line of a UTF-8 file, with one line in memory at a time.

    A byte order mark at the start is dropped. A file whose name ends in `.gz` is decompressed.

    Raises:
        ValueError: the bytes are not UTF-8, or not a whole gzip file, with file and line.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                # Decoded line by line: a text file decodes far ahead and cannot tell the line of a bad byte.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip(BLANKS):
                    yield number, text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{number}: the file must be UTF-8 text: {error.reason} at byte {error.start + 1} of the line; "
            "convert the file"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _not_gzip(path, number + 1, error) from None


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    Yields the number (from 1) and the object of each line of a JSON Lines file.

    Raises:
        ValueError: a line is not one JSON object, or as [`read_lines`] does.
    """
    for number, line in read_lines(path):
        yield number, parse_json(line, path, number)


def read_json(path: Path) -> dict[str, Any]:
    """
    Returns the object that a JSON file holds (UTF-8; `.gz` is decompressed).

    Raises:
        ValueError: the file is not one JSON object in UTF-8, or not a whole gzip file, with file and line.
    """
    try:
        with _open(path) as file:
            text = file.read().removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: the file must be UTF-8 text: {error.reason}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _not_gzip(path, 1, error) from None
    return parse_json(text, path)


def parse_json(text: str, path: Path, line: int | None = None) -> dict[str, Any]:
    """
    Returns the JSON object of a line, or of a whole file when `line` is None.

    Raises:
        ValueError: the text is not exactly one JSON object, with file and line.
    """
    where = f"{path}" if line is None else f"{path}:{line}"
    rule = "the file must hold one JSON object" if line is None else "a line must be one JSON object"
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line or error.lineno}"
        raise ValueError(f"{where}: {rule}: {error.msg} at column {error.colno}") from None
    except ValueError as error:  # a repeated key, or an int of thousands of digits
        raise ValueError(f"{where}: {rule}: {error}") from None
    except RecursionError:
        raise ValueError(f"{where}: {rule}: it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {rule}, got {describe(value)}")
    return value


def read_id(row: Mapping[str, Any], field: str, where: str) -> str:
    """Returns an identifier (see [`as_id`]); raises ValueError unless the field holds a string or an int."""
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{where}: {field} must be a string or an int, got {describe(value)}")
    return check_text(f"{where}: {field}", as_id(value))


def as_id(value: Any) -> str:
    """Returns an identifier as a string without blanks around it: qrels and runs would read these as separators."""
    return str(value).strip(BLANKS)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _not_gzip(path: Path, line: int, error: Exception) -> ValueError:
    return ValueError(f"{path}:{line}: the file must be whole gzip data: {error}; fetch or write it again")

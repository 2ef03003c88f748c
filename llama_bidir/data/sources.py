"""Where training rows come from: one function for every kind of source. The name of a source tells its kind."""

import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..utils.names import nearest
from ..utils.validation import check_positive_int, describe
from .arrow import DocumentTexts, have_negatives, iterate_column, split_errors
from .beir_folder import load_beir
from .corpus_id import load_corpus_id
from .hub import PREFIX, load_hub
from .identical import tell_identical
from .jsonl import load_jsonl
from .normalized import find_normalized, load_normalized

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

BEIR_OPTIONS = ("qrels", "run", "depth")
READABLE = (
    "a .jsonl or .jsonl.gz file (rows inline), a .json or .json.gz file (rows that name documents of a corpus), "
    "hf://org/repo/subset, or a BEIR folder"
)
SHOWN_ERRORS = 10


@dataclass(frozen=True)
class Source:
    """
    An entry of `data.train` or `data.eval`.

    Args:
        path: where the rows are: a file, a folder or `hf://org/repo/subset`.
        weight: how often an epoch shows each row (see [`GroupDataset`]).
        options: for a BEIR folder: `qrels` and `run`, paths in the folder, and `depth`, how many documents of the run
            may become negatives of a query.
        ignore_identical_ids: leave out negatives that are the query itself (see [`load_rows`]).
    """

    path: str
    weight: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    ignore_identical_ids: bool = True


def parse_source(entry: Any, where: str = "a source of rows") -> Source:
    """
    Reads an entry of `data.train`.

    Args:
        entry: a path, a mapping with `path` and, optionally, `weight`, `ignore_identical_ids`, `qrels`, `run` and
            `depth`, or a [`Source`].
        where: the name of the entry in errors, such as `data.train[0]`.

    Raises:
        ValueError: a key is unknown, with the nearest known one, or a value breaks its rule.
    """
    if isinstance(entry, Source):
        return entry
    values = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
    known = ("path", "weight", "ignore_identical_ids", *BEIR_OPTIONS)
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; the nearest known one is {nearest(key, known)!r}")
    options = {key: values[key] for key in BEIR_OPTIONS if values.get(key) is not None}
    for key in ("qrels", "run"):
        if key in options:
            options[key] = _read_path(options[key], f"{where}: {key}")
    check_positive_int(f"{where}: depth", options.get("depth"))
    ignore_identical_ids = values.get("ignore_identical_ids", True)
    if not isinstance(ignore_identical_ids, bool):
        raise ValueError(f"{where}: ignore_identical_ids must be true or false, got {describe(ignore_identical_ids)}")
    return Source(
        _read_path(values.get("path"), f"{where}: path"),
        _read_weight(values.get("weight", 1.0), where),
        options,
        ignore_identical_ids,
    )


def load_rows(
    source: "str | os.PathLike[str] | Mapping[str, Any] | Source",
    *,
    skip_bad_rows: bool = False,
    ignore_identical_ids: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> "Dataset":
    """
    Reads training rows.

    Rows are kept in memory-mapped files of the cache. These are written when a source is new or has changed, and all
    processes share them. If a source names documents of a corpus, its rows hold row numbers, and a transform
    (`dataset.with_transform`) looks up the texts when a row is read. `datasets.concatenate_datasets` drops such a
    transform, so join these datasets in another way, such as `torch.utils.data.ConcatDataset`.

    Args:
        source: a `*.jsonl` or `*.jsonl.gz` file with one row per line (see [`parse_row`]); a `*.json` or `*.json.gz`
            file in NeMo AutoModel's corpus-id layout (see [`load_corpus_id`]); a folder in its normalized Arrow layout
            (see [`load_normalized`]); `hf://org/repo/subset` (see [`load_hub`]); a BEIR folder (see [`load_beir`]); or
            a mapping of a path and options (see [`parse_source`]).
        skip_bad_rows: leave out invalid rows, with one warning, instead of raising. At least one row must be valid.
        ignore_identical_ids: leave out negatives that are the query itself, as in ArguAna and Quora (see
            [`~data.identical`]), with one warning. An entry of `source` with `ignore_identical_ids: false` keeps them.
        cache_dir: where the files are kept; None is the cache of `datasets`.

    Returns:
        a `datasets.Dataset` whose rows have `query` (string), `pos_doc` and `neg_doc` (lists of strings), `pos_score`
        and `neg_score` (lists of numbers, or None). If a row of the source has `pos_relevance` or
        `instruction`, it is a column too.

    Raises:
        FileNotFoundError: there is no such file or folder.
        OSError: a dataset on the Hub cannot be read.
        ValueError: the kind of the source is unknown, or a row or file breaks its rule (with file, line and field).
    """
    dataset, errors, num_identical = _read(source, cache_dir, ignore_identical_ids=ignore_identical_ids)
    if errors and not skip_bad_rows:
        more = f" (and {len(errors) - 1} more; --skip-bad-rows leaves them out)" if len(errors) > 1 else ""
        raise ValueError(errors[0] + more)
    if not dataset.num_rows:
        raise ValueError(f"{parse_source(source).path}: none of the {len(errors)} rows can be read; {errors[0]}")
    if errors:
        shown = "".join(f"\n  {error}" for error in errors[:SHOWN_ERRORS])
        more = f"\n  and {len(errors) - SHOWN_ERRORS} more" if len(errors) > SHOWN_ERRORS else ""
        logger.warning(f"{parse_source(source).path}: left out {len(errors)} bad rows:{shown}{more}")
    tell_identical(parse_source(source).path, num_identical, "negatives")
    return dataset


def with_negatives(rows: "Dataset", name: str, *, skip_others: bool = False) -> "Dataset":
    """
    Returns the rows that have a negative which is not also one of their positives. Groups of several passages need one.

    Args:
        rows: as [`load_rows`] returns them.
        name: the name of the source in errors.
        skip_others: leave the other rows out, with a warning, instead of raising. At least one row must remain.

    Raises:
        ValueError: a row has no such negative.
    """
    has_negative = have_negatives(rows)
    if has_negative.all():
        return rows
    others = np.flatnonzero(~has_negative)
    first = int(others[0])
    message = (
        f"{name}: row {first} (query {rows[first]['query']!r}) has no neg_doc beside its positives, which groups of "
        "passages need"
    )
    if not skip_others or not has_negative.any():
        raise ValueError(f"{message} (and {len(others) - 1} more); --skip-bad-rows leaves such rows out")
    logger.warning(f"{message}: left out {len(others)} such rows")
    return rows.select(np.flatnonzero(has_negative))


def check_teacher_scores(rows: "Dataset", name: str) -> None:
    """Raises ValueError when a row has no teacher scores; `rows` and `name` as in [`with_negatives`]."""
    missing = [is_null for part in iterate_column(rows, "pos_score") for is_null in part.is_null().to_pylist()]
    if any(missing):
        row = missing.index(True)
        raise ValueError(
            f"{name}: row {row} (query {rows[row]['query']!r}) has no pos_score and neg_score, which the loss needs"
        )


def read_rows(
    source: "str | os.PathLike[str] | Mapping[str, Any] | Source",
    *,
    ignore_identical_ids: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple["Dataset", list[str]]:
    """
    Reads training rows, and the errors of the invalid ones.

    Args:
        source, ignore_identical_ids, cache_dir: see [`load_rows`].

    Returns:
        the valid rows, as [`load_rows`] returns them, and one message per invalid row, in the order of the source.

    Raises:
        FileNotFoundError, OSError: as [`load_rows`] does.
        ValueError: as [`load_rows`] does, except for bad rows.
    """
    return _read(source, cache_dir, ignore_identical_ids=ignore_identical_ids)[:2]


def not_beir(path: str, options: Iterable[str]) -> ValueError:
    """The error of options that only a BEIR folder has."""
    return ValueError(f"{path}: {', '.join(options)} can be given for a BEIR folder only, and this is not one")


def _read(
    source: "str | os.PathLike[str] | Mapping[str, Any] | Source",
    cache_dir: str | os.PathLike[str] | None,
    *,
    ignore_identical_ids: bool,
) -> tuple["Dataset", list[str], int]:
    """Returns the valid rows, the errors of the others, and how many negatives were the query itself."""
    source = parse_source(source)
    ignore_identical_ids = ignore_identical_ids and source.ignore_identical_ids
    records, documents = _load(source, cache_dir, ignore_identical_ids)
    dataset, errors, num_identical = split_errors(records)
    if documents is not None:
        dataset = dataset.with_transform(DocumentTexts(documents))
    return dataset, errors, num_identical


def _load(
    source: Source, cache_dir: str | os.PathLike[str] | None, ignore_identical_ids: bool
) -> tuple["Dataset", "Dataset | None"]:
    path, name = Path(source.path), source.path.lower()
    is_folder = path.is_dir() and not source.path.startswith(PREFIX)
    if not source.path.startswith(PREFIX) and (normalized := find_normalized(path)) is not None:
        if source.options:
            raise not_beir(source.path, source.options)
        return load_normalized(normalized, cache_dir, ignore_identical_ids=ignore_identical_ids)
    if source.options and not is_folder:
        raise not_beir(source.path, source.options)
    if source.path.startswith(PREFIX):
        return load_hub(source.path, cache_dir, ignore_identical_ids=ignore_identical_ids)
    if is_folder:
        return load_beir(path, **source.options, cache_dir=cache_dir, ignore_identical_ids=ignore_identical_ids)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return load_jsonl(path, cache_dir, ignore_identical_ids=ignore_identical_ids), None
    if name.endswith((".json", ".json.gz")):
        return load_corpus_id(path, cache_dir, ignore_identical_ids=ignore_identical_ids)
    if not path.exists() and not path.suffix:
        raise FileNotFoundError(f"there is no folder {source.path!r}; training rows are read from {READABLE}")
    raise ValueError(f"training rows are read from {READABLE}; got {source.path!r}")


def _read_path(value: Any, where: str) -> str:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path:
        raise ValueError(f"{where} must be a path, got {describe(value)}")
    return path


def _read_weight(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{where}: weight must be a finite number above 0, got {describe(value)}")
    return float(value)

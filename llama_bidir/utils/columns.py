"""Reads texts from tables and columns of pandas, polars, pyarrow, datasets and numpy, without importing these."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

QUERY_NAMES = ("query", "question")
PASSAGE_NAMES = ("passage", "document", "doc")


def column_names(value: Any) -> list[Any] | None:
    """
    Returns the names of the columns of a table (DataFrame, pyarrow Table, Dataset, structured array), or None if the
    value is not a table. The list is empty for a streamed dataset whose columns are not known until it is read.
    """
    if isinstance(value, (str, list, tuple, dict)):
        return None
    fields = getattr(getattr(value, "dtype", None), "names", None)
    if isinstance(fields, tuple) and value.ndim:
        return list(fields)
    if hasattr(value, "itertuples") or hasattr(value, "iter_rows"):  # pandas, polars
        return list(value.columns)
    if hasattr(value, "column_names"):  # pyarrow, datasets
        return list(value.column_names or [])
    return None


def read_table(table: Any) -> Iterator[tuple[Any, Any]]:
    """
    Yields the (query, passage) cells of each row of a table.

    Raises:
        ValueError: the table does not have two columns, or it is unclear which one holds the queries.
    """
    names = column_names(table) or []
    if hasattr(table, "itertuples"):
        rows: Iterator[Sequence[Any]] = iter(table.itertuples(index=False, name=None))
    elif hasattr(table, "iter_rows"):
        rows = iter(table.iter_rows())
    elif hasattr(table, "to_pylist"):
        rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    elif hasattr(table, "with_format"):
        # Keep a transform of the user. Other formats would only wrap the texts.
        is_transformed = getattr(table, "format", {}).get("type") == "custom"
        records: Iterator[Any] = iter(table if is_transformed else table.with_format(None))
        first = next(records, None)
        if first is None and not names:
            return iter(())
        names, records = (names, iter(())) if first is None else (list(first), chain([first], records))
        rows = ([record[name] for name in names] for record in records)
    else:
        rows = iter(table.tolist())
    if len(names) != 2:
        raise ValueError(
            f"pairs must be a table of two columns (query, passage), got {type(table).__name__} with {len(names)} "
            f"columns {names}: select the two, such as pairs[['query', 'passage']]"
        )
    order = query_first(names)
    return ((row[order[0]], row[order[1]]) for row in rows)


def query_first(names: Sequence[Any]) -> tuple[int, int]:
    """
    Returns the positions of the query and of the passage among two named members. With unknown names, the query is the
    first.

    Raises:
        ValueError: one name suggests that the query comes second, and the other name is unknown.
    """
    first, second = (str(name).casefold() for name in names)
    if first in PASSAGE_NAMES and second in QUERY_NAMES:
        return 1, 0
    if (first in PASSAGE_NAMES and second not in PASSAGE_NAMES) or (second in QUERY_NAMES and first not in QUERY_NAMES):
        raise ValueError(
            f"it is unclear which of {list(names)} is the query: name the two 'query' and 'passage', or put the query "
            "first under another name"
        )
    return 0, 1


def member_names(row: Any) -> list[Any] | None:
    """
    Returns the names of the members of a row of a table: a namedtuple, or a pandas Series whose labels name a query and
    a passage. Returns None for anything else.
    """
    if hasattr(row, "iloc"):
        names = [str(label).casefold() for label in getattr(row, "index", ())]
        return names if {*names} & {*QUERY_NAMES} and {*names} & {*PASSAGE_NAMES} else None
    fields = getattr(row, "_fields", None)
    return list(fields) if isinstance(fields, tuple) else None


def is_column(value: Any) -> bool:
    """Whether a value is a column of a table: a Series, a pyarrow array or a column of a dataset."""
    is_array = hasattr(value, "to_list") or hasattr(value, "to_pylist")
    is_array |= type(value).__module__.startswith(("datasets.", "pandas."))
    return is_array and column_names(value) is None


def column_values(column: Any) -> Iterable[Any]:
    """Returns an iterable over the plain Python values of a column, or any other collection unchanged."""
    for method in ("to_pylist", "to_list"):  # pyarrow; pandas and polars
        if hasattr(column, method):
            values: list[Any] = getattr(column, method)()
            return values
    values_as_given: Iterable[Any] = column
    return values_as_given

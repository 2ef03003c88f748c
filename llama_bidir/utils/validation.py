"""Checks of what users pass in, done before any compute; each error names the position and what was expected."""

from collections.abc import ItemsView, Iterable, KeysView, Mapping, Sequence, Set, Sized, ValuesView
from itertools import chain, islice
from typing import Any

from ..fields_llama_bidir import as_int
from .columns import column_names, column_values, is_column, member_names, query_first, read_table

# Iterable, but not collections of texts or of pairs in an order.
NOT_COLLECTIONS = (str, bytes, bytearray, memoryview, Mapping, Set)
DICT_VIEWS = (KeysView, ItemsView, ValuesView)


def describe(value: Any) -> str:
    """Type and beginning of a value, for error messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def is_collection(value: Any) -> bool:
    """Returns whether a value is an iterable with an order. The views of a dict have the order of the dict."""
    if isinstance(value, (list, tuple, *DICT_VIEWS)):
        return True
    return isinstance(value, Iterable) and not isinstance(value, NOT_COLLECTIONS) and getattr(value, "ndim", 1) != 0


def read_pairs(pairs: Any, *, with_instructions: bool = False) -> tuple[Iterable[Any], int | None, bool]:
    """
    Reads pairs in any form that users may pass. A generator is checked while it is read, anything else immediately.

    Args:
        pairs: one (query, passage) pair of strings, an iterable of them (list, tuple, generator, numpy array, column),
            or a table of two columns (see [`columns.read_table`]).
        with_instructions: whether a pair of several may have an instruction, or None, as its third member.

    Returns:
        the pairs, their number (None for a generator), and whether `pairs` was a single pair.

    Raises:
        TypeError: a value is not a pair or not a string, although one is expected.
        ValueError: a pair does not have exactly two members.
    """
    names = member_names(pairs)
    if column_names(pairs) is not None:
        noun, items = "row", iter(read_table(pairs))
    elif not is_collection(pairs):
        raise TypeError(
            "pairs must be a (query, passage) pair, an iterable of such pairs or a table of two columns, got "
            f"{describe(pairs)}"
        )
    elif is_column(pairs) and names is None:
        noun, items = "pair", iter(column_values(pairs))
    else:
        iterator = iter(pairs)
        first = list(islice(iterator, 3))
        if len(first) == 2 and all(isinstance(item, str) for item in first):
            if isinstance(pairs, DICT_VIEWS):
                raise TypeError(f"a pair must be two strings (query, passage), got {describe(pairs)}")
            return [_check_members("pair 0", first, names)], 1, True
        noun, items = "pair", chain(first, iterator)
    checked = (
        _check_pair(f"{noun} {index}", item, with_instruction=with_instructions) for index, item in enumerate(items)
    )
    if isinstance(pairs, Sized):
        # Read once: a bar around a generator has a length too, and would be empty the second time.
        checked_list = list(checked)
        return checked_list, len(checked_list), False
    return checked, None, False


def _check_pair(name: str, pair: Any, *, with_instruction: bool) -> tuple[Any, ...]:
    if with_instruction and type(pair) in (tuple, list) and len(pair) == 3:
        if pair[2] is not None:
            check_text(f"the instruction of {name}", pair[2])
        return (*_check_members(name, pair[:2]), pair[2])
    if type(pair) is tuple or type(pair) is list:
        return _check_members(name, pair)
    names = member_names(pair)
    is_other = isinstance(pair, DICT_VIEWS) or column_names(pair) is not None or (is_column(pair) and names is None)
    if is_other or not is_collection(pair):
        raise TypeError(f"{name} must be two strings (query, passage), got {describe(pair)}")
    return _check_members(name, list(pair), names)


def _check_members(name: str, members: Sequence[Any], names: Sequence[Any] | None = None) -> tuple[str, str]:
    if len(members) != 2:
        raise ValueError(f"{name} must have two members (query, passage), got {len(members)}: {describe(members)}")
    if names is not None:
        members = [members[position] for position in query_first(names)]
    for member_name, member in zip(("query", "passage"), members, strict=True):
        check_text(f"the {member_name} of {name}", member)
    return members[0], members[1]


def check_chunks(chunks: Any) -> Iterable[Any]:
    """Returns `chunks`. Raises TypeError unless it is an ordered iterable whose items may be lists of pairs."""
    _check_collection("chunks", chunks, "lists of pairs")
    return column_values(chunks)


def check_chunk(number: int, chunk: Any) -> list[Any]:
    """
    Returns a chunk as a list of pairs, with or without instructions. Raises TypeError or ValueError, which name the
    chunk, as [`read_pairs`] does.
    """
    try:
        pairs, _, is_single = read_pairs(chunk, with_instructions=True)
        pairs = list(pairs)
    except (TypeError, ValueError) as error:
        raise type(error)(f"chunk {number}: {error}") from None
    if is_single:
        raise TypeError(f"chunk {number} must be a list of pairs, got a single pair: {describe(chunk)}")
    return pairs


def check_text(name: str, text: Any) -> str:
    """Returns `text`; raises TypeError, naming it, unless it is a string, and ValueError unless it can be encoded."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a string, got {describe(text)}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} must be Unicode text without lone surrogates: {error}") from None
    return text


def check_texts(name: str, texts: Any) -> list[str]:
    """Returns `texts` as a list; raises TypeError unless it is an iterable of strings that is not a string itself."""
    _check_collection(name, texts, "strings")
    return [check_text(f"{name}[{index}]", text) for index, text in enumerate(column_values(texts))]


def _check_collection(name: str, values: Any, kind: str) -> None:
    if (names := column_names(values)) is not None:
        column = names[0] if len(names) == 1 else "passage"
        raise TypeError(
            f"{name} must be an iterable of {kind}, got {type(values).__name__} with columns {names}: pass one column, "
            f"such as {name}[{column!r}]"
        )
    if not is_collection(values):
        raise TypeError(f"{name} must be an iterable of {kind}, got {describe(values)}")


def check_groups(queries: Any, documents_per_query: Any) -> tuple[list[str], list[list[str]]]:
    """
    Returns queries and the documents of each as lists.

    Raises:
        TypeError: one of them is not an iterable of strings, or of iterables of strings, in an order.
        ValueError: there are not as many lists of documents as queries.
    """
    queries = check_texts("queries", queries)
    _check_collection("documents_per_query", documents_per_query, "lists")
    groups = [
        check_texts(f"documents_per_query[{index}]", documents)
        for index, documents in enumerate(column_values(documents_per_query))
    ]
    if len(queries) != len(groups):
        raise ValueError(f"each query needs its documents: got {len(queries)} queries and {len(groups)} lists")
    return queries, groups


def check_positive_int(name: str, value: Any) -> int | None:
    """Returns `value` as an int, or None; raises ValueError unless it is None or a whole number above 0."""
    return None if value is None else check_int(name, value, rule="None or an int above 0")


def check_int(name: str, value: Any, *, lowest: int = 1, rule: str | None = None) -> int:
    """Returns `value` as an int; raises ValueError unless it is a whole number of at least `lowest`, 0 or 1."""
    number = as_int(value)
    if number is None or number < lowest:
        rule = rule or ("an int of 0 or more" if lowest == 0 else "an int above 0")
        raise ValueError(f"{name} must be {rule}, got {value!r}")
    return number

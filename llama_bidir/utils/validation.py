"""Checks of what users pass in, done before any compute; each error names the position and what was expected."""

from collections.abc import Iterable, Mapping, Sized
from itertools import chain, islice
from typing import Any

# Iterable, but not collections of texts or of pairs in an order.
NOT_COLLECTIONS = (str, bytes, bytearray, Mapping, set, frozenset)


def describe(value: Any) -> str:
    """Type and beginning of a value, for error messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def read_pairs(pairs: Any) -> tuple[Iterable[tuple[str, str]], int | None, bool]:
    """
    Reads pairs as users give them. A generator is checked as it is read, anything else now.

    Args:
        pairs: one (query, passage) pair of strings, or an iterable of them (list, tuple, generator, numpy array,
            column).

    Returns:
        the pairs, their number (None for a generator), and whether `pairs` was a single pair.

    Raises:
        TypeError: something is not a pair, or not a string, where one is expected.
        ValueError: a pair does not have exactly two members.
    """
    if isinstance(pairs, NOT_COLLECTIONS) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs must be a (query, passage) pair or an iterable of such pairs, got {describe(pairs)}")
    iterator = iter(pairs)
    first = list(islice(iterator, 3))
    if len(first) == 2 and all(isinstance(item, str) for item in first):
        return [_check_pair(0, first)], 1, True
    checked = (_check_pair(index, item) for index, item in enumerate(chain(first, iterator)))
    if isinstance(pairs, Sized):
        # Read once: a bar around a generator has a length too, and would be empty the second time.
        checked_list = list(checked)
        return checked_list, len(checked_list), False
    return checked, None, False


def _check_pair(index: int, pair: Any) -> tuple[str, str]:
    if isinstance(pair, NOT_COLLECTIONS) or not isinstance(pair, Iterable):
        raise TypeError(f"pair {index} must be two strings (query, passage), got {describe(pair)}")
    members = list(pair)
    if len(members) != 2:
        raise ValueError(f"pair {index} must have two members (query, passage), got {len(members)}: {describe(pair)}")
    for name, member in zip(("query", "passage"), members, strict=True):
        check_text(f"the {name} of pair {index}", member)
    return members[0], members[1]


def check_chunk(number: int, chunk: Any) -> list[tuple[str, str]]:
    """Returns a chunk as a list of pairs; raises TypeError or ValueError, which name it, as [`read_pairs`] does."""
    try:
        pairs, _, is_single = read_pairs(chunk)
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
    if isinstance(texts, NOT_COLLECTIONS) or not isinstance(texts, Iterable):
        raise TypeError(f"{name} must be an iterable of strings, got {describe(texts)}")
    return [check_text(f"{name}[{index}]", text) for index, text in enumerate(texts)]


def check_groups(queries: Any, documents_per_query: Any) -> tuple[list[str], list[list[str]]]:
    """
    Returns queries and the documents of each as lists.

    Raises:
        TypeError: one of them is not an iterable of strings, or of iterables of strings, in an order.
        ValueError: there are not as many lists of documents as queries.
    """
    queries = check_texts("queries", queries)
    if isinstance(documents_per_query, NOT_COLLECTIONS) or not isinstance(documents_per_query, Iterable):
        raise TypeError(f"documents_per_query must be an iterable of lists, got {describe(documents_per_query)}")
    groups = [
        check_texts(f"documents_per_query[{index}]", documents) for index, documents in enumerate(documents_per_query)
    ]
    if len(queries) != len(groups):
        raise ValueError(f"each query needs its documents: got {len(queries)} queries and {len(groups)} lists")
    return queries, groups


def check_positive_int(name: str, value: Any) -> int | None:
    """Returns `value`; raises ValueError unless it is None or an int above 0."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name} must be None or an int above 0, got {value!r}")
    return value

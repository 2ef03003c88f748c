"""
Documents that are the query itself, as in ArguAna and Quora. They are not candidates of that query (BEIR's
`ignore_identical_ids`), because they would rank first and become its hardest negative.

A document is the query itself if it has the same text, with or without its title, or the same identifier. Plain numbers
often coincide by chance, such as queries 1 to 225 and documents 1 to 1400 of Cranfield. If an identifier is a plain
number, only the texts decide. If there are no texts, numbers count, unless the qrels judge a document relevant to the
query with the same number. This shows that the numbers coincide by chance. A document that the qrels judge relevant to
a query is never that query itself.
"""

import hashlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .files import as_id

if TYPE_CHECKING:
    from .corpus import Corpus

logger = logging.getLogger(__name__)

QUERY_IDS = ("query_id", "question_id", "_id")
DOC_IDS = ("id", "_id", "doc_id")
# How many spare documents BM25 finds, in case some documents are the query itself.
SPARE_DOCUMENTS = 8


def plain_text(text: str) -> str:
    """Returns a text with each run of white space replaced by one space."""
    return " ".join(text.split())


def text_key(text: str) -> int:
    """Returns a 64-bit hash of a text. Texts that differ only in white space have the same hash."""
    digest = hashlib.blake2b(plain_text(text).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def is_same_text(query: str, text: str) -> bool:
    """Returns whether a passage and a query have the same text. An empty query matches nothing."""
    return bool(words := plain_text(query)) and words == plain_text(text)


def is_own_id(query_id: str | None, doc_id: str) -> bool:
    """Returns whether the identifiers show that a document is the query itself. Plain numbers do not show it."""
    return query_id == doc_id and not doc_id.isdecimal()


def identify(passage: Any) -> frozenset[str]:
    """Returns the identifiers of a passage if it is an object, else an empty set."""
    if not isinstance(passage, Mapping):
        return frozenset()
    return frozenset(as_id(passage[name]) for name in DOC_IDS if passage.get(name) is not None)


def find_query_id(row: Mapping[str, Any]) -> str | None:
    """Returns the identifier of a training row's query, or None if there is no string or int."""
    value = next((row[name] for name in QUERY_IDS if row.get(name) is not None), None)
    return as_id(value) if isinstance(value, (str, int)) else None


def is_query(query_id: str | None, query: str, passage: Any, text: str) -> bool:
    """Returns whether a passage (a text, or an object with identifiers) is the query itself."""
    return is_same_text(query, text) or any(is_own_id(query_id, doc_id) for doc_id in identify(passage))


def find_identical(
    corpus: "Corpus", query_id: str | None, query: str, rows: npt.ArrayLike, index: Mapping[str, int] | None = None
) -> npt.NDArray[np.bool_]:
    """
    Returns which documents of a corpus are the query itself.

    Args:
        corpus: the documents.
        query_id, query: identifier and text of the query.
        rows: row numbers of the documents to check.
        index: row numbers by identifier; None looks up the identifiers of `rows` in the corpus.
    """
    mask = corpus.has_text(query, rows)
    numbers = np.asarray(rows, dtype=np.int64)
    if query_id is not None and is_own_id(query_id, query_id) and numbers.size:
        if index is None:
            mask |= np.array([doc_id == query_id for doc_id in corpus.ids(numbers.tolist())])
        else:
            mask |= numbers == index.get(query_id, -1)
    return mask


def drop_own_ids(
    qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, Mapping[str, float]], int]:
    """
    Removes from a run the documents that have the identifier of their query. Use it if there are no texts.

    Returns:
        the run, and how many documents were left out.
    """
    are_by_chance = any(query_id.isdecimal() and judged.get(query_id, 0) >= 1 for query_id, judged in qrels.items())
    own = {
        query_id
        for query_id in run
        if query_id in run[query_id]
        and qrels.get(query_id, {}).get(query_id, 0) < 1
        and not (are_by_chance and query_id.isdecimal())
    }
    kept = {
        query_id: {doc_id: score for doc_id, score in docs.items() if doc_id != query_id} if query_id in own else docs
        for query_id, docs in run.items()
    }
    return kept, len(own)


def tell_identical(where: object, count: int, what: str = "candidates") -> None:
    """Logs how many documents were left out, if any."""
    if count:
        logger.warning(
            f"{where}: left out {count} {what} that are the query itself, by identifier or text; "
            "ignore_identical_ids=False (--no-ignore-identical-ids) keeps them"
        )

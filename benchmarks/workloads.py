"""The pairs to score: from a BEIR folder with a first-stage run, or made up from a seed."""

import gzip
import json
import os
import random
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

Pair = tuple[str, str]
T = TypeVar("T")

WORKLOADS = ("one-query", "nq", "short", "long", "growth", "latency")
DEPTH = 100
SHORT_WORDS = 30
LONG_PAIRS, LONG_TOKENS, LONG_MAX_LENGTH = 8, (2000, 8000), 8192
LATENCY_TOKENS = 180

_WORDS = (
    "the of and to in is was for on that by with as at from his it an are were which be this had has first one their "
    "its new after but who not they have her she two been other when there all during into school time may years more "
    "most only over city some world would where later up such used many can state about national out known university "
    "united then made part between people under river also war while until game well music water population number "
    "name film season history family house government series south team called several north large early second area"
)


class Collection(NamedTuple):
    """Texts by id, and the passage ids of each query in first-stage order."""

    corpus: dict[str, str]
    queries: dict[str, str]
    run: dict[str, list[str]]

    def passages(self, query_id: str) -> list[str]:
        """Returns the passages of a query, best first, at most `DEPTH`."""
        return [self.corpus[doc_id] for doc_id in self.run[query_id][:DEPTH]]

    def pairs(self, num_queries: int) -> list[Pair]:
        """Returns the pairs of `num_queries` queries, spread evenly over the run."""
        return [
            (self.queries[query_id], passage)
            for query_id in spread(list(self.run), num_queries)
            for passage in self.passages(query_id)
        ]


class Workload(NamedTuple):
    """Pairs, and the maximum number of tokens of a rendered pair."""

    name: str
    pairs: list[Pair]
    max_length: int = 512


def spread(items: list[T], count: int | None) -> list[T]:
    """Returns at most `count` items, evenly spaced, in order. None keeps all."""
    if count is None or count >= len(items):
        return items
    return [items[index * len(items) // count] for index in range(count)]


def read_collection(folder: str | os.PathLike[str]) -> Collection:
    """Reads `corpus.jsonl.gz`, `queries.jsonl.gz` and `run.bm25.trec`. A passage is its title and its text."""
    folder = Path(folder)
    corpus = {row["_id"]: f"{row['title']} {row['text']}".strip() for row in _read_lines(folder / "corpus.jsonl.gz")}
    queries = {row["_id"]: row["text"] for row in _read_lines(folder / "queries.jsonl.gz")}
    run: dict[str, list[str]] = {}
    for line in (folder / "run.bm25.trec").read_text(encoding="utf-8").splitlines():
        query_id, _, doc_id, *_ = line.split()
        run.setdefault(query_id, []).append(doc_id)
    return Collection(corpus, queries, run)


def _read_lines(path: Path) -> Iterator[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def make_collection(
    *, num_queries: int = 300, num_passages: int = 2000, depth: int = DEPTH, seed: int = 0
) -> Collection:
    """Makes up queries of 8 words and passages of 60 to 160 words. The seed decides the words."""
    generator, vocabulary = random.Random(seed), _WORDS.split()

    def words(count: int) -> str:
        return " ".join(generator.choices(vocabulary, k=count))

    corpus = {f"d{index}": words(generator.randint(60, 160)) for index in range(num_passages)}
    queries = {f"q{index}": words(8) for index in range(num_queries)}
    return Collection(corpus, queries, {query_id: generator.sample(list(corpus), depth) for query_id in queries})


def make_workloads(
    names: list[str],
    collection: Collection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_queries: int,
    growth: list[int],
    max_pairs: int | None,
) -> Iterator[Workload]:
    """
    Yields workloads. Those with the same `max_length` are adjacent.

    Args:
        names: names from `WORKLOADS`. `growth` gives one workload per size.
        collection: source of the texts.
        tokenizer: counts tokens for `latency` and `long`.
        num_queries: queries of `nq` and `short`.
        growth: sizes of the `growth` workloads in pairs.
        max_pairs: maximum pairs of a workload, evenly chosen. It does not apply to `growth`.
    """
    if "latency" in names:
        yield Workload("latency", _latency_pairs(collection, tokenizer))
    if "one-query" in names:
        yield Workload("one-query", spread(collection.pairs(1), max_pairs))
    if "nq" in names:
        yield Workload("nq", spread(collection.pairs(num_queries), max_pairs))
    if "short" in names:
        pairs = [(query, _first_words(passage)) for query, passage in collection.pairs(num_queries)]
        yield Workload("short", spread(pairs, max_pairs))
    if "growth" in names:
        for size in growth:
            yield Workload(f"growth-{size}", spread(collection.pairs(-(-size // DEPTH)), size))
    if "long" in names:
        pairs = _long_pairs(collection, tokenizer, min(LONG_PAIRS, max_pairs or LONG_PAIRS))
        yield Workload("long", pairs, LONG_MAX_LENGTH)


def _first_words(text: str) -> str:
    """Returns the first words of a text, enough for a rendered pair of about 60 tokens."""
    return " ".join(text.split()[:SHORT_WORDS])


def _latency_pairs(collection: Collection, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """Returns one query with `DEPTH` passages of `LATENCY_TOKENS` tokens each."""
    query_id = next(iter(collection.run))
    passages = collection.passages(query_id)
    rotated = (passages[index:] + passages[:index] for index in range(len(passages)))
    return [(collection.queries[query_id], _join(texts, LATENCY_TOKENS, tokenizer)) for texts in rotated]


def _long_pairs(collection: Collection, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Pair]:
    """Returns pairs with passages of increasing length, from `LONG_TOKENS[0]` to `LONG_TOKENS[1]` tokens."""
    shortest, longest = LONG_TOKENS
    pairs = []
    for index, query_id in enumerate(spread(list(collection.run), count)):
        num_tokens = shortest + (longest - shortest) * index // max(count - 1, 1)
        passage = _join(collection.passages(query_id), num_tokens, tokenizer)
        pairs.append((collection.queries[query_id], passage))
    return pairs


def _join(texts: list[str], num_tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Joins the texts, repeating them if necessary, up to `num_tokens` tokens."""
    joined = ""
    for text in cycle(texts):
        joined = f"{joined} {text}".strip()
        # Tokens of ordinary text have fewer than 8 characters on average.
        if len(joined) >= 8 * num_tokens:
            break
    offsets = tokenizer(joined, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return joined[: offsets[:num_tokens][-1][1]]

"""Evaluation in training that reranks the first-stage run of a collection, as `llama-bidir evaluate` measures it."""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ..data import Group
from ..evaluation import Dataset, Run, evaluate_queries, judged_run, load_dataset, rerank_run
from ..utils.names import nearest
from ..utils.validation import check_int, check_positive_int, describe

KEYS = ("name", "path", "run", "qrels", "depth", "queries")
DEPTH = 50
# The names of the measures in the log, and those of ir_measures.
MEASURES = {"ndcg@10": "nDCG@10", "mrr@10": "RR@10"}


class RerankSet:
    """
    The first documents of a first-stage run, which are reranked at each evaluation.

    Args:
        name: of the set in the log, such as `nq` for `eval_nq_ndcg@10`.
        dataset: a collection (see [`~evaluation.load_dataset`]).
        depth: how many documents of the run to rerank per query. The others follow in order.

    Attributes:
        groups: one per query with candidates: the query and the texts to score. The labels say nothing.
        first_stage: the measures of the run itself, by name.

    Raises:
        ValueError: a document has no text, or the run has no judged query.
    """

    def __init__(self, name: str, dataset: Dataset, *, depth: int = DEPTH):
        self.name, self.dataset, self.depth = name, dataset, depth
        recorder = _Recorder()
        self._run = judged_run(dataset)
        rerank_run(recorder, dataset, self._run, depth)
        self.groups: list[Group] = [
            {
                "query": query,
                "passages": passages,
                "labels": [0.0] * len(passages),
                "teacher_scores": [math.nan] * len(passages),
            }
            for query, passages in recorder.candidates
            if passages
        ]
        self._sizes = [len(passages) for _, passages in recorder.candidates]
        self.first_stage = self._measure(self._run)

    def measure(self, scores: Sequence[np.ndarray]) -> dict[str, float]:
        """Returns the measures of the run after reranking, by name. There is one array of scores per group."""
        arrays = iter(scores)
        given = [next(arrays) if size else np.zeros(0) for size in self._sizes]
        return self._measure(rerank_run(_GivenScores(given), self.dataset, self._run, self.depth)[0])

    def _measure(self, run: Run) -> dict[str, float]:
        values = evaluate_queries(self.dataset.qrels, run, MEASURES.values(), ignore_identical_ids=False).aggregated
        return {name: values[measure] for name, measure in MEASURES.items()}


class _GivenScores:
    """Ranks by scores that are already there."""

    def __init__(self, scores: Sequence[np.ndarray]):
        self._scores = scores

    def rank_batch(self, queries: Sequence[str], documents: Sequence[Sequence[str]]) -> list[list[dict[str, Any]]]:
        return [
            [{"corpus_id": place, "score": float(score)} for place, score in enumerate(scores)]
            for scores in self._scores
        ]


class _Recorder:
    """Keeps the candidates in the order of the run."""

    def __init__(self) -> None:
        self.candidates: list[tuple[str, list[str]]] = []

    def rank_batch(self, queries: Sequence[str], documents: Sequence[Sequence[str]]) -> list[list[dict[str, Any]]]:
        self.candidates = [(query, list(texts)) for query, texts in zip(queries, documents, strict=True)]
        return [[{"corpus_id": place, "score": -place} for place in range(len(texts))] for texts in documents]


def load_rerank_sets(entries: Sequence[Any], where: str = "data.eval_rerank") -> list[RerankSet]:
    """
    Reads the collections of `data.eval_rerank`.

    Args:
        entries: mappings with `name` and `path` (a BEIR folder) and, optionally, `run` and `qrels` (its files), `depth`
            (50 by default) and `queries`, how many judged queries to take, spread evenly over the qrels.
        where: the name of the list in errors.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an entry or a file breaks its rule.
    """
    check_entries(entries, where)
    sets = []
    for entry in entries:
        depth = entry.get("depth", DEPTH)
        dataset = load_dataset(entry["path"], qrels=entry.get("qrels"), run=entry.get("run"), depth=depth)
        sets.append(RerankSet(entry["name"], _first(dataset, entry.get("queries")), depth=depth))
    return sets


def check_entries(entries: Sequence[Any], where: str = "data.eval_rerank") -> None:
    """Raises ValueError, naming the entry, unless [`load_rerank_sets`] can read the entries. Reads no file."""
    names: set[str] = set()
    for index, entry in enumerate(entries):
        place = f"{where}[{index}]"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{place} must be a mapping with name and path, got {describe(entry)}")
        for key in entry:
            if key not in KEYS:
                raise ValueError(f"{place}: unknown key {key!r}; the nearest known one is {nearest(key, KEYS)!r}")
        name = entry.get("name")
        if not isinstance(name, str) or not name or not isinstance(entry.get("path"), str | os.PathLike):
            raise ValueError(f"{place} needs a name, such as nq, and the path of a BEIR folder, got {describe(entry)}")
        for key in ("run", "qrels"):
            if not isinstance(entry.get(key), str | os.PathLike | None):
                raise ValueError(f"{place}: {key} must be the path of a file, got {describe(entry[key])}")
        _check_name(name, names, place)
        names.add(name)
        check_int(f"{place}: depth", entry.get("depth", DEPTH))
        check_positive_int(f"{place}: queries", entry.get("queries"))


def check_names(sets: Sequence[RerankSet], eval_dataset: Any) -> None:
    """Raises ValueError if two measures of an evaluation would have the same name in the log."""
    names = set(eval_dataset) if isinstance(eval_dataset, Mapping) else set()
    for each in sets:
        _check_name(each.name, names, "rerank_sets")
        names.add(each.name)


def _check_name(name: str, others: Collection[str], place: str) -> None:
    if name in others:
        raise ValueError(f"{place}: there is a set named {name!r} already: give each a name of its own")
    if name == "run" or name.endswith("_run"):
        raise ValueError(f"{place}: the name {name!r} ends in 'run', which names the first-stage run in the log")


def _first(dataset: Dataset, count: int | None) -> Dataset:
    """Returns a dataset with `count` judged queries, spread evenly."""
    query_ids = list(dataset.qrels)
    if count is None or count >= len(query_ids):
        return dataset
    kept = [query_ids[number * len(query_ids) // count] for number in range(count)]
    return dataset._replace(qrels={query_id: dataset.qrels[query_id] for query_id in kept})

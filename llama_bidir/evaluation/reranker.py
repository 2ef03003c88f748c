"""A reranker on a retrieval collection: the measures of a run before and after reranking."""

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data.beir_folder import find_files, find_run
from ..data.corpus import join_title
from ..data.identical import is_own_id, plain_text, tell_identical
from ..data.trec import no_common_query, read_judged_queries, read_qrels, read_run, read_run_documents, tell_missing
from ..scoring.probability import rank_by
from ..utils.validation import check_positive_int, describe
from .comparison import Comparison, compare
from .measures import DEFAULT_MEASURES, Evaluation, Qrels, Run, evaluate_queries, parse_measures, rank_documents
from .ranking import rank_candidates

if TYPE_CHECKING:
    from ..cross_encoder import CrossEncoder

TEST_QRELS = ("qrels/test.tsv", "qrels/test.tsv.gz")


class Dataset(NamedTuple):
    """
    A retrieval collection with a first-stage run.

    Attributes:
        corpus: text by doc_id, at least of the documents to rerank.
        queries: text by query_id, at least of the judged queries.
        qrels: relevance by doc_id by query_id.
        run: score by doc_id by query_id.
    """

    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Qrels
    run: Run


class RerankerEvaluation(NamedTuple):
    """
    The measures of a run before and after reranking.

    Attributes:
        before, after: measures of the first-stage run and of the reranked one.
        comparisons: after against before, one per measure.
        run_before, run: the judged queries of the two runs.
        num_pairs: how many pairs were scored.
        seconds: how long the scoring took.
    """

    before: Evaluation
    after: Evaluation
    comparisons: list[Comparison]
    run_before: dict[str, dict[str, float]]
    run: dict[str, dict[str, float]]
    num_pairs: int
    seconds: float


def evaluate_reranker(
    cross_encoder: "CrossEncoder",
    dataset: str | os.PathLike[str] | Dataset | Mapping[str, Any],
    *,
    depth: int | None = 100,
    measures: str | Iterable[str] = DEFAULT_MEASURES,
    qrels: str | None = None,
    run: str | None = None,
    ignore_identical_ids: bool = True,
    **scoring: Any,
) -> RerankerEvaluation:
    """
    Reranks the first documents of each judged query and measures the run before and after.

    Args:
        cross_encoder: the reranker.
        dataset: a BEIR folder (see [`load_dataset`]), a [`Dataset`], or a mapping with its fields.
        depth: how many documents of the run to rerank per query; None reranks all. The others follow in order.
        measures: see [`~measures.parse_measures`].
        qrels, run: which files of the folder.
        ignore_identical_ids: leave out documents that are the query itself, as in ArguAna and Quora, before and after
            reranking (see [`~data.identical`]), with a warning that counts them.
        scoring: for [`~cross_encoder.CrossEncoder.rank_batch`], such as `show_progress_bar` or `long_document`.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: a line of a file breaks its rule, a document or a query has no text, or the run has no judged query.
        TypeError: `dataset` is not one of the three.
    """
    depth = check_positive_int("depth", depth)
    if "top_k" in scoring:
        raise ValueError("top_k would drop documents of the run: give depth, below which documents keep their order")
    parsed = [str(measure) for measure in parse_measures(measures)]
    if isinstance(dataset, (str, os.PathLike)):
        dataset = load_dataset(dataset, qrels=qrels, run=run, depth=depth, ignore_identical_ids=ignore_identical_ids)
    elif qrels is not None or run is not None:
        raise ValueError("qrels and run name files of a folder, but the dataset is not one")
    elif isinstance(dataset, Mapping) and dataset.keys() >= set(Dataset._fields):
        dataset = Dataset(**{field: dataset[field] for field in Dataset._fields})
    elif not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset must be a BEIR folder, a Dataset, or a mapping with {', '.join(Dataset._fields)}; got "
            f"{describe(dataset)}"
        )
    dataset = _with_texts(dataset)
    run_before = judged_run(dataset, ignore_identical_ids=ignore_identical_ids)
    started = time.perf_counter()
    reranked, num_pairs = rerank_run(cross_encoder, dataset, run_before, depth, **scoring)
    seconds = time.perf_counter() - started
    before, after = (
        evaluate_queries(dataset.qrels, each, parsed, ignore_identical_ids=False) for each in (run_before, reranked)
    )
    return RerankerEvaluation(before, after, compare(after, before), run_before, reranked, num_pairs, seconds)


def load_dataset(
    folder: str | os.PathLike[str],
    *,
    qrels: str | None = None,
    run: str | None = None,
    depth: int | None = None,
    ignore_identical_ids: bool = True,
) -> Dataset:
    """
    Reads a BEIR folder. It keeps only the documents to rerank. Judged queries without a text are left out with a
    warning.

    Args:
        folder: see [`~data.beir_folder.find_files`].
        qrels, run: paths in the folder; by default `qrels/test.tsv` or the only other file of qrels, and the only one
            of `run*.trec`, `run*.trec.gz`.
        depth: how many documents to rerank per judged query; None reranks all.
        ignore_identical_ids: see [`evaluate_reranker`].

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there are several candidates for a file, or a line breaks its rule, with file and line.
    """
    folder = Path(folder)
    if qrels is None:
        qrels = next((name for name in TEST_QRELS if (folder / name).is_file()), None)
    files, run_path = find_files(folder, qrels=qrels), find_run(folder, run)
    judgements = read_qrels(files.qrels)
    queries = read_judged_queries(files.queries, judgements, files.qrels)
    judgements = {query_id: judgements[query_id] for query_id in queries}
    first_stage = read_run(run_path)
    judged = {query_id: first_stage[query_id] for query_id in judgements if query_id in first_stage}
    finder = _IdenticalFinder(judgements, queries, judged) if ignore_identical_ids else None
    top = _top(judged, depth)
    texts = read_run_documents(files.corpus, _doc_ids(top), {run_path: top}, see=None if finder is None else finder.see)
    if finder is not None and finder.pairs:
        judged = finder.drop(judged)
        tell_identical(run_path, len(finder.pairs))
        top = _top(judged, depth)
        if further := _doc_ids(top) - texts.keys():
            texts |= read_run_documents(files.corpus, further, {run_path: top})
        texts = {doc_id: texts[doc_id] for doc_id in _doc_ids(top)}
    return Dataset(texts, queries, judgements, judged)


class _IdenticalFinder:
    """Finds the documents of a run that are the query itself while a corpus is read document by document."""

    def __init__(self, qrels: Qrels, queries: Mapping[str, str], run: Run):
        self._qrels, self._run = qrels, run
        self._queries_of: dict[str, list[str]] = {}
        for query_id in run:
            if text := plain_text(queries[query_id]):
                self._queries_of.setdefault(text, []).append(query_id)
        self._doc_ids = _doc_ids(run)
        self.pairs: set[tuple[str, str]] = set()

    def see(self, doc_id: str, title: str, text: str) -> None:
        """Records each query that this document is. Call it for every document of the corpus."""
        if doc_id not in self._doc_ids:
            return
        found = [doc_id] if is_own_id(doc_id, doc_id) and doc_id in self._run else []
        for each in {plain_text(text), plain_text(join_title(title, text))}:
            found += self._queries_of.get(each, ())
        for query_id in found:
            if doc_id in self._run[query_id] and self._qrels[query_id].get(doc_id, 0) < 1:
                self.pairs.add((query_id, doc_id))

    def drop(self, run: Run) -> dict[str, dict[str, float]]:
        """Returns the run without the documents that were found."""
        return {
            query_id: {doc_id: score for doc_id, score in docs.items() if (query_id, doc_id) not in self.pairs}
            for query_id, docs in run.items()
        }


def _drop_identical(dataset: Dataset, run: Run) -> dict[str, dict[str, float]]:
    """Returns a run without the documents that are the query itself. Texts are compared if they are there."""
    finder = _IdenticalFinder(dataset.qrels, dataset.queries, run)
    for doc_id in _doc_ids(run):
        finder.see(doc_id, "", dataset.corpus.get(doc_id, ""))
    tell_identical("the run", len(finder.pairs))
    return finder.drop(run)


def _with_texts(dataset: Dataset) -> Dataset:
    """Returns a dataset without the judged queries that have no text; raises ValueError if none has one."""
    missing = [query_id for query_id in dataset.qrels if query_id not in dataset.queries]
    if missing and len(missing) == len(dataset.qrels):
        raise ValueError(f"the query {missing[0]!r} is judged but has no text: add it to queries")
    tell_missing("the qrels", "judged queries", missing, "queries")
    qrels = {query_id: judged for query_id, judged in dataset.qrels.items() if query_id in dataset.queries}
    return dataset._replace(qrels=qrels)


def _top(run: Run, depth: int | None) -> dict[str, dict[str, float]]:
    return {query_id: dict.fromkeys(rank_documents(docs)[:depth], 0.0) for query_id, docs in run.items()}


def _doc_ids(run: Run) -> set[str]:
    return {doc_id for docs in run.values() for doc_id in docs}


def judged_run(dataset: Dataset, *, ignore_identical_ids: bool = True) -> dict[str, dict[str, float]]:
    """Returns the run of the judged queries of a dataset; raises ValueError if it has none of them."""
    run = {query_id: dict(dataset.run.get(query_id, {})) for query_id in dataset.qrels}
    if not any(run.values()):
        raise no_common_query("the run", "the qrels")
    return _drop_identical(dataset, run) if ignore_identical_ids else run


def rerank_run(
    cross_encoder: Any, dataset: Dataset, run: Run, depth: int | None, **scoring: Any
) -> tuple[dict[str, dict[str, float]], int]:
    """
    Reranks the first documents of each query.

    Args:
        cross_encoder: the reranker, or any other object with its `rank_batch`.
        dataset: has the texts.
        run: score by doc_id by query_id.
        depth, scoring: see [`evaluate_reranker`].

    Returns:
        the reranked run, and how many pairs were scored.

    Raises:
        ValueError: a document has no text.
    """
    ranked = {query_id: rank_documents(docs) for query_id, docs in run.items()}
    top = {query_id: doc_ids[:depth] for query_id, doc_ids in ranked.items()}
    for query_id, doc_ids in top.items():
        for doc_id in doc_ids:
            if doc_id not in dataset.corpus:
                raise ValueError(f"the document {doc_id!r} of query {query_id!r} has no text: add it to corpus")
    activation = scoring.get("activation_fn") or getattr(cross_encoder, "activation_fn", None)
    if activation is not None:
        scoring["activation_fn"] = rank_by(activation)
    rankings = cross_encoder.rank_batch(
        [dataset.queries[query_id] for query_id in top],
        [[dataset.corpus[doc_id] for doc_id in doc_ids] for doc_ids in top.values()],
        **scoring,
    )
    reranked = {}
    for (query_id, doc_ids), ranking in zip(top.items(), rankings, strict=True):
        scores = {result["corpus_id"]: result["score"] for result in ranking}
        order, values = rank_candidates([scores[place] for place in range(len(doc_ids))], len(ranked[query_id]))
        reranked[query_id] = {ranked[query_id][place]: value for place, value in zip(order, values, strict=True)}
    return reranked, sum(map(len, top.values()))

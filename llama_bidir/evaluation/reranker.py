"""A reranker on a retrieval collection: the measures of a run before and after reranking."""

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data.beir_folder import find_files, find_run
from ..data.trec import no_common_query, read_judged_queries, read_qrels, read_run, read_run_documents
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
    **scoring: Any,
) -> RerankerEvaluation:
    """
    Reranks the first documents of each judged query and measures the run before and after.

    Args:
        cross_encoder: the reranker.
        dataset: a BEIR folder (see [`load_dataset`]), a [`Dataset`], or a mapping with its fields.
        depth: how many documents of the run to rerank per query; None reranks all. The others keep their order, below.
        measures: see [`~measures.parse_measures`].
        qrels, run: which files of the folder.
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
        dataset = load_dataset(dataset, qrels=qrels, run=run, depth=depth)
    elif qrels is not None or run is not None:
        raise ValueError("qrels and run name files of a folder, but the dataset is not one")
    elif isinstance(dataset, Mapping) and dataset.keys() >= set(Dataset._fields):
        dataset = Dataset(**{field: dataset[field] for field in Dataset._fields})
    elif not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset must be a BEIR folder, a Dataset, or a mapping with {', '.join(Dataset._fields)}; got "
            f"{describe(dataset)}"
        )
    run_before = {query_id: dict(dataset.run.get(query_id, {})) for query_id in dataset.qrels}
    if not any(run_before.values()):
        raise no_common_query("the run", "the qrels")
    started = time.perf_counter()
    reranked, num_pairs = _rerank(cross_encoder, dataset, run_before, depth, scoring)
    seconds = time.perf_counter() - started
    before, after = (evaluate_queries(dataset.qrels, each, parsed) for each in (run_before, reranked))
    return RerankerEvaluation(before, after, compare(after, before), run_before, reranked, num_pairs, seconds)


def load_dataset(
    folder: str | os.PathLike[str], *, qrels: str | None = None, run: str | None = None, depth: int | None = None
) -> Dataset:
    """
    Reads a BEIR folder. Of the documents, it keeps only those to rerank.

    Args:
        folder: see [`~data.beir_folder.find_files`].
        qrels, run: paths in the folder; by default `qrels/test.tsv` or the only other file of qrels, and the only one
            of `run*.trec`, `run*.trec.gz`.
        depth: how many documents to rerank per judged query; None is all.

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
    first_stage = read_run(run_path)
    judged = {query_id: first_stage[query_id] for query_id in judgements if query_id in first_stage}
    top = {query_id: dict.fromkeys(rank_documents(docs)[:depth], 0.0) for query_id, docs in judged.items()}
    keep = {doc_id for docs in top.values() for doc_id in docs}
    return Dataset(read_run_documents(files.corpus, keep, {run_path: top}), queries, judgements, judged)


def _rerank(
    cross_encoder: "CrossEncoder", dataset: Dataset, run: Run, depth: int | None, scoring: dict[str, Any]
) -> tuple[dict[str, dict[str, float]], int]:
    """Returns the reranked run and the number of pairs scored."""
    ranked = {query_id: rank_documents(docs) for query_id, docs in run.items()}
    top = {query_id: doc_ids[:depth] for query_id, doc_ids in ranked.items()}
    for query_id, doc_ids in top.items():
        if query_id not in dataset.queries:
            raise ValueError(f"the query {query_id!r} is judged but has no text: add it to queries")
        for doc_id in doc_ids:
            if doc_id not in dataset.corpus:
                raise ValueError(f"the document {doc_id!r} of query {query_id!r} has no text: add it to corpus")
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

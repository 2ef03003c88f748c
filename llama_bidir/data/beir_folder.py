"""A folder in BEIR's layout, and its training rows: positives from the qrels, negatives from a first-stage run."""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .arrow import FileStamp, error_record, record_features, row_record, stamp, write_dataset
from .corpus import Corpus, open_corpus, read_queries
from .files import check_file
from .identical import find_identical
from .rows import TrainingRow
from .trec import RankedRun, read_judgements, tell_missing, unknown_id

if TYPE_CHECKING:
    from datasets import Dataset

QRELS_NAMES = ("qrels.tsv", "qrels.tsv.gz", "qrels/train.tsv", "qrels/train.tsv.gz", "qrels.trec", "qrels.txt")


class BeirFiles(NamedTuple):
    """The files of a BEIR folder, without its runs."""

    corpus: Path
    queries: Path
    qrels: Path


class RelevantDocuments:
    """
    The queries of a BEIR folder that have a relevant document, in the order of the qrels, and those documents.

    Args:
        files: of the folder.
        index: row number in the corpus by doc_id.

    Attributes:
        judgements: the judgements of 1 or more by query_id.

    Raises:
        ValueError: a line of a file breaks its rule, or no query has a relevant document.
    """

    def __init__(self, files: BeirFiles, index: Mapping[str, int]):
        self._files, self._index = files, index
        judged = {
            query_id: [judgement for judgement in judgements.values() if judgement.relevance >= 1]
            for query_id, judgements in read_judgements(files.qrels).items()
        }
        self.judgements = {query_id: relevant for query_id, relevant in judged.items() if relevant}
        if not self.judgements:
            raise ValueError(f"{files.qrels}: no query has a relevant document, one with a score of 1 or more")
        self._queries = read_queries(files.queries)

    def drop_missing(self) -> None:
        """
        Leaves out relevant documents that the corpus lacks and queries without a text, with a warning for each kind.

        Raises:
            ValueError: nothing remains. The message names file and line of the first missing one.
        """
        first = next(iter(self.judgements))
        queries = [query_id for query_id in self.judgements if query_id not in self._queries]
        documents = dict[str, None]()
        kept = {}
        for query_id, judged in self.judgements.items():
            known = [judgement for judgement in judged if judgement.doc_id in self._index]
            documents |= dict.fromkeys(each.doc_id for each in judged if each.doc_id not in self._index)
            if known and query_id in self._queries:
                kept[query_id] = known
        if not kept:
            self.read(first)
        self.judgements = kept
        tell_missing(self._files.qrels, "judged queries", queries, self._files.queries)
        tell_missing(self._files.qrels, "relevant documents", list(documents), self._files.corpus)

    def read(self, query_id: str) -> tuple[str, list[int], list[float]]:
        """
        Returns the text of a query, and the row numbers and the relevance of its relevant documents.

        Raises:
            ValueError: the query is not among the queries, or a document is not in the corpus, with file and line.
        """
        relevant = self.judgements[query_id]
        if query_id not in self._queries:
            where = f"{self._files.qrels}:{relevant[0].line}: query-id"
            raise unknown_id(where, "query", query_id, self._files.queries)
        for judgement in relevant:
            if judgement.doc_id not in self._index:
                where = f"{self._files.qrels}:{judgement.line}: corpus-id"
                raise unknown_id(where, "document", judgement.doc_id, self._files.corpus)
        rows = [self._index[judgement.doc_id] for judgement in relevant]
        return self._queries[query_id], rows, [float(judgement.relevance) for judgement in relevant]


def load_beir(
    folder: Path,
    *,
    qrels: str | None = None,
    run: str | None = None,
    depth: int | None = None,
    ignore_identical_ids: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple["Dataset", "Dataset"]:
    """
    Reads a BEIR folder: one row for each query with a relevant document, in the order of the qrels. Its negatives are
    the documents of the run that are not judged relevant, by rank. A query without a run entry has none. The scores of
    the qrels are the relevance of the positives.

    Args:
        folder, qrels, run: see [`find_files`] and [`find_run`].
        depth: how many documents of the run to consider for each query; None considers all.
        ignore_identical_ids: leave out negatives that are the query itself. They do not count for `depth`.
        cache_dir: see [`write_dataset`].

    Returns:
        the records of the rows, whose passages are row numbers, and the documents (column `text`) that these refer to.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a line of a file breaks its rule, or no query has a relevant document. If the folder lacks the text
            or a document of a query, the query becomes a record with `error`.
    """
    files, run_path = find_files(folder, qrels=qrels), find_run(folder, run)
    corpus = open_corpus(files.corpus, cache_dir)
    arguments = {
        "files": files,
        "corpus": corpus,
        "run": run_path,
        "depth": depth,
        "ignore_identical_ids": ignore_identical_ids,
        "states": tuple(map(stamp, (*files, run_path))),
    }
    return write_dataset(_generate_rows, record_features("int64"), arguments, cache_dir), corpus.dataset


def find_files(folder: Path, *, qrels: str | None = None) -> BeirFiles:
    """
    Finds the files of a BEIR folder.

    Args:
        folder: holds `corpus.jsonl` and `queries.jsonl`, or their `.gz` forms.
        qrels: a path in the folder (or an absolute one). By default it is the only one of `qrels.tsv`,
            `qrels/train.tsv`, `qrels.trec` and `qrels.txt`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there are several candidates for a file, with their names.
    """
    corpus, queries = (
        _choose(folder, kind, None, [f"{kind}.jsonl", f"{kind}.jsonl.gz"], f"{kind}.jsonl or {kind}.jsonl.gz")
        for kind in ("corpus", "queries")
    )
    return BeirFiles(corpus, queries, _choose(folder, "qrels", qrels, QRELS_NAMES, "qrels.tsv or qrels/train.tsv"))


def find_run(folder: Path, run: str | None = None) -> Path:
    """
    Finds a run in a BEIR folder.

    Args:
        folder: the BEIR folder.
        run: a path in the folder (or an absolute one). By default it is the only one of `run*.trec`, `run*.trec.gz`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several, with their names.
    """
    return _choose(folder, "run", run, list_runs(folder), "run*.trec or run*.trec.gz")


def list_runs(folder: Path) -> list[str]:
    """Returns the names of the runs in a folder."""
    return sorted(file.name for pattern in ("run*.trec", "run*.trec.gz") for file in folder.glob(pattern))


def _choose(folder: Path, kind: str, name: str | None, candidates: Iterable[str], rule: str) -> Path:
    if name is not None:
        return check_file(folder / name)
    found = [candidate for candidate in candidates if (folder / candidate).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder}: there is no {rule} in the folder")
    if len(found) > 1:
        fix = f"name one with {kind}:" if kind in ("qrels", "run") else "remove one"
        raise ValueError(f"{folder}: there are several files of {kind}: {', '.join(found)}; {fix}")
    return folder / found[0]


def _generate_rows(
    files: BeirFiles,
    corpus: Corpus,
    run: Path,
    depth: int | None,
    ignore_identical_ids: bool,
    states: tuple[FileStamp, ...],
    version: int,
) -> Iterator[dict[str, Any]]:
    index = corpus.index()
    relevant = RelevantDocuments(files, index)
    ranked = RankedRun(run, relevant.judgements, corpus, index=index, source="the qrels")
    for query_id in relevant.judgements:
        try:
            query, positives, relevance = relevant.read(query_id)
            rows = np.array(ranked.rows(query_id), dtype=np.int64)
            mask = np.zeros(len(rows), dtype=bool)
            if ignore_identical_ids:
                mask = find_identical(corpus, query_id, query, rows, index) & ~np.isin(rows, positives)
            known = set(positives)
            negatives = [row for row in rows[~mask][:depth].tolist() if row not in known]
            row = TrainingRow(query, positives, negatives, relevance=relevance if set(relevance) != {1.0} else None)
            yield row_record(row, int(mask.sum()))
        except ValueError as error:
            yield error_record(error)

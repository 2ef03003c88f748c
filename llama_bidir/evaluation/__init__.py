"""Evaluation of rankings with qrels and runs."""

from ..data.corpus import read_corpus, write_corpus, write_queries
from ..data.trec import read_judged_queries as read_queries
from ..data.trec import read_qrels, read_run, write_qrels, write_run
from ..data.trec import read_run_documents as read_documents
from .bm25 import score_bm25, search_bm25
from .comparison import Comparison, compare
from .measures import Evaluation, Qrels, Run, evaluate_queries, evaluate_run, rank_documents
from .mteb import MTEBCrossEncoder
from .report import Report, System, make_report, render_report
from .reranker import Dataset, RerankerEvaluation, evaluate_reranker, judged_run, load_dataset, rerank_run

__all__ = [
    "Comparison",
    "Dataset",
    "Evaluation",
    "MTEBCrossEncoder",
    "Qrels",
    "Report",
    "RerankerEvaluation",
    "Run",
    "System",
    "compare",
    "evaluate_queries",
    "evaluate_reranker",
    "evaluate_run",
    "judged_run",
    "load_dataset",
    "make_report",
    "rank_documents",
    "read_corpus",
    "read_documents",
    "read_qrels",
    "read_queries",
    "read_run",
    "render_report",
    "rerank_run",
    "score_bm25",
    "search_bm25",
    "write_corpus",
    "write_qrels",
    "write_queries",
    "write_run",
]

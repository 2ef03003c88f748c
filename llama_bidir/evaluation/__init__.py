"""Evaluation of rankings with qrels and runs."""

from .bm25 import score_bm25
from .files import write_corpus, write_qrels, write_queries, write_run
from .measures import Qrels, Run, evaluate_run

__all__ = [
    "Qrels",
    "Run",
    "evaluate_run",
    "score_bm25",
    "write_corpus",
    "write_qrels",
    "write_queries",
    "write_run",
]

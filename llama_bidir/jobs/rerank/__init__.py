"""Reranking of whole runs: resumable, in bounded memory, in one process or in many."""

from ...evaluation.ranking import rank_candidates
from ..job import JobResult as RerankResult
from ..ray import CrossEncoderActor
from .task import RerankTask, rerank_run

__all__ = ["CrossEncoderActor", "RerankResult", "RerankTask", "rank_candidates", "rerank_run"]

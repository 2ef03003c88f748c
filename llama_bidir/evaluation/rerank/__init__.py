"""Reranking of whole runs: resumable, in bounded memory, in one process or in many."""

from .job import RerankJob
from .local import RerankResult, rerank_job, rerank_run
from .ranking import rank_candidates

__all__ = ["RerankJob", "RerankResult", "rank_candidates", "rerank_job", "rerank_run"]

"""Reranking of whole runs: resumable, in bounded memory, in one process or in many."""

from ...evaluation.ranking import rank_candidates
from .job import RerankJob
from .local import RerankResult, rerank_job, rerank_run
from .ray import CrossEncoderActor, rerank_with_ray

__all__ = [
    "CrossEncoderActor",
    "RerankJob",
    "RerankResult",
    "rank_candidates",
    "rerank_job",
    "rerank_run",
    "rerank_with_ray",
]

"""A reranker in the forms that other tools read, each with equal scores."""

from .formats import FORMATS, export_reranker

__all__ = ["FORMATS", "export_reranker"]

"""The quickstart: a small reranker, made, trained, saved, reloaded and evaluated in a few minutes."""

from .collection import make_collection
from .run import QuickstartResult, run_quickstart

__all__ = ["QuickstartResult", "make_collection", "run_quickstart"]

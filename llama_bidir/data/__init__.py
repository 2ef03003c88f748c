"""Training data: rows, where they come from, and how they become batches of groups."""

from .collators import GroupCollator
from .rows import TrainingRow, parse_row
from .sources import load_rows

__all__ = ["GroupCollator", "TrainingRow", "load_rows", "parse_row"]

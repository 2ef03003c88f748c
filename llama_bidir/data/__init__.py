"""Training data: rows, where they come from, and how they become batches of groups."""

from .collators import GroupCollator
from .groups import Group, GroupDataset, Grouping, GroupStream
from .rows import TrainingRow, parse_row
from .sources import Source, load_rows, parse_source, read_rows

__all__ = [
    "Group",
    "GroupCollator",
    "GroupDataset",
    "GroupStream",
    "Grouping",
    "Source",
    "TrainingRow",
    "load_rows",
    "parse_row",
    "parse_source",
    "read_rows",
]

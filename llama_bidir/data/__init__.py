"""Training data: rows, where they come from, and how they become batches of groups."""

from .collators import GroupCollator
from .groups import FixedGroups, Group, GroupDataset, Grouping, GroupStream
from .rows import TrainingRow, parse_row
from .sources import Source, check_teacher_scores, load_rows, parse_source, read_rows, with_negatives

__all__ = [
    "FixedGroups",
    "Group",
    "GroupCollator",
    "GroupDataset",
    "GroupStream",
    "Grouping",
    "Source",
    "TrainingRow",
    "check_teacher_scores",
    "load_rows",
    "parse_row",
    "parse_source",
    "read_rows",
    "with_negatives",
]

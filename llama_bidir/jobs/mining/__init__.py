"""Mining of hard negatives with a cross-encoder as the teacher."""

from .job import MiningResult, mine_file
from .selection import Selected, Selection, select_negatives
from .windows import MinedRow, mine_negatives

__all__ = [
    "MinedRow",
    "MiningResult",
    "Selected",
    "Selection",
    "mine_file",
    "mine_negatives",
    "select_negatives",
]

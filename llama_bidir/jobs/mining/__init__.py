"""Mining of hard negatives with a cross-encoder as the teacher."""

from .result import MiningResult
from .selection import Selected, Selection, select_negatives
from .task import MiningTask, mine_file, open_mining_job
from .windows import MinedRow, mine_negatives

__all__ = [
    "MinedRow",
    "MiningResult",
    "MiningTask",
    "Selected",
    "Selection",
    "mine_file",
    "mine_negatives",
    "open_mining_job",
    "select_negatives",
]

"""What mining reports when it is done."""

from typing import NamedTuple

from .selection import REASONS

SHOWN_ROWS = 10
# What `MiningResult.format` calls the reasons.
SAID = {
    "empty": "empty",
    "positive": "positives of their row",
    "skipped": "skipped at the top",
    "margin": "not below the margin",
    "max_score": "above the maximum score",
    "duplicate": "near-duplicates",
    "surplus": "more than needed",
}


class MiningResult(NamedTuple):
    """
    The result of mining.

    Args:
        num_rows: rows of the source.
        num_written: rows of the output.
        num_candidates: candidates of all rows.
        num_negatives: how many of them were taken.
        removed: how many of them were not taken, by reason (see [`select_negatives`]).
        without_negatives: the names (as in errors) of the rows for which no candidate passed.
        num_identical: how many candidates were left out before scoring because they are the query itself.
    """

    num_rows: int
    num_written: int
    num_candidates: int
    num_negatives: int
    removed: dict[str, int]
    without_negatives: list[str]
    num_identical: int = 0

    def format(self) -> str:
        """Returns the result as text."""
        removed = [f"{self.removed[reason]:,} {SAID[reason]}" for reason in REASONS if self.removed[reason]]
        lines = [
            f"{self.num_rows:,} rows, {self.num_written:,} written; {self.num_candidates:,} candidates, "
            f"{self.num_negatives:,} negatives",
            f"not taken: {', '.join(removed) or 'none'}",
        ]
        if num_without := len(self.without_negatives):
            is_kept = self.num_written == self.num_rows
            fate = "written with an empty neg_doc" if is_kept else "left out (--keep-empty writes them)"
            more = f" and {num_without - SHOWN_ROWS:,} more" if num_without > SHOWN_ROWS else ""
            shown = ", ".join(self.without_negatives[:SHOWN_ROWS])
            lines.append(f"{num_without:,} rows without a negative, {fate}: {shown}{more}")
        return "\n".join(lines)

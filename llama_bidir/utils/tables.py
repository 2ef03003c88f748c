"""Tables as plain text."""

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    """
    Formats rows as lines, with two spaces between columns.

    Args:
        rows: cells, with the same number of columns in every row.
        alignment: `<` or `>` for each column.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, alignment, widths, strict=True)).rstrip()
        for row in rows
    ]

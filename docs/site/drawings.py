"""Draws the pictures of docs/how-it-works.md: python docs/site/drawings.py"""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

DOCS = Path(__file__).parents[1]
TOKENS = ["question", ":", "who", "flew", "?", "passage", ":", "bees", "flew"]
NUM_QUERY_TOKENS = 5
LENGTHS = [7, 3, 5, 4]
BLUE, ORANGE, GREEN, VIOLET = "#2f6fb0", "#c2703d", "#3f8f6b", "#7a5ea8"
GREY, LINE, INK = "#e6e9ed", "#b8c0ca", "#27313d"


def main() -> None:
    """Writes the two files."""
    draw_attention(DOCS / "attention.png")
    draw_packing(DOCS / "packing.png")


def make_figure(width: float, height: float) -> Figure:
    """Returns a figure with a white background, which a dark page shows too."""
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def cell(axes: Any, column: float, row: float, color: str, gap: float = 1.5) -> None:
    """Draws one square of a grid, with a gap in points."""
    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=color, edgecolor="white", linewidth=gap))


def finish(axes: Any, width: float, height: float) -> None:
    """Hides the axes of a grid, whose first row is at the top."""
    axes.set(xlim=(-0.1, width + 0.1), ylim=(height + 0.1, -0.1), aspect="equal")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def draw_attention(path: Path) -> None:
    """Writes which tokens each token attends to, with and without the causal mask."""
    figure = make_figure(9.2, 5.0)
    size = len(TOKENS)
    for axes, title, is_causal in zip(
        figure.subplots(1, 2), ("Causal: a decoder", "Bidirectional: this package"), (True, False), strict=True
    ):
        for row in range(size):
            for column in range(size):
                is_other = (row < NUM_QUERY_TOKENS) != (column < NUM_QUERY_TOKENS)
                color = ORANGE if is_other else BLUE
                cell(axes, column, row, GREY if is_causal and column > row else color)
        for place in (0, NUM_QUERY_TOKENS, size):
            axes.plot([place, place], [0, size], color=INK, linewidth=1)
            axes.plot([0, size], [place, place], color=INK, linewidth=1)
        places = [number + 0.5 for number in range(size)]
        axes.set_xticks(places, TOKENS, rotation=60, ha="left", rotation_mode="anchor", fontsize=11)
        axes.set_yticks(places, TOKENS if is_causal else [], fontsize=11)
        axes.xaxis.tick_top()
        axes.set_title(title, fontsize=13, color=INK, pad=10)
        finish(axes, size, size)
    figure.axes[0].set_ylabel("this token attends to ...", fontsize=11, color=INK)
    handles = [Rectangle((0, 0), 1, 1, facecolor=color) for color in (BLUE, ORANGE, GREY)]
    labels = ["within the query or the passage", "between query and passage", "hidden by the causal mask"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    figure.savefig(path)


def draw_packing(path: Path) -> None:
    """Writes a padded batch, the packed stream of the same pairs, and the attention of the stream."""
    figure = make_figure(9.2, 4.4)
    colors = [BLUE, ORANGE, GREEN, VIOLET]
    longest, total = max(LENGTHS), sum(LENGTHS)
    places = figure.subplot_mosaic(
        [["padded", "attention"], ["packed", "attention"]], width_ratios=[1.35, 1], height_ratios=[2.4, 1]
    )
    padded, packed, attention = (places[name] for name in ("padded", "packed", "attention"))
    for row, (length, color) in enumerate(zip(LENGTHS, colors, strict=True)):
        for column in range(longest):
            cell(padded, column, row, color if column < length else GREY)
    num_padding = longest * len(LENGTHS) - total
    padded.set_title(
        f"Padded: {longest * len(LENGTHS)} positions, {num_padding} of them padding", fontsize=12, color=INK
    )
    padded.set_yticks([row + 0.5 for row in range(len(LENGTHS))], [f"pair {row + 1}" for row in range(len(LENGTHS))])
    padded.set_xticks([])
    finish(padded, longest, len(LENGTHS))
    starts = [sum(LENGTHS[:number]) for number in range(len(LENGTHS) + 1)]
    for start, length, color in zip(starts, LENGTHS, colors, strict=False):
        for column in range(start, start + length):
            cell(packed, column, 0, color)
        for row in range(start, start + length):
            for column in range(start, start + length):
                cell(attention, column, row, color, 0.5)
    packed.set_title(f"Packed: one stream of {total} tokens", fontsize=12, color=INK)
    packed.set_xticks(starts, [str(start) for start in starts])
    packed.set_yticks([])
    packed.set_xlabel("cu_seq_lens: the start of each pair, and the end", fontsize=11, color=INK)
    finish(packed, total, 1)
    attention.add_patch(Rectangle((0, 0), total, total, facecolor="none", edgecolor=LINE))
    attention.set_title("Attention stays within each pair", fontsize=12, color=INK)
    attention.set_xticks([])
    attention.set_yticks([])
    finish(attention, total, total)
    figure.savefig(path)


if __name__ == "__main__":
    main()

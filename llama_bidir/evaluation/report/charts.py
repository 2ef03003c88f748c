"""The charts of a report: matplotlib figures as inline SVG."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from ...utils.extras import require
from .contents import Histogram

SIZE = (400 / 72, 240 / 72)  # inches of 72 pixels; about the width of a phone, so text keeps its size there
MAX_LEVELS = 400  # heights of bars, about two per pixel
DEPTH_TICKS = (1, 2, 3, 5, 10, 20, 50, 100)
# matplotlib draws with these colours. In the SVG, custom properties of the style sheet replace them.
RUN, BASELINE, GAIN, LOSS, INK, MUTED, LINE = (f"#00000{number}" for number in range(1, 8))
PROPERTIES = {
    RUN: "var(--run)",
    BASELINE: "var(--baseline)",
    GAIN: "var(--gain)",
    LOSS: "var(--loss)",
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
}
STYLE = {
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "font.family": "DejaVu Sans",  # part of matplotlib, so every machine computes the same layout
    "font.size": 12,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.formatter.useoffset": False,
    "axes.labelcolor": MUTED,
    "grid.color": LINE,
    "grid.linewidth": 1,
    "xtick.bottom": False,
    "xtick.minor.bottom": False,
    "xtick.labelcolor": MUTED,
    "ytick.left": False,
    "ytick.labelcolor": MUTED,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
}
METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # omitted: the same data give the same bytes


def render_chart(draw: Callable[[Any, Any], None], data: Any, label: str) -> str:
    """
    Renders a chart as an SVG element whose colours and fonts are those of the page.

    Args:
        draw: one of the functions below. It is called with matplotlib's axes and `data`.
        data: what the chart shows.
        label: a description for screen readers.

    Raises:
        ImportError: matplotlib is not installed.
    """
    style, figures = require("matplotlib.style", "eval"), require("matplotlib.figure", "eval")
    # The salt keeps the identifiers of the charts on a page apart.
    with style.context(["default", {**STYLE, "svg.hashsalt": label}]), io.StringIO() as buffer:
        figure = figures.Figure(figsize=SIZE, layout="constrained")
        draw(figure.subplots(), data)
        figure.savefig(buffer, format="svg", transparent=True, metadata=METADATA)
        svg = buffer.getvalue()
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg[svg.index("<svg") :])  # figure_1 and the like repeat in every chart
    svg = re.sub("|".join(PROPERTIES), lambda match: PROPERTIES[match[0]], svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def draw_differences(axes: Any, differences: Sequence[float]) -> None:
    """Draws one bar per query, in falling order: gains of the run above the line, and losses below."""
    # Bars that differ by less than half a pixel become one, which bounds the size of the chart.
    unit = (max(0.0, *differences) - min(0.0, *differences)) / MAX_LEVELS or 1.0
    heights = np.round(np.array(differences) / unit) * unit
    starts = np.flatnonzero(np.diff(heights, prepend=np.inf))
    for bars, colour in ((np.maximum(heights, 0), GAIN), (np.minimum(heights, 0), LOSS)):
        if bars.any():
            axes.stairs(bars[starts], [*starts, len(differences)], fill=True, color=colour, linewidth=0)
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.margins(x=0)
    numbers = sorted({1, len(differences)})
    axes.set_xticks([number - 0.5 for number in numbers], [f"{number:,}" for number in numbers])
    axes.set_xlabel("queries, by difference")


def draw_depths(axes: Any, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Draws a line of (depth, value) points for the run, and one for the baseline if there is one."""
    for curve, colour, dashes in zip(curves.values(), (RUN, BASELINE), ("-", "--"), strict=False):
        axes.plot(*zip(*curve, strict=True), dashes, color=colour, linewidth=2, marker="o", markersize=5)
    low, high = axes.get_ylim()
    axes.set_ylim(max(0.0, low - 0.01), min(1.0, high + 0.01))
    axes.set_xscale("log")
    deepest = max(depth for curve in curves.values() for depth, _ in curve)
    ticks = [depth for depth in DEPTH_TICKS if depth <= deepest]
    axes.set_xticks(ticks, [str(depth) for depth in ticks])
    axes.minorticks_off()
    axes.set_xlabel("rank depth")


def draw_histogram(axes: Any, histogram: Histogram) -> None:
    """Draws the scores of relevant candidates (filled) and of all others (outlined)."""
    axes.stairs(histogram.relevant, histogram.edges, fill=True, color=RUN, alpha=0.55)
    axes.stairs(histogram.others, histogram.edges, color=INK, linewidth=1.5)
    axes.margins(x=0.01)
    axes.yaxis.set_major_formatter(require("matplotlib.ticker", "eval").PercentFormatter(1))
    axes.set_xlabel("score")

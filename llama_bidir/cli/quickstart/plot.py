"""The plot of the quickstart: nDCG@10 of each system."""

import os
from collections.abc import Mapping

from ...utils.extras import require


def plot_ndcg(path: str | os.PathLike[str], ndcg: Mapping[str, float]) -> None:
    """Writes a PNG with one bar per system. The last system, the fine-tuned reranker, has a colour of its own."""
    names, values = list(ndcg), list(ndcg.values())
    size = (7, 0.7 + 0.55 * len(names))
    figure = require("matplotlib.figure", "eval").Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, values, color=["#b8bfc9"] * (len(names) - 1) + ["#2f6fb0"], height=0.62)
    axes.bar_label(bars, labels=[f"{value:.3f}" for value in values], padding=4, fontsize=10)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_title("nDCG@10 on held-out questions, same candidates", loc="left", fontsize=11)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.grid(visible=True, color="#e4e7eb")
    axes.set_axisbelow(True)
    figure.savefig(path)

"""Tables and the plot of the measurements."""

import os
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]

COLORS = {
    "llama-bidir": "#2f6fb0",
    "sentence-transformers": "#5b6573",
    "sentence-transformers, unpadded": "#4f9d8b",
    "vllm": "#a4508b",
    "openvino": "#c2703d",
    "onnxruntime": "#7f6bb3",
    "reference": "#8a94a3",
    "stock-llama": "#c3cad3",
    "FlagEmbedding": "#d9a441",
}


def number(name: str, pattern: str, scale: float = 1) -> Callable[[Row], str]:
    """Returns a function from a row to the text of a value times `scale`: empty if the row lacks the value."""
    return lambda row: "" if row.get(name) is None else pattern.format(row[name] * scale)


_SUBJECT: Columns = {
    "model": lambda row: row["model"],
    "dtype": lambda row: row["dtype"],
    "workload": lambda row: row["workload"],
    "implementation": lambda row: row["implementation"],
    "pairs": number("pairs", "{:,}"),
}
SPEED: Columns = {
    **_SUBJECT,
    "tokens": number("tokens", "{:,}"),
    "ms": number("seconds", "{:,.1f}", 1000),
    "pairs/s": number("pairs_per_second", "{:.1f}"),
    "median": number("median_pairs_per_second", "{:.1f}"),
    "tokens/s": number("tokens_per_second", "{:,.0f}"),
    "vs ST": number("ratio", "{:.2f}"),
    "median vs ST": number("median_ratio", "{:.2f}"),
    "peer": lambda row: row.get("peer") or "",
    "vs peer": number("peer_ratio", "{:.2f}"),
    "median vs peer": number("median_peer_ratio", "{:.2f}"),
    "score error": number("score_error", "{:.1e}"),  # of rows that predate `error`
    "error": number("error", "{:.1e}"),
    "above MiB": number("above_bytes", "{:,.0f}", 2**-20),
    "of peak": number("peak_share", "{:.1%}"),
    "setting": lambda row: row.get("setting", ""),
}
MEMORY: Columns = {
    **_SUBJECT,
    "loaded MiB": number("loaded_bytes", "{:,.0f}", 2**-20),
    "peak MiB": number("peak_bytes", "{:,.0f}", 2**-20),
    "above MiB": number("above_bytes", "{:,.0f}", 2**-20),
    "vs ST": number("ratio", "{:.2f}"),
    "setting": lambda row: row.get("setting", ""),
}
STREAM: Columns = {
    "dtype": lambda row: row["dtype"],
    "pairs": number("pairs", "{:,}"),
    "loaded MiB": number("loaded_bytes", "{:,.0f}", 2**-20),
    "peak MiB": number("peak_bytes", "{:,.0f}", 2**-20),
    "above MiB": number("above_bytes", "{:,.0f}", 2**-20),
    "seconds": number("seconds", "{:.1f}"),
}
SECTIONS: dict[str, tuple[str, Columns]] = {
    "speed": (
        "Speed in the best round. vs ST is pairs/s relative to sentence-transformers in the same dtype (or in the "
        "first one that it has), and vs peer is pairs/s relative to the fastest other implementation of the same or a "
        "higher precision. The medians are over the ratios within each round. error is the root mean square of the "
        "differences from a padded float32 pass, divided by the standard deviation of the float32 scores. above is the "
        "peak memory above the loaded weights. of peak is the arithmetic for real tokens as a share of the machine's "
        "fastest matrix product.",
        SPEED,
    ),
    "memory": (
        "Peak memory of a separate process, before (loaded) and after scoring: resident on a CPU, allocated on a GPU. "
        "above is the peak of scoring above the memory in use before, with all weights loaded.",
        MEMORY,
    ),
    "stream": ("Peak memory of CrossEncoder.predict on a generator, with a model of one layer.", STREAM),
}
_KEY = ("hardware", "model", "dtype", "workload", "implementation", "pairs")


def print_rows(rows: Iterable[Row], columns: Columns, *, header: bool) -> None:
    """Prints rows in columns of fixed width, which line up from one call to the next."""
    widths = {title: max(len(title), 9) for title in columns}
    widths.update(
        {title: width for title, width in {"workload": 12, "implementation": 31, "peer": 31}.items() if title in widths}
    )
    if header:
        print("  ".join(f"{title:>{width}}" for title, width in widths.items()))
    for row in rows:
        print("  ".join(f"{cell(row):>{widths[title]}}" for title, cell in columns.items()), flush=True)


def write_markdown(path: str | os.PathLike[str], results: Mapping[str, list[Row]]) -> None:
    """Writes one GitHub table per section and machine. Of rows that were measured again, the last one counts."""
    results = {**results, "speed": add_memory(results.get("speed", []), results.get("memory", []))}
    lines = []
    for name, (caption, columns) in SECTIONS.items():
        for hardware, rows in _by(latest(results.get(name, [])), "hardware"):
            shown = {title: cell for title, cell in columns.items() if any(map(cell, rows))}
            lines += [f"{caption} {hardware}.", "", _markdown_line(shown), _markdown_line("---" for _ in shown)]
            lines += [_markdown_line(cell(row) for cell in shown.values()) for row in rows]
            lines.append("")
    machines = {}
    for machine in results.get("machines", []):
        versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items() if version)
        flags = " ".join(machine["cpu_flags"])
        line = (
            f"- {machine['date'][:10]}: {machine['hardware']} ({flags}), {machine['torch_threads']} threads; {versions}"
        )
        machines[line] = None
    lines += machines
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def latest(rows: Iterable[Row]) -> list[Row]:
    """Returns the last row of each machine, model, dtype, workload, implementation and number of pairs."""
    return list({_key(row): row for row in rows}.values())


def add_memory(speed: Iterable[Row], memory: Iterable[Row]) -> list[Row]:
    """Returns the rows of speed. Those without `above_bytes` get it from the row of memory for the same subject."""
    above = {_key(row): row.get("above_bytes") for row in memory}
    return [row if row.get("above_bytes") else {**row, "above_bytes": above.get(_key(row))} for row in speed]


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in _KEY)


def _by(rows: list[Row], *names: str) -> list[tuple[str, list[Row]]]:
    """Groups rows by equal values, which are the title of a group, in the order of first appearance."""
    titles = [", ".join(row[name] for name in names) for row in rows]
    ordered = sorted(zip(titles, rows, strict=True), key=lambda item: titles.index(item[0]))
    return [(title, [row for _, row in group]) for title, group in groupby(ordered, key=lambda item: item[0])]


def plot_speed(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """
    Writes a PNG of pairs per second.

    There is one panel per machine, model, workload and number of pairs, one group of bars per dtype, and one bar per
    implementation.

    Raises:
        ValueError: there is no row of a known implementation.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [
        {**row, "panel": f"{row['hardware']}, {row['model']}, {row['workload']}, {row['pairs']:,} pairs"}
        for row in latest(rows)
        if row["implementation"] in COLORS
    ]
    panels = _by(rows, "panel")
    if not panels:
        raise ValueError("nothing to plot: no row of speed")
    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(max(9.0, 4.5 * num_columns), 1.0 + 2.7 * num_rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes, (title, panel) in zip(grid, panels, strict=False):
        _plot_panel(axes, title, panel)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles = {label: bar for axes in grid for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = [name for name in COLORS if name in handles]
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Pairs scored per second, same weights and same pairs", fontsize=12)
    figure.savefig(path)


def _plot_panel(axes: Any, title: str, rows: list[Row]) -> None:
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    width = min(0.3, 0.88 / max(sum(row["dtype"] == dtype for row in rows) for dtype in dtypes))
    for position, dtype in enumerate(dtypes):
        speeds = {row["implementation"]: row["pairs_per_second"] for row in rows if row["dtype"] == dtype}
        shown = [name for name in COLORS if name in speeds]
        for index, name in enumerate(shown):
            place = position + (index - (len(shown) - 1) / 2) * width
            bars = axes.bar(place, speeds[name], width * 0.92, color=COLORS[name], label=name)
            axes.bar_label(bars, fmt="{:,.1f}" if speeds[name] < 100 else "{:,.0f}", fontsize=6.5, padding=2)
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xticks(range(len(dtypes)), dtypes)
    axes.set_xlim(-0.6, len(dtypes) - 0.4)
    axes.set_ylabel("pairs/s")
    axes.margins(y=0.12)
    axes.yaxis.grid(visible=True, color="#e4e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

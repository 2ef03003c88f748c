"""What the rows of `benchmarks.quality` say: tables with confidence intervals and p-values, and plots."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_bidir.evaluation.comparison import format_p, randomization_test

from .study import Cell, cell_of, decode_values

Row = Mapping[str, Any]

NDCG = "nDCG@10"
BLUE, GREY, ORANGE = "#2f6fb0", "#8a94a3", "#c2703d"


class Effect(NamedTuple):
    """
    The difference of two systems in nDCG@10, over queries.

    Args:
        difference: the mean over queries of the run minus the baseline.
        low, high: its 95 % confidence interval (Student's t).
        p_value: of the randomization test.
    """

    difference: float
    low: float
    high: float
    p_value: float

    def __str__(self) -> str:
        return f"{self.difference:+.3f} ({self.low:+.3f} to {self.high:+.3f}) | {format_p(self.p_value)}"


def effect(run: np.ndarray, baseline: np.ndarray) -> Effect:
    """Compares two systems. Each array has one value per query."""
    from scipy.stats import ttest_1samp

    differences = run - baseline
    interval = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    return Effect(float(differences.mean()), float(interval.low), float(interval.high), randomization_test(differences))


def per_query(rows: Sequence[Row], name: str, key: str = "per_query") -> np.ndarray:
    """Returns nDCG@10 of each query of a set, as the mean over the runs of the rows."""
    return np.mean([decode_values(row["sets"][name][key]) for row in rows], axis=0)


def compared_sets(rows: Sequence[Row]) -> list[str]:
    """Returns the names of the sets that are compared: longdoc counts once, with windows."""
    return [name for name in rows[0]["sets"] if "," not in name]


def pooled(rows: Sequence[Row], key: str = "per_query") -> np.ndarray:
    """Returns the values of the queries of all sets."""
    return np.concatenate([per_query(rows, name, key) for name in compared_sets(rows)])


def mean_of_sets(rows: Sequence[Row], key: str = "per_query") -> float:
    """Returns the mean over the sets of nDCG@10, in which each set counts the same."""
    return float(np.mean([per_query(rows, name, key).mean() for name in compared_sets(rows)]))


def by_setting(rows: Iterable[Row]) -> dict[Cell, list[Row]]:
    """Groups rows that differ in the seed alone, in the order of first appearance."""
    found: dict[Cell, list[Row]] = {}
    for row in rows:
        found.setdefault(cell_of(row).setting, []).append(row)
    return {setting: sorted(group, key=lambda row: row["seed"]) for setting, group in found.items()}


def same_seeds(rows: Sequence[Row], others: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Returns the rows of both whose seeds the other has too, so that runs are compared in pairs."""
    seeds = {row["seed"] for row in rows} & {row["seed"] for row in others}
    return [row for row in rows if row["seed"] in seeds], [row for row in others if row["seed"] in seeds]


def describe_change(cell: Cell, base: Cell) -> str:
    """Names the settings of a cell that differ from the base."""
    changed = {name: value for name, value in asdict(cell).items() if value != getattr(base, name)}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in changed.items()) or "none"


def compare_sets(run: Sequence[Row], baseline: Sequence[Row], labels: tuple[str, str], key: str) -> list[str]:
    """
    Returns a Markdown table of two systems, with one line per set.

    Args:
        run: the rows of the first system, one per seed.
        baseline: those of the second one.
        labels: the names of the two.
        key: of the values of the baseline in its rows.
    """
    lines = [
        f"| set | queries | {labels[1]} | {labels[0]} | difference (95 % interval) | p |",
        "|---|---|---|---|---|---|",
    ]
    for name in run[0]["sets"]:
        before, after = per_query(baseline, name, key), per_query(run, name)
        lines.append(f"| {name} | {len(after)} | {before.mean():.3f} | {after.mean():.3f} | {effect(after, before)} |")
    before, after = pooled(baseline, key), pooled(run)
    lines.append(f"| all queries | {len(after)} | {before.mean():.3f} | {after.mean():.3f} | {effect(after, before)} |")
    means = mean_of_sets(baseline, key), mean_of_sets(run)
    lines.append(f"| mean of the sets | | {means[0]:.3f} | {means[1]:.3f} | {means[1] - means[0]:+.3f} | |")
    return lines


def compare_settings(groups: Mapping[Cell, Sequence[Row]], base: Cell) -> list[str]:
    """Returns a Markdown table of all settings against the base, over the queries of all sets."""
    lines = [
        "| change | seeds | mean of the sets | difference, all queries (95 % interval) | p | training, minutes |",
        "|---|---|---|---|---|---|",
    ]
    for setting, rows in groups.items():
        run, baseline = same_seeds(rows, groups[base])
        seconds = [row["training_seconds"] for row in rows if row["training_seconds"] is not None]
        minutes = f"{np.mean(seconds) / 60:.0f}" if seconds else ""
        shown = "| | |" if setting == base else f"| {effect(pooled(run), pooled(baseline))} |"
        change = describe_change(setting, base)
        lines.append(f"| {change} | {len(rows)} | {mean_of_sets(rows):.3f} {shown} {minutes} |")
    return lines


def write_report(folder: Path, source: Path | None = None) -> None:
    """Prints the tables of each device that has rows, and writes the plots to a folder."""
    for path in [source] if source else sorted(Path(__file__).parent.glob("quality-*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        groups = by_setting(results["quality"])
        base = next(iter(groups))
        causal = replace(base, mask="causal", pooling="last")
        print(f"## {path.stem}: {len(results['quality'])} rows\n\nThe base setting: {asdict(base)}\n")
        best = max(groups, key=lambda setting: mean_of_sets(groups[setting]))
        print(f"Best setting: {describe_change(best, base)}\n")
        print(*compare_sets(groups[best], groups[best], ("reranked", "BM25"), "bm25_per_query"), sep="\n")
        if causal in groups:
            run, baseline = same_seeds(groups[base], groups[causal])
            print(f"\nThe mean of {len(run)} runs each:\n")
            print(*compare_sets(run, baseline, ("bidirectional, avg", "causal, last"), "per_query"), sep="\n")
            plot_masks(folder / f"{path.stem.replace('quality', 'results')}-masks.png", run, baseline)
        print("", *compare_settings(groups, base), sep="\n")
        plot_steps(folder / f"{path.stem.replace('quality', 'results')}-steps.png", groups, base)


def plot_masks(path: Path, run: Sequence[Row], baseline: Sequence[Row]) -> None:
    """Writes a PNG: nDCG@10 per set of BM25, the causal model and the bidirectional one, with the runs as dots."""
    figure, axes = _figure(8.0)
    names = list(run[0]["sets"])
    systems = [
        ("BM25", GREY, run, "bm25_per_query"),
        ("causal, last token", ORANGE, baseline, "per_query"),
        ("bidirectional, avg", BLUE, run, "per_query"),
    ]
    for offset, (label, color, rows, key) in enumerate(systems):
        places = np.arange(len(names)) + 0.27 * (offset - 1)
        heights = [per_query(rows, name, key).mean() for name in names]
        bars = axes.bar(places, heights, 0.25, color=color, label=label)
        axes.bar_label(bars, fmt="{:.3f}", fontsize=7, label_type="center", color="white")
        if key == "per_query":
            for row in rows:
                axes.plot(places, [row["sets"][name][NDCG] for name in names], "k.", markersize=3)
    axes.set_xticks(range(len(names)), names)
    _finish(figure, axes, path)


def plot_steps(path: Path, groups: Mapping[Cell, Sequence[Row]], base: Cell) -> None:
    """Writes a PNG: nDCG@10 of the held-out groups by step, the base and the causal model in colour."""
    figure, axes = _figure(7.0)
    colors = {base: BLUE, replace(base, mask="causal", pooling="last"): ORANGE}
    labels = {base: "bidirectional, avg", replace(base, mask="causal", pooling="last"): "causal, last token"}
    for setting, rows in groups.items():
        for number, row in enumerate(rows):
            axes.plot(
                [entry["step"] for entry in row["history"]],
                [entry["eval_ndcg@10"] for entry in row["history"]],
                color=colors.get(setting, "#d5d9df"),
                zorder=2 if setting in colors else 1,
                label=None if number else labels.get(setting),
            )
    axes.set_xlabel("step")
    axes.set_ylabel(f"{NDCG} of held-out groups")
    _finish(figure, axes, path)


def _figure(width: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _finish(figure: Any, axes: Any, path: Path) -> None:
    axes.set_ylabel(axes.get_ylabel() or NDCG)
    axes.yaxis.grid(visible=True, color="#e4e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)

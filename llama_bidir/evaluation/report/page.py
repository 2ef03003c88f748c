"""The page of a report: `report.html.jinja` with the values that it shows."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ... import __version__
from ...utils.extras import require
from ..comparison import NUM_PERMUTATIONS, TIE, format_p
from . import charts
from .contents import Report


def render_report(
    report: Report,
    *,
    queries: Mapping[str, str] | None = None,
    documents: Mapping[str, str] | None = None,
    latency: Mapping[str, float] | None = None,
) -> str:
    """
    Renders a report as one HTML page that needs no other file and no network.

    Args:
        report: the contents of the page.
        queries, documents: texts by query_id and by doc_id. Where one is missing, the page shows the identifier alone.
        latency: seconds by query_id.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    jinja2 = require("jinja2", "eval")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    page: str = environment.get_template("report.html.jinja").render(
        report=report,
        queries=queries or {},
        documents=documents or {},
        measures=_measure_rows(report),
        latency=_latency_rows(latency) if latency else None,
        num_higher=sum(value > TIE for value in report.differences),
        num_lower=sum(value < -TIE for value in report.differences),
        charts=charts,
        tie=TIE,
        num_permutations=NUM_PERMUTATIONS,
        version=__version__,
    )
    return page


def _measure_rows(report: Report) -> list[dict[str, str | float]]:
    if not report.comparisons:
        return [
            {"measure": name, "value": f"{value:.4f}"} for name, value in report.system.evaluation.aggregated.items()
        ]
    return [
        {
            "measure": each.measure,
            "run": f"{each.run:.4f}",
            "baseline": f"{each.baseline:.4f}",
            "difference": each.difference,
            "wins / losses / ties": f"{each.wins} / {each.losses} / {each.ties}",
            "p, t-test": format_p(each.t_test_holm),
            "p, randomization": format_p(each.randomization_holm),
        }
        for each in report.comparisons
    ]


def _latency_rows(latency: Mapping[str, float]) -> list[dict[str, str]]:
    seconds = np.array(list(latency.values()))
    median, most, nearly_all = np.percentile(seconds, [50, 95, 99])
    values = {"mean": seconds.mean(), "median": median, "95%": most, "99%": nearly_all, "slowest": seconds.max()}
    return [{"": f"{len(seconds):,} queries", **{name: f"{1000 * value:,.1f} ms" for name, value in values.items()}}]

"""The page of a report: HTML with its style and its charts inside, and no script."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files

import numpy as np

from ... import __version__
from ..comparison import NUM_PERMUTATIONS, TIE
from .charts import depth_chart, difference_chart, histogram_chart
from .contents import Histogram, QueryCase, RankedDocument, Report

MAX_QUERY, MAX_TEXT = 500, 240  # characters shown
MIN_P = 0.0001
ABSENT = "\N{EN DASH}"
# Nothing may be fetched and nothing run, whatever the texts hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


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
        report: its contents.
        queries, documents: texts by query_id and by doc_id; where one is missing, the identifier stands alone.
        latency: seconds by query_id.
    """
    name = report.system.name
    title = f"{name} against {report.baseline.name}" if report.baseline else name
    sections = [
        f"<header><h1>{escape(title)}</h1>{_summary(report)}</header>",
        f"<section><h2>Measures</h2>{_measures(report)}</section>",
        f'<section><h2>Rankings and scores</h2><div class="charts">{_charts(report)}</div></section>',
    ]
    if latency:
        sections.append(f"<section><h2>Latency</h2>{_latency(latency)}</section>")
    for heading, cases in report.cases.items():
        content = "".join(_case(case, report, queries or {}, documents or {}) for case in cases)
        sections.append(f"<section><h2>{escape(heading)}</h2>{content or '<p>No query.</p>'}</section>")
    sections.append(f"<footer>{_notes(report)}</footer>")
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _summary(report: Report) -> str:
    parts = [f"{len(report.differences):,} judged queries"]
    parts += [f"{count:,} not in {name}, counted as 0" for name, count in report.num_missing.items() if count]
    return f'<p class="muted">{escape("; ".join(parts))}.</p>'


def _measures(report: Report) -> str:
    if report.comparisons:
        header = ["measure", "run", "baseline", "difference", "wins / losses / ties", "p, t-test", "p, randomization"]
        rows = [
            [
                escape(each.measure),
                f"{each.run:.4f}",
                f"{each.baseline:.4f}",
                _signed(each.difference),
                f"{each.wins} / {each.losses} / {each.ties}",
                _p_value(each.t_test_holm),
                _p_value(each.randomization_holm),
            ]
            for each in report.comparisons
        ]
    else:
        header = ["measure", "value"]
        rows = [[escape(name), f"{value:.4f}"] for name, value in report.system.evaluation.aggregated.items()]
    return _table(header, rows, "measures")


def _charts(report: Report) -> str:
    measure = escape(report.measure)
    if report.baseline:
        counts = [sum(value > TIE for value in report.differences), sum(value < -TIE for value in report.differences)]
        caption = f"Difference in {measure} by query"
        note = (
            f'<span class="gain">{counts[0]} higher</span>, <span class="loss">{counts[1]} lower</span>, '
            f"{len(report.differences) - sum(counts)} equal"
        )
    else:
        caption, note = f"{measure} by query", f"mean {np.mean(report.differences):.4f}"
    keys = ", ".join(
        f'<span class="key {kind}"></span>{escape(name)}'
        for kind, name in zip(("run", "baseline"), report.curves, strict=False)
    )
    figures = [
        _figure(caption, difference_chart(report.differences, caption), note),
        _figure("nDCG by rank depth", depth_chart(report.curves, "nDCG by rank depth"), keys),
    ]
    for histogram in report.histograms:
        figures.append(_histogram(histogram))
    return "".join(figures)


def _histogram(histogram: Histogram) -> str:
    caption = f"Scores of {escape(histogram.name)}"
    note = (
        f'<span class="key filled"></span>{histogram.num_relevant:,} relevant candidates, '
        f'<span class="key outlined"></span>{histogram.num_others:,} others; each group sums to 100%'
    )
    return _figure(caption, histogram_chart(histogram, f"Scores of {histogram.name}"), note)


def _figure(caption: str, chart: str, note: str) -> str:
    return f'<figure><figcaption>{caption}</figcaption>{chart}<p class="muted">{note}</p></figure>'


def _latency(latency: Mapping[str, float]) -> str:
    seconds = np.array(list(latency.values()))
    median, most, nearly_all = np.percentile(seconds, [50, 95, 99])
    header = ["", "mean", "median", "95%", "99%", "slowest"]
    values = [seconds.mean(), median, most, nearly_all, seconds.max()]
    return _table(header, [[f"{len(seconds):,} queries", *(f"{1000 * value:,.1f} ms" for value in values)]], "measures")


def _case(case: QueryCase, report: Report, queries: Mapping[str, str], documents: Mapping[str, str]) -> str:
    value = f"{escape(report.measure)} {case.value:.4f}"
    if case.baseline_value is not None:
        value = f"{escape(report.measure)} {case.baseline_value:.4f} → {case.value:.4f}"
        value += f" ({_signed(case.value - case.baseline_value)})"
    query = queries.get(case.query_id)
    heading = case.query_id if query is None else _shorten(query, MAX_QUERY)
    identifier = "" if query is None else f"{escape(case.query_id)} · "
    place = "neither run" if report.baseline else "no place of the run"
    missing = f"<br>{case.num_missing} relevant in {place}" if case.num_missing else ""
    has_baseline = report.baseline is not None
    rows = "".join(_document(document, has_baseline, documents) for document in case.documents)
    ranks = "before → now" if has_baseline else "rank"
    table = (
        f"<table><thead><tr><th>{ranks}</th><th>judged</th><th>document</th></tr></thead><tbody>{rows}</tbody></table>"
    )
    return (
        f'<article><h3 dir="auto">{escape(heading)}</h3><p class="muted">{identifier}{value}{missing}</p>'
        f"{table if rows else '<p>No documents.</p>'}</article>"
    )


def _document(document: RankedDocument, has_baseline: bool, documents: Mapping[str, str]) -> str:
    rank = ABSENT if document.rank is None else str(document.rank)
    if has_baseline:
        before = ABSENT if document.baseline_rank is None else str(document.baseline_rank)
        rank = f"{before} → {rank}"
    text = documents.get(document.doc_id)
    content = "" if text is None else f'<div dir="auto">{escape(_shorten(text, MAX_TEXT))}</div>'
    judged = ABSENT if document.relevance is None else str(document.relevance)
    kind = ' class="relevant"' if (document.relevance or 0) >= 1 else ""
    return f"<tr{kind}><td>{rank}</td><td>{judged}</td><td>{content}<small>{escape(document.doc_id)}</small></td></tr>"


def _notes(report: Report) -> str:
    notes = [
        "Documents are ranked by falling score and, where scores are equal, by falling identifier, as trec_eval ranks "
        "them. A judged query that a run lacks counts as 0.",
        f"A relevant document is one judged 1 or more; {ABSENT} means not judged, or not in the list.",
    ]
    if report.baseline:
        notes.append(
            "p is the probability of a mean difference at least this large between equal systems, two-sided, by a "
            f"paired t-test and by a randomization test of {NUM_PERMUTATIONS:,} permutations, corrected for the number "
            "of measures (Holm)."
        )
    notes.append(f"Made by llama-bidir {__version__}.")
    return "".join(f'<p class="muted">{escape(note)}</p>' for note in notes)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """Cells are HTML; each carries its column's name, as a phone shows a row as a list."""
    head = "".join(f"<th>{name}</th>" for name in header)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-label="{name}">{cell}</td>' for name, cell in zip(header, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _signed(value: float) -> str:
    text = f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")
    kind = "gain" if value > TIE else "loss" if value < -TIE else ""
    return f'<span class="{kind}">{text}</span>' if kind else "0.0000"


def _p_value(value: float) -> str:
    return f"&lt; {MIN_P}" if value < MIN_P else f"{value:.4f}"


def _shorten(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"

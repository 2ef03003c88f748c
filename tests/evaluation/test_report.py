import random
import re
from html.parser import HTMLParser

import pytest
from helpers import ATTACK, make_systems, write_report

from llama_bidir.evaluation import System, compare, evaluate_queries, make_report, render_report
from llama_bidir.evaluation.report.charts import draw_differences, render_chart
from llama_bidir.evaluation.report.contents import RankedDocument

pytest.importorskip("ir_measures")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")


VOID = {"meta", "br"}


class Page(HTMLParser):
    """Collects tags with their attributes, headings and text; fails if a tag is not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.stack and self.stack[-1] in ("h1", "h2"):
            self.headings.append(data)


def test_the_page_has_its_sections_and_fetches_nothing(tmp_path):
    text = write_report(tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.headings == [
        f"run {ATTACK} against baseline",
        "Measures",
        "Rankings and scores",
        "Latency",
        "Most improved",
        "Most harmed",
    ]
    tags = [tag for tag, _ in page.tags]
    assert tags.count("svg") == 4
    assert tags.count("article") == 20
    assert not {"script", "img", "link", "iframe", "object"} & set(tags)
    attributes = [(name, value or "") for _, attributes in page.tags for name, value in attributes.items()]
    assert not {name for name, _ in attributes if name in ("src", "href") or name.startswith("on")}
    # Within a chart, a marker or a clipping path is named by its identifier.
    identifiers = [value for name, value in attributes if name == "id"]
    assert len(set(identifiers)) == len(identifiers)
    assert {value[1:] for name, value in attributes if name == "xlink:href"} <= set(identifiers)
    assert set(re.findall(r"url\((.*?)\)", text)) <= {f"#{identifier}" for identifier in identifiers}
    assert "@import" not in text
    assert dict(page.tags)["html"] == {"lang": "en"}
    policies = [attributes for _, attributes in page.tags if "http-equiv" in attributes]
    assert policies[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_texts_are_shown_as_they_are(tmp_path):
    text = write_report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img" not in text
    shown = "".join(Page(text).text)
    assert shown.count(ATTACK) >= 10
    assert f"{'x' * 239}…" in shown
    assert "ما هي عاصمة فرنسا؟" in shown


def test_documents_that_moved_by_hand():
    qrels = {"up": {"a": 1, "z": 1}, "down": {"a": 1}, "same": {"a": 1}, "gone": {"a": 1}}
    before = {"up": {"b": 2.0, "a": 1.0}, "down": {"a": 2.0, "b": 1.0}, "same": {"a": 1.0}}
    after = {"up": {"a": 2.0, "b": 1.0}, "down": {"b": 3.0, "c": 2.0, "a": 1.0}, "same": {"a": 1.0}}
    system, baseline = (
        System(name, run, evaluate_queries(qrels, run, ["RR"])) for name, run in (("after", after), ("before", before))
    )
    report = make_report(qrels, system, baseline, compare(system.evaluation, baseline.evaluation))
    assert report.differences == pytest.approx([0.5, 0, 0, 1 / 3 - 1])
    assert report.num_missing == {"after": 1, "before": 1}
    (improved,), (harmed,) = report.cases["Most improved"], report.cases["Most harmed"]
    assert (improved.query_id, improved.value, improved.baseline_value, improved.num_missing) == ("up", 1, 0.5, 1)
    assert improved.documents == [RankedDocument("a", 1, 1, 2), RankedDocument("b", None, 2, 1)]
    assert harmed.documents == [
        RankedDocument("b", None, 1, 2),
        RankedDocument("c", None, 2, None),
        RankedDocument("a", 1, 3, 1),
    ]
    assert report.doc_ids == {"a", "b", "c"}
    histogram = report.histograms[0]
    assert (histogram.num_relevant, histogram.num_others) == (3, 3)
    assert (sum(histogram.relevant), sum(histogram.others)) == (pytest.approx(1), pytest.approx(1))
    assert (histogram.edges[0], histogram.edges[-1]) == (1, 3)
    assert report.curves["after"][0] == (1, 0.5)
    assert [depth for depth, _ in report.curves["after"]] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def test_a_run_alone_shows_its_lowest_queries():
    qrels, system, _ = make_systems()
    report = make_report(qrels, system)
    page = Page(render_report(report))
    assert page.headings[1:] == ["Measures", "Rankings and scores", "Lowest nDCG@10"]
    assert [tag for tag, _ in page.tags].count("svg") == 3
    values = [case.value for case in report.cases["Lowest nDCG@10"]]
    assert values == sorted(system.evaluation.per_query["nDCG@10"].values())[:10]
    shown = "".join(page.text)
    assert all(case.query_id in shown for case in report.cases["Lowest nDCG@10"])


def test_equal_runs_and_single_queries_have_a_page():
    qrels = {"q": {"a": 1}}
    systems = [System(name, {"q": {"a": 1.0}}, evaluate_queries(qrels, {"q": {"a": 1.0}})) for name in ("a", "b")]
    report = make_report(qrels, *systems, compare(systems[0].evaluation, systems[1].evaluation))
    page = Page(render_report(report))
    assert report.cases == {"Most improved": [], "Most harmed": []}
    assert "".join(page.text).count("No query.") == 2
    with pytest.raises(ValueError, match=r"^the run and its baseline must have different names, got 'a' twice$"):
        make_report(qrels, systems[0], systems[0])


def test_charts_take_their_colours_and_fonts_from_the_page():
    chart = render_chart(draw_differences, [0.5, 0.0, -0.25], 'a "label" <b>')
    assert chart.startswith('<svg role="img" aria-label="a &quot;label&quot; &lt;b&gt;"')
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", chart))
    assert colours == {"none", "var(--gain)", "var(--loss)", "var(--muted)", "var(--line)"}
    assert {"1", "3", "queries, by difference"} <= set(Page(chart).text)


def test_bars_by_hand():
    chart = render_chart(draw_differences, [1.0, 1.0, 0.5, 0.0, -1.0], "differences")
    paths = {
        colour: [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]
        for path, colour in re.findall(r'd="([^"]*)"[^>]*var\(--(gain|loss|muted)\)', chart)
    }
    (left, zero), (right, _) = paths["muted"]  # the line at 0
    bar, one = (right - left) / 5, zero - min(y for _, y in paths["gain"])
    corners = {
        colour: [(round((x - left) / bar, 3), round((zero - y) / one, 3) + 0.0) for x, y in paths[colour]]
        for colour in ("gain", "loss")
    }
    assert corners["gain"] == [(0, 0), (0, 1), (2, 1), (2, 0.5), (3, 0.5), (3, 0), (4, 0), (4, 0), (5, 0), (5, 0)]
    assert corners["loss"] == [(0, 0), (0, 0), (2, 0), (2, 0), (3, 0), (3, 0), (4, 0), (4, -1), (5, -1), (5, 0)]


def test_the_same_chart_has_the_same_bytes():
    values = [0.5, 0.25, 0.0]
    assert render_chart(draw_differences, values, "a") == render_chart(draw_differences, values, "a")


def test_a_chart_of_many_queries_stays_small():
    generator = random.Random(0)
    steps = sorted(generator.choices([-0.5, 0.0, 0.1, 0.5], k=10_000), reverse=True)
    assert len(render_chart(draw_differences, steps, "differences")) < 8_000
    slope = sorted((generator.uniform(-1, 1) for _ in range(10_000)), reverse=True)
    assert len(render_chart(draw_differences, slope, "differences")) < 60_000

"""The report in a real browser."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from helpers import write_report
from web_browser import DESKTOP, TEXTS, VIEWS, luminance, needs_browser

CLIPPED = """
[...document.querySelectorAll('svg text')].filter(text => {
  const box = text.getBoundingClientRect(), chart = text.ownerSVGElement.getBoundingClientRect();
  return box.left < chart.left || box.right > chart.right || box.top < chart.top || box.bottom > chart.bottom;
}).map(text => text.textContent)
"""

pytestmark = needs_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report") / "report.html")


@pytest.mark.parametrize(("size", "scheme"), VIEWS)
def test_the_page_is_readable(size, scheme, browser, page):
    browser.open(page.as_uri(), size, scheme)
    assert browser.evaluate("document.documentElement.scrollWidth") <= size[0]
    texts = browser.evaluate(TEXTS)
    assert len(texts) > 60
    for colour, paper, font_size, text in texts:
        light, dark = sorted([luminance(colour), luminance(paper)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, colour, paper)
        assert font_size >= 10, (text, font_size)
    assert browser.evaluate(CLIPPED) == []
    paper = luminance(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert paper > 0.9 if scheme == "light" else paper < 0.02


@pytest.mark.parametrize(("size", "scheme"), VIEWS)
def test_the_charts_are_drawn(size, scheme, browser, page):
    image = pytest.importorskip("PIL.Image")
    browser.open(page.as_uri(), size, scheme)
    pixels = np.asarray(image.open(io.BytesIO(browser.screenshot())).convert("RGB"))
    boxes = browser.evaluate(
        "[...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect()).map("
        "box => [box.left, box.top + scrollY, box.right, box.bottom + scrollY].map(Math.round))"
    )
    assert len(boxes) == 4
    for left, top, right, bottom in boxes:
        assert right - left >= 330
        chart = pixels[top:bottom, left:right]
        assert len(np.unique(chart.reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_charts_have_the_colours_and_the_font_of_the_page(scheme, browser, page):
    browser.open(page.as_uri(), DESKTOP, scheme)
    style = "getComputedStyle(document.querySelector('{}')).{}"
    for kind in ("gain", "loss"):
        bars = browser.evaluate(style.format(f'svg [style*="{kind}"]', "fill"))
        assert bars == browser.evaluate(style.format(f"figure span.{kind}", "color"))
    assert browser.evaluate(style.format("svg text", "fontFamily")) == browser.evaluate(style.format("p", "fontFamily"))


def test_nothing_is_fetched_and_nothing_runs(browser, page):
    browser.open(page.as_uri(), DESKTOP, "light")
    requests = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert requests == [page.as_uri()]
    assert [event for event in browser.events if event["method"] == "Log.entryAdded"] == []
    assert browser.evaluate("document.querySelectorAll('script, img, link, iframe, object, form').length") == 0
    assert browser.evaluate("window.attacked === undefined")


def test_the_page_prints(browser, page):
    browser.open(page.as_uri(), DESKTOP, "dark")
    browser.call(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    result = browser.call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)
    document = base64.b64decode(result["data"])
    assert document.startswith(b"%PDF-")
    assert document.count(b"/Type /Page\n") >= 2

"""The page of the server in a real browser: light and dark, phone and desktop, with the keyboard alone."""

import os
import re
import subprocess
import sys
import time

import pytest
from helpers import make_model, make_tokenizer
from web_browser import TEXTS, VIEWS, luminance, needs_browser

from llama_bidir import CrossEncoder

for module in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(module)
pytestmark = needs_browser


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    tokenizer = make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>")
    CrossEncoder(make_model(rerank_max_length=64), tokenizer).save_pretrained(folder / "tiny")
    command = [sys.executable, "-m", "llama_bidir", "serve", "--model", "tiny", "--port", "0"]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        yield re.fullmatch(r"ready: (.+)\n", process.stdout.readline())[1]
        process.kill()


KEYS = {"Tab": (9, ""), "Enter": (13, "\r")}


def press(browser, key):
    number, text = KEYS[key]
    for kind in ("keyDown", "keyUp"):
        typed = {"text": text} if text and kind == "keyDown" else {}
        browser.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=number, **typed)


def wait_for(browser, expression):
    for _ in range(200):
        if browser.evaluate(expression):
            return
        time.sleep(0.05)
    raise AssertionError(expression)


@pytest.mark.parametrize(("size", "scheme"), VIEWS)
def test_a_person_ranks_passages(size, scheme, browser, address, tmp_path):
    browser.open(address, size, scheme)
    # With the keyboard alone: the question, the passages, the details, the button.
    press(browser, "Tab")
    assert browser.evaluate("document.activeElement.id") == "query"
    for _ in range(3):
        press(browser, "Tab")
    assert browser.evaluate("document.activeElement.id") == "rank"
    press(browser, "Enter")
    wait_for(browser, "document.querySelectorAll('#results li').length === 3")
    scores = browser.evaluate("[...document.querySelectorAll('#results span')].map(each => +each.textContent)")
    assert scores == sorted(scores, reverse=True)
    widths = browser.evaluate("[...document.querySelectorAll('#results b')].map(each => each.offsetWidth)")
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1] > 0
    assert "3 passages in" in browser.evaluate("document.getElementById('state').textContent")
    assert browser.evaluate("document.documentElement.scrollWidth") <= size[0]
    for colour, paper, pixels, text in browser.evaluate(TEXTS):
        assert pixels >= 11, text
        light, dark = sorted((luminance(colour), luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, text
    hosts = {
        event["params"]["request"]["url"].split("/")[2]
        for event in browser.events
        if event.get("method") == "Network.requestWillBeSent" and "//" in event["params"]["request"]["url"]
    }
    assert hosts == {address.split("/")[2]}
    assert not [event for event in browser.events if event.get("method") == "Log.entryAdded"]
    if folder := os.environ.get("LLAMA_BIDIR_SCREENSHOTS"):
        name = f"page-{'phone' if size[0] < 600 else 'desktop'}-{scheme}.png"
        with open(f"{folder}/{name}", "wb") as file:
            file.write(browser.screenshot())


def test_an_error_is_shown(browser, address):
    browser.open(address, *VIEWS[0])
    browser.evaluate("document.getElementById('instruction').value = 'Why?'")
    browser.evaluate("document.getElementById('rank').click() ?? true")
    wait_for(browser, "document.getElementById('state').className === 'bad'")
    assert "has no place in the prompt_template" in browser.evaluate("document.getElementById('state').textContent")
    assert browser.evaluate("document.getElementById('rank').getAttribute('aria-disabled')") == "false"

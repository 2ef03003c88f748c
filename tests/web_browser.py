"""Debian's chromium or chromium-headless-shell, driven over a pipe, and what tests of pages measure in it."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium: apt-get install chromium-headless-shell")
PHONE, DESKTOP = (390, 844), (1280, 900)
VIEWS = [(size, scheme) for size in (PHONE, DESKTOP) for scheme in ("light", "dark")]
# For each text on the page: its colour, the colour behind it, its size on the screen in pixels, and the text.
TEXTS = """
[...document.querySelectorAll('h1, h2, h3, p, td, th, small, figcaption, text, .gain, .loss')]
  .filter(element => element.textContent.trim() && element.getClientRects().length)
  .map(element => {
    const style = getComputedStyle(element), isChart = element.tagName === 'text';
    let behind = element, paper = 'rgba(0, 0, 0, 0)';
    while (behind && paper === 'rgba(0, 0, 0, 0)') {
      paper = getComputedStyle(behind).backgroundColor;
      behind = behind.parentElement;
    }
    const scale = isChart ? element.getScreenCTM().a : 1;
    return [isChart ? style.fill : style.color, paper, scale * parseFloat(style.fontSize), element.textContent];
  })
"""


class Browser:
    """A headless Chromium that speaks its DevTools protocol over file descriptors 3 and 4."""

    def __init__(self, profile: str):
        (child_in, self.write), (self.read, child_out) = os.pipe(), os.pipe()
        child_ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (child_in, child_out)]

        def connect() -> None:
            os.dup2(child_ends[0], 3)
            os.dup2(child_ends[1], 4)

        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]
        self.process = subprocess.Popen(
            [str(BROWSER), *options, "about:blank"], preexec_fn=connect, pass_fds=(3, 4), stderr=subprocess.DEVNULL
        )
        for end in (child_in, child_out, *child_ends):
            os.close(end)
        self.buffer, self.number, self.session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]
            self.events.append(reply)

    def open(self, address: str, size: tuple[int, int], scheme: str) -> None:
        is_phone = size == PHONE
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=is_phone
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=address)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def evaluate(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"]["value"]

    def screenshot(self) -> bytes:
        result = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(result["data"])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.write)
        os.close(self.read)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            received = os.read(self.read, 1 << 20)
            assert received, "the browser exited"
            self.buffer += received
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2."""
    channels = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

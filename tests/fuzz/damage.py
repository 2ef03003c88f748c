"""Strategies for damaged input: bytes that are changed, and values of JSON that are replaced."""

import copy
import gzip
import json
import math
from typing import Any

from hypothesis import strategies as st

BOM = b"\xef\xbb\xbf"
PIECES = [
    b"\x00",
    b"\xff",
    b"\xc3",
    b"\r",
    b"\n",
    b"\t",
    b" ",
    b'"',
    b"\\",
    b",",
    b":",
    b"{",
    b"}",
    b"[",
    b"]",
    b"null",
    b"true",
    b"-1",
    b"1e999",
    b"NaN",
    b"1_0",
    b"- ",
    b"\\ud800",
    "\u00a0".encode(),
    "\u0085".encode(),
    "\u2028".encode(),
    "\u0661".encode(),
    b"\x0b",
    b"\x1c",
    BOM,
    b"[" * 2000,
    b'{"a":' * 2000,
    b"9" * 5000,
]
ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    1000,
    2**31,
    10**30,
    0.5,
    1e-45,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    " ",
    "x",
    "1e-5",
    "\x00",
    "\ud800",
    "é\u2028",
    "x" * 3000,
    "../x",
    [],
    [[]],
    ["x"],
    {},
    {"": None},
    {"x": {"x": 1}},
]

odd_values = st.sampled_from(ODD).map(copy.deepcopy)


@st.composite
def damaged(draw: st.DrawFn, content: bytes, *, most: int = 3) -> bytes:
    """Draws the content after one to `most` changes."""
    for _ in range(draw(st.integers(1, most))):
        content = _damage(draw, content)
    return content


def _damage(draw: st.DrawFn, content: bytes) -> bytes:
    kind = draw(st.sampled_from(["insert", "flip", "delete", "line", "truncate", "crlf", "bom"]))
    if kind == "crlf":
        return content.replace(b"\n", b"\r\n")
    if kind == "bom":
        return BOM + content
    if kind == "line":
        return _damage_lines(draw, content)
    start = draw(st.integers(0, len(content)))
    if kind == "truncate":
        return content[:start]
    if kind == "delete":
        return content[:start] + content[start + draw(st.integers(1, 40)) :]
    if kind == "flip":
        return content[:start] + bytes([draw(st.integers(0, 255))]) + content[start + 1 :]
    return content[:start] + draw(st.sampled_from(PIECES) | st.binary(max_size=6)) + content[start:]


def _damage_lines(draw: st.DrawFn, content: bytes) -> bytes:
    lines = content.split(b"\n")
    first, second = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
    kind = draw(st.sampled_from(["twice", "gone", "swapped", "blank"]))
    if kind == "twice":
        lines.insert(second, lines[first])
    elif kind == "gone":
        del lines[first]
    elif kind == "blank":
        lines.insert(first, b" ")
    else:
        lines[first], lines[second] = lines[second], lines[first]
    return b"\n".join(lines)


@st.composite
def files(draw: st.DrawFn, content: bytes) -> tuple[str, bytes]:
    """Draws the suffix of a name and the bytes of a damaged file, of which some are compressed."""
    content = draw(damaged(content))
    if draw(st.integers(0, 4)):
        return "", content
    packed = gzip.compress(content, mtime=0)
    return ".gz", packed if draw(st.booleans()) else draw(damaged(packed, most=1))


@st.composite
def altered(draw: st.DrawFn, document: Any, *, values: st.SearchStrategy[Any] = odd_values, most: int = 2) -> Any:
    """Draws a document of JSON in which values are replaced, removed, wrapped or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        places = list(_places(document))
        if not places:
            return draw(values)
        container, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "wrap", "add"]))
        if kind == "remove":
            del container[key]
        elif kind == "wrap":
            container[key] = draw(st.sampled_from([[container[key]], {"x": container[key]}, str(container[key])]))
        elif kind == "add" and isinstance(container, list):
            container.insert(key, draw(values))
        elif kind == "add":
            container[draw(st.sampled_from(["x", "", *map(str, container)]))] = draw(values)
        else:
            container[key] = draw(values)
    return document


def _places(document: Any) -> Any:
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(items):
        yield document, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def to_json(document: Any) -> bytes:
    """Returns a document as JSON, which holds lone surrogates and numbers that are not finite as Python writes them."""
    return json.dumps(document).encode()

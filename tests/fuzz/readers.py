"""Readers of rows, collections, qrels and runs: damaged files against slow readers of the same rules."""

import gzip
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from llama_bidir.cli.evaluate import _read_latency
from llama_bidir.data.corpus import read_documents, read_queries, write_corpus, write_queries
from llama_bidir.data.files import read_json, read_json_lines
from llama_bidir.data.trec import read_qrels, read_run, write_qrels, write_run
from tests import helpers

from .damage import BOM, altered, files, to_json
from .target import Target, attempt, check_message, new_folder, workspace
from .texts import any_texts, identifiers

DOCUMENTS = [
    {"_id": "d1", "title": "Bees", "text": "Honey bees navigate by the sun."},
    {"_id": "d2", "title": "", "text": "The hive was white.\u2028New line"},
    {"_id": 3, "text": "naïve café"},
]
QUERIES = [{"_id": "q1", "text": "where do bees find their way?"}, {"_id": "q 2", "text": ""}]
BEIR_QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq 2\td 3\t2\n"
TREC_QRELS = "q1 0 d1 1\nq1\t0\td2 0\n\nq2 0 d\u00e9 2\n"
RUN = "q1 Q0 d1 1 12.5 tag\nq1 Q0 d2 2 -1e-3 tag\nq2\tQ0\td1 1 0 tag\n"
LATENCY = {"q1": 0.25, "q2": 3}
HEADER = ["query-id", "corpus-id", "score"]
INTEGER = re.compile(r"[+-]?[0-9]+")
DECIMAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
# White space that a file may hold inside a line, where the rule is that it belongs to the words beside it.
OTHER_SPACE = re.compile(r"[^\S \t\r\n]")


class BadLineError(Exception):
    """The number of the first line that breaks its rule; None if the whole file does."""

    def __init__(self, line: int | None):
        super().__init__(line)
        self.line = line


class UnclearError(Exception):
    """The documentation does not say what this input means: only an error's form is checked."""


def write_file(name: str, file: tuple[str, bytes]) -> Path:
    suffix, content = file
    path = workspace() / f"{name}{suffix}"
    path.write_bytes(content)
    return path


def lines_of(file: tuple[str, bytes]) -> Iterator[tuple[int, str]]:
    """The numbered lines of a file that are not blank; raises BadLineError where reading must stop."""
    suffix, content = file
    if suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error):
            raise BadLineError(None) from None
    for number, line in enumerate(content.removeprefix(BOM).split(b"\n"), start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise BadLineError(number) from None
        if text.strip(" \t\r"):
            if not text.strip():
                raise UnclearError
            yield number, text.rstrip("\r")


def object_of(text: str, number: int | None) -> dict[str, Any]:
    """The JSON object of a text."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise UnclearError
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise BadLineError(number) from None
    if not isinstance(value, dict):
        raise BadLineError(number)
    return value


def objects_of(file: tuple[str, bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in lines_of(file):
        yield number, object_of(text, number)


def compare(path: Path, read: Any, expect: Any) -> None:
    """Checks that a reader gives what the slow reader gives, or an error with the same file and line."""
    value, error = attempt(read)
    expected, bad = None, None
    try:
        expected = expect()
    except (BadLineError, UnclearError) as wrong:
        bad = wrong
    if error is None:
        assert not isinstance(bad, BadLineError), f"accepted although line {bad.line} breaks the rule: {value!r}"
        # Compared as text, in which NaN equals NaN.
        assert bad is not None or repr(value) == repr(expected)
    elif bad is None:
        raise AssertionError(f"refused although it is right: {error}") from error
    else:
        line = bad.line if isinstance(bad, BadLineError) else None
        check_message(error, path if line is None else f"{path}:{line}:")


def check_json_lines(file: tuple[str, bytes]) -> None:
    """Each line of JSON Lines is one object, under its number."""
    path = write_file("rows.jsonl", file)
    compare(path, lambda: list(read_json_lines(path)), lambda: list(objects_of(file)))


def check_json(file: tuple[str, bytes]) -> None:
    """A JSON file is one object."""

    def expect() -> dict[str, Any]:
        content = gzip_content(file)
        try:
            text = content.removeprefix(BOM).decode()
        except UnicodeDecodeError:
            raise BadLineError(None) from None
        return object_of(text, None)

    path = write_file("data.json", file)
    compare(path, lambda: read_json(path), expect)


def gzip_content(file: tuple[str, bytes]) -> bytes:
    try:
        return gzip.decompress(file[1]) if file[0] == ".gz" else file[1]
    except (EOFError, OSError, zlib.error):
        raise BadLineError(None) from None


def texts_of(file: tuple[str, bytes], *, has_titles: bool) -> list[tuple[str, str]]:
    """The identifiers and texts of documents or queries."""
    found: dict[str, str] = {}
    for number, row in objects_of(file):
        identifier, text, title = row.get("_id"), row.get("text"), row.get("title") if has_titles else None
        is_id = isinstance(identifier, (str, int)) and not isinstance(identifier, bool)
        if isinstance(identifier, str) and identifier != identifier.strip():
            raise UnclearError
        try:
            is_right = is_id and str(identifier) not in found and isinstance(text, str)
            is_right = is_right and (title is None or isinstance(title, str))
            f"{identifier}{text}{title}".encode()
        except ValueError:  # a lone surrogate, or an int of thousands of digits
            is_right = False
        if not is_right:
            raise BadLineError(number)
        found[str(identifier)] = f"{title} {text}" if title else str(text)
    if not found:
        raise BadLineError(1)
    return list(found.items())


def check_documents(file: tuple[str, bytes]) -> None:
    """A corpus gives the identifier and the text, with its title, of each line."""
    path = write_file("corpus.jsonl", file)
    compare(path, lambda: list(read_documents(path)), lambda: texts_of(file, has_titles=True))


def check_queries(file: tuple[str, bytes]) -> None:
    """Queries give the identifier and the text of each line."""
    path = write_file("queries.jsonl", file)
    compare(path, lambda: list(read_queries(path).items()), lambda: texts_of(file, has_titles=False))


def split(text: str) -> list[str]:
    """The columns of a line in TREC's formats, which only spaces and tabs separate."""
    if "\r" in text:
        raise UnclearError
    return re.split(r"[ \t]+", text.strip(" \t"))


def number_of(text: str, line: int) -> int:
    if not INTEGER.fullmatch(text) or len(text) > 4000 or abs(int(text)) >= 2**31:
        raise BadLineError(line)
    return int(text)


def qrels_of(file: tuple[str, bytes]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    is_beir = is_first = False
    for number, text in lines_of(file):
        is_first = not is_first and not found and not is_beir
        if is_first and text.split("\t") == HEADER:
            is_beir = True
            continue
        if is_first and "query" in text.lower():
            raise UnclearError  # a header in other words
        columns = text.split("\t") if is_beir else split(text)
        if any(column != column.strip() for column in columns):
            raise UnclearError
        if len(columns) != (3 if is_beir else 4) or not all(columns):
            raise BadLineError(number)
        relevance = number_of(columns[-1], number)
        if found.setdefault(columns[0], {}).setdefault(columns[-2], relevance) != relevance:
            raise BadLineError(number)
    if not found:
        raise BadLineError(1)
    return found


def check_qrels(file: tuple[str, bytes]) -> None:
    """Qrels give the relevance of each line."""
    path = write_file("qrels.tsv", file)
    compare(path, lambda: read_qrels(path), lambda: qrels_of(file))


def run_of(file: tuple[str, bytes]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for number, text in lines_of(file):
        columns = split(text)
        if len(columns) != 6:
            raise BadLineError(number)
        query_id, _, doc_id, rank, score, _ = columns
        number_of(rank, number)
        if not DECIMAL.fullmatch(score) or not math.isfinite(float(score)) or doc_id in found.get(query_id, ()):
            raise BadLineError(number)
        found.setdefault(query_id, {})[doc_id] = float(score)
    if not found:
        raise BadLineError(1)
    return found


def check_run(file: tuple[str, bytes]) -> None:
    """A run gives the score of each line."""
    path = write_file("run.trec", file)
    compare(path, lambda: read_run(path), lambda: run_of(file))


def check_latency(file: tuple[str, bytes]) -> None:
    """Latencies are an object of finite numbers from 0."""
    path = write_file("latency.json", file)

    def expect() -> dict[str, Any]:
        values = object_of_file(file)
        is_number = (isinstance(value, (int, float)) and not isinstance(value, bool) for value in values.values())
        if not values or not all(is_number) or not all(0 <= value < math.inf for value in values.values()):
            raise BadLineError(None)
        return values

    compare(path, lambda: _read_latency(str(path)), expect)


def object_of_file(file: tuple[str, bytes]) -> dict[str, Any]:
    try:
        return object_of(gzip_content(file).removeprefix(BOM).decode(), None)
    except UnicodeDecodeError:
        raise BadLineError(None) from None


def check_written_run(run: dict[str, dict[str, float]], tag: str) -> None:
    """A written run reads back with the same scores, ranked; one that could not be read back is refused."""
    path = new_folder("written") / "run.trec"
    _, error = attempt(write_run, path, run, tag)
    lines = [(query_id, doc_id, tag) for query_id, documents in run.items() for doc_id in documents]
    columns = {column for line in lines for column in line}
    is_writable = all(re.fullmatch(r"[^ \t\r\n]+", column) for column in columns) and _is_utf8(columns)
    if any(column.startswith("\ufeff") for column in columns):
        return  # a byte order mark, if it is the first of the file
    if error is not None:
        has_empty = not all(run.values())  # a query that gives no line may have any identifier
        assert not is_writable or has_empty, f"refused although it can be written: {error}"
        assert not path.exists() or not path.read_bytes()
        return
    assert is_writable, f"written although it cannot be read back: {path.read_text()!r}"
    if lines:
        read = read_run(path)
        assert read == {query_id: documents for query_id, documents in run.items() if documents}
        for query_id, documents in read.items():
            order = sorted(run[query_id], key=lambda doc_id: -run[query_id][doc_id])
            assert list(documents) == order


def check_written_collection(texts: dict[str, str], qrels: dict[str, dict[str, int]]) -> None:
    """Written documents, queries and qrels read back the same; what could not be read back is refused."""
    folder = new_folder("written")
    texts = {identifier: text for identifier, text in texts.items() if identifier == identifier.strip() != ""}
    for write, name in ((write_corpus, "corpus.jsonl"), (write_queries, "queries.jsonl")):
        _, error = attempt(write, folder / name, texts)
        assert (error is None) == _is_utf8([*texts, *texts.values()])
    if error is None and texts:
        assert dict(read_documents(folder / "corpus.jsonl")) == texts
        assert read_queries(folder / "queries.jsonl") == texts
    _, error = attempt(write_qrels, folder / "qrels.tsv", qrels)
    if any(qrels.values()) and error is None:
        assert read_qrels(folder / "qrels.tsv") == {query_id: docs for query_id, docs in qrels.items() if docs}
    elif any(qrels.values()):
        used = [*qrels, *(doc_id for docs in qrels.values() for doc_id in docs)]
        assert not all(re.fullmatch(r"[^ \t\r\n]+", column) for column in used) or not _is_utf8(used)


def _is_utf8(values: Any) -> bool:
    return attempt("".join(values).encode)[1] is None


rows = {
    "file": files(helpers.lines({"query": "where?", "pos_doc": ["a", "b"]}, {"question": "é", "pos_doc": "x"}).encode())
}
documents = altered(DOCUMENTS, most=1).map(lambda drawn: ("", helpers.lines(*drawn).encode()))
ids = identifiers | any_texts
runs = st.dictionaries(
    ids, st.dictionaries(ids, st.floats(allow_nan=False, allow_infinity=False), max_size=5), max_size=3
)
TARGETS = [
    Target("lines of JSON", check_json_lines, rows),
    Target("JSON", check_json, {"file": files(to_json({"corpus": [{"path": "x"}], "data": [{"a": [1, "é"]}]}))}),
    Target("documents", check_documents, {"file": files(helpers.lines(*DOCUMENTS).encode()) | documents}),
    Target("queries", check_queries, {"file": files(helpers.lines(*QUERIES).encode())}),
    Target("qrels of BEIR", check_qrels, {"file": files(BEIR_QRELS.encode())}),
    Target("qrels of TREC", check_qrels, {"file": files(TREC_QRELS.encode())}),
    Target("runs", check_run, {"file": files(RUN.encode())}, weight=1.5),
    Target("latencies", check_latency, {"file": files(to_json(LATENCY))}, weight=0.5, test_cases=50),
    Target("written runs", check_written_run, {"run": runs, "tag": ids}),
    Target(
        "written collections",
        check_written_collection,
        {
            "texts": st.dictionaries(ids, any_texts, max_size=4),
            "qrels": st.dictionaries(ids, st.dictionaries(ids, st.integers(-1, 3), max_size=4), max_size=3),
        },
    ),
]

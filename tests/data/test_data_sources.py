"""Training rows of JSON Lines files, how they are cached, and how sources are named."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import lines, write

from llama_bidir.data import GroupDataset, Grouping, TrainingRow, arrow, parse_row
from llama_bidir.data.arrow import are_valid, stamp
from llama_bidir.data.corpus import open_corpus
from llama_bidir.data.sources import Source, parse_source, read_rows

pytest.importorskip("datasets")

# The ends of messages.
CONVERT = "; convert the file"
FETCH = "; fetch or write it again"

ROW = {"query": "q", "pos_doc": ["p"], "neg_doc": ["n1", "n2"]}
READABLE = (
    "training rows are read from a .jsonl or .jsonl.gz file (rows inline), a .json or .json.gz file (rows that name "
    "documents of a corpus), hf://org/repo/subset, or a BEIR folder"
)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "ROWS.JSONL"])
def test_rows_are_read_from_json_lines(name, folder, load, capfd):
    scored = {"question": "\u00fc", "pos_doc": "p", "neg_doc": [{"text": "n"}], "pos_score": 2, "neg_score": [0.1]}
    path = write(folder / name, "\ufeff" + json.dumps(ROW) + "\r\n\n" + json.dumps(scored, ensure_ascii=False))
    dataset = load(path)
    assert dataset[:2] == {
        "query": ["q", "\u00fc"],
        "pos_doc": [["p"], ["p"]],
        "neg_doc": [["n1", "n2"], ["n"]],
        "pos_score": [None, [2.0]],
        "neg_score": [None, [0.1]],
    }
    assert parse_row(dataset[1], "here") == TrainingRow("\u00fc", ["p"], ["n"], [2.0], [0.1])
    from_numpy = parse_row(dataset.with_format("numpy")[1], "here")
    assert from_numpy == TrainingRow("\u00fc", ["p"], ["n"], [2.0], [pytest.approx(0.1)])
    assert [Path(file["filename"]).is_file() for file in dataset.cache_files] == [True]
    assert capfd.readouterr().err == ""


TORN = gzip.compress(os.urandom(20000).hex().encode())[:9000]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl:1: the file has no rows; it needs one JSON object per line, with query and pos_doc"),
        (
            "a.jsonl",
            b"\n\n",
            "a.jsonl:1: the file has no rows; it needs one JSON object per line, with query and pos_doc",
        ),
        (
            "a.jsonl",
            lines(ROW, ROW).encode() * 500 + b'{"query": "\xff"}\n',
            "a.jsonl:1001: the file must be UTF-8 text: invalid start byte at byte 12 of the line" + CONVERT,
        ),
        (
            "a.jsonl.gz",
            TORN,
            "a.jsonl.gz:1: the file must be whole gzip data: Compressed file ended before the end-of-stream marker was "
            "reached" + FETCH,
        ),
        ("a.jsonl.gz", b"{}\n", "a.jsonl.gz:1: the file must be whole gzip data: Not a gzipped file (b'{}')" + FETCH),
    ],
)
@pytest.mark.parametrize("skip_bad_rows", [False, True])
def test_faults_of_a_file_are_named(name, content, message, skip_bad_rows, folder, load):
    Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load(name, skip_bad_rows=skip_bad_rows)


def test_bad_rows_raise_or_are_left_out(folder, load, caplog, tmp_path):
    bad = ['{"query": \n', lines([]), lines({"query": "q"}), lines({**ROW, "neg_doc": "\ud800"}), "[" * 100000 + "\n"]
    messages = [
        "rows.jsonl:2: a line must be one JSON object: Expecting value at column 11",
        "rows.jsonl:3: a line must be one JSON object, got list []",
        "rows.jsonl:4: pos_doc is missing; it must be a passage or a list of passages",
        "rows.jsonl:5: neg_doc must be Unicode text without lone surrogates: 'utf-8' codec can't encode character "
        "'\\ud800' in position 0: surrogates not allowed",
        "rows.jsonl:6: a line must be one JSON object: it is nested too deep",
    ]
    write(folder / "rows.jsonl", lines(ROW) + "".join(bad) + lines({**ROW, "query": "last"}))
    with pytest.raises(
        ValueError, match=rf"^{re.escape(messages[0])} \(and 4 more; --skip-bad-rows leaves them out\)$"
    ):
        load("rows.jsonl")
    dataset = load("rows.jsonl", skip_bad_rows=True)
    assert dataset["query"][:] == ["q", "last"]
    assert dataset.column_names == ["query", "pos_doc", "neg_doc", "pos_score", "neg_score"]
    assert [record.message for record in caplog.records] == [
        "rows.jsonl: left out 5 bad rows:" + "".join(f"\n  {message}" for message in messages)
    ]
    assert read_rows("rows.jsonl", cache_dir=tmp_path / "cache")[1] == messages


def test_many_bad_rows_are_counted_and_a_file_of_them_is_refused(folder, load, caplog):
    write(folder / "rows.jsonl", lines(ROW, *[{}] * 12))
    load("rows.jsonl", skip_bad_rows=True)
    listed = caplog.records[0].message.splitlines()
    assert len(listed) == 12
    assert listed[10].startswith("  rows.jsonl:11: query")
    assert listed[11] == "  and 2 more"
    write(folder / "rows.jsonl", lines({}))
    message = "rows.jsonl:1: query (or question) must be a string, got NoneType None"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load("rows.jsonl")
    with pytest.raises(ValueError, match=f"^rows.jsonl: none of the 1 rows can be read; {re.escape(message)}$"):
        load("rows.jsonl", skip_bad_rows=True)


def test_the_cache_follows_the_file(folder, load):
    path = write(folder / "rows.jsonl", lines(ROW))
    (first,) = load(path).cache_files
    written = os.stat(first["filename"]).st_mtime_ns
    (again,) = load(path).cache_files
    assert (again, os.stat(again["filename"]).st_mtime_ns) == (first, written)
    write(path, lines({**ROW, "query": "r"}))  # of the same size
    os.utime(path, ns=(1, 1))
    assert load(path)["query"][:] == ["r"]
    write(path, lines({**ROW, "query": "longer"}))
    os.utime(path, ns=(1, 1))
    assert load(path)["query"][:] == ["longer"]


def rewrite(path, content, *, by_rename):
    """Replaces the content of a file by one of the same size and keeps its times, as `rsync -t` and tar do."""
    status = path.stat()
    assert status.st_size == len(content)
    if by_rename:
        write(path.with_name("new"), content).rename(path)
    else:
        path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns


@pytest.mark.parametrize("by_rename", [False, True])
@pytest.mark.parametrize("limit", [arrow.MOST_HASHED_BYTES, 0])
def test_the_cache_follows_the_content_where_size_and_time_are_equal(by_rename, limit, folder, load, monkeypatch):
    monkeypatch.setattr(arrow, "MOST_HASHED_BYTES", limit)
    path = write(folder / "rows.jsonl", lines({**ROW, "query": "a"}))
    os.utime(path, ns=(1, 1))
    assert load(path)["query"][:] == ["a"]
    rewrite(path, lines({**ROW, "query": "b"}).encode(), by_rename=by_rename)
    assert load(path)["query"][:] == ["b"]
    corpus = write(folder / "corpus.jsonl", lines({"_id": "d", "text": "a"}))
    assert open_corpus(corpus, folder / "cache").texts([0]) == ["a"]
    rewrite(corpus, lines({"_id": "d", "text": "b"}).encode(), by_rename=by_rename)
    assert open_corpus(corpus, folder / "cache").texts([0]) == ["b"]


def test_a_digest_is_kept_only_where_a_later_change_would_show(folder, monkeypatch):
    path = write(folder / "rows.jsonl", "a")
    first = stamp(path)
    path.write_text("b")  # within a tick of the clock of the file system
    os.utime(path, ns=(first.mtime_ns, first.mtime_ns))
    assert stamp(path).content != first.content
    monkeypatch.setattr(arrow, "SETTLED_NS", -1)
    assert stamp(path) == stamp(path)
    assert arrow._digest.cache_info().currsize > 0


def test_the_cache_of_a_folder_of_documents_follows_its_content(folder, load):
    import pyarrow.parquet

    def write_documents(text):
        table = pyarrow.table({"id": ["d1", "d2"], "text": [text, "x"]})
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        pyarrow.parquet.write_table(table, folder / "new", **options)
        return (folder / "new").read_bytes()

    write(folder / "docs" / "merlin_metadata.json", '{"class": "TextQADataset", "corpus_id": "c"}')
    path = write(folder / "docs" / "train.parquet", write_documents("first"))
    os.utime(path, ns=(1, 1))
    row = {"question": "q", "corpus_id": "c", "pos_doc": ["d1"], "neg_doc": ["d2"]}
    rows = write(folder / "rows.json", json.dumps({"corpus": {"path": "docs"}, "data": [row]}))
    assert load(rows)["pos_doc"][:] == [["first"]]
    rewrite(path, write_documents("other"), by_rename=False)
    assert load(rows)["pos_doc"][:] == [["other"]]


READ = """
import resource, sys
from llama_bidir.data import load_rows
load_rows("small.jsonl", cache_dir="cache")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dataset = load_rows("rows.jsonl", cache_dir="cache")
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(growth * 1024, len(dataset), dataset[15999]["query"], dataset.cache_files[0]["filename"])
"""


@pytest.mark.slow
def test_two_processes_read_a_large_new_file_in_little_memory(folder):
    write(folder / "small.jsonl", lines(ROW))
    size = 0
    with (folder / "rows.jsonl").open("w") as file:
        for number in range(16000):
            size += file.write(lines({"query": str(number), "pos_doc": "p" * 1000, "neg_doc": ["n" * 1000] * 7}))
    command = [sys.executable, "-W", "ignore", "-c", READ]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    (growth, *first), (other_growth, *second) = (output.split() for output, _ in results)
    assert first == second
    assert first[:2] == ["16000", "15999"]
    assert max(int(growth), int(other_growth)) < size / 2


@pytest.mark.parametrize(
    ("entry", "source"),
    [
        ("a.jsonl", Source("a.jsonl")),
        (Path("a.jsonl"), Source("a.jsonl")),
        ({"path": "a", "weight": 2, "run": Path("r"), "depth": 5}, Source("a", 2.0, {"run": "r", "depth": 5})),
        ({"path": "a", "qrels": None}, Source("a")),
        (Source("a", 0.5), Source("a", 0.5)),
    ],
)
def test_sources_are_parsed(entry, source):
    assert parse_source(entry) == source


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (5, "e: path must be a path, got int 5"),
        ("", "e: path must be a path, got str ''"),
        ({"weight": 1}, "e: path must be a path, got NoneType None"),
        ({"path": "a", "wieght": 2}, "e: unknown key 'wieght'; the nearest known one is 'weight'"),
        ({"path": "a", "weight": 0}, "e: weight must be a finite number above 0, got int 0"),
        ({"path": "a", "weight": True}, "e: weight must be a finite number above 0, got bool True"),
        ({"path": "a", "weight": "2"}, "e: weight must be a finite number above 0, got str '2'"),
        ({"path": "a", "weight": float("nan")}, "e: weight must be a finite number above 0, got float nan"),
        ({"path": "a", "depth": 0}, "e: depth must be None or an int above 0, got 0"),
        ({"path": "a", "run": 5}, "e: run must be a path, got int 5"),
    ],
)
def test_malformed_sources_are_named(entry, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_source(entry, "e")


def test_sources_of_an_unknown_kind_are_refused(folder, load):
    write(folder / "rows.csv", "q,p\n")
    for name in ("rows.csv", "gone.tsv"):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{READABLE}; got {name!r}')}$"):
            load(name)
    for name in ("gone.jsonl", "gone.json.gz"):
        with pytest.raises(FileNotFoundError, match=f"^there is no file '{name}'$"):
            load(name)
    with pytest.raises(FileNotFoundError, match=rf"^there is no folder 'gone'; {re.escape(READABLE)}$"):
        load("gone")
    write(folder / "rows.jsonl", lines(ROW))
    with pytest.raises(
        ValueError, match=r"^rows.jsonl: run, depth can be given for a BEIR folder only, and this is not one$"
    ):
        load({"path": "rows.jsonl", "run": "r", "depth": 2})


def test_relevance_is_a_column_where_a_row_has_it(folder, load):
    graded = {"query": "r", "pos_doc": ["p", "o"], "neg_doc": ["n"], "pos_relevance": [3, None]}
    write(folder / "rows.jsonl", json.dumps(ROW) + "\n" + json.dumps(graded))
    dataset = load("rows.jsonl")
    assert dataset["pos_relevance"][:] == [None, [3.0, 1.0]]
    assert are_valid(dataset)
    groups = GroupDataset([(dataset, 1.0)], Grouping(group_size=None))
    assert [groups[index]["labels"] for index in range(2)] == [[1.0, 0.0, 0.0], [3.0, 1.0, 0.0]]
    write(folder / "rows.jsonl", json.dumps({**graded, "pos_relevance": [1, -1]}))
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: pos_relevance\[1\] must be a number above 0, got -1"):
        load("rows.jsonl")

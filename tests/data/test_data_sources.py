"""Training rows of JSON Lines files, how they are cached, and how sources are named."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import SHARED, lines, write

from llama_bidir.data import parse_row
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
    assert parse_row(dataset[1], "here") == ("\u00fc", ["p"], ["n"], [2.0], [0.1])
    assert parse_row(dataset.with_format("numpy")[1], "here") == ("\u00fc", ["p"], ["n"], [2.0], [pytest.approx(0.1)])
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


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_real_train_files(load):
    sizes = {"squad": 4857, "nq": 1653, "medquad": 1851, "scifact": 537}
    for name, size in sizes.items():
        path = SHARED / "data" / "train" / f"{name}-train.jsonl.gz"
        dataset = load(path)
        with gzip.open(path, "rt", encoding="utf-8") as file:
            assert [json.loads(line) for line in file] == [
                {name: row[name] for name in ("query", "pos_doc", "neg_doc")} for row in dataset
            ]
        assert len(dataset) == size

"""The verb evaluate."""

import gzip
import json
import stat

import pytest
from helpers import CRANFIELD, lines, write

from llama_bidir.cli import main
from llama_bidir.evaluation import evaluate_run, read_qrels, read_run

pytest.importorskip("ir_measures")

# The ends of some messages.
CORRECT = "; correct or remove the line"
KEEP = "; keep one of the lines"
CONVERT = "; convert the file"
FETCH = "; fetch or write it again"

QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t1\nq1\td2\t0\nq2\td2\t2\nq3\td3\t1\n"
RUN = "q1 Q0 d1 1 9.5 a\nq1 Q0 d2 2 8 a\nq2 Q0 d1 1 3 a\nq2 Q0 d2 2 2 a\nother Q0 gone 1 3 a\n"
BASELINE = "q1 Q0 d2 1 2 b\nq1 Q0 d1 2 1 b\nq2 Q0 d1 1 3 b\nq3 Q0 d3 1 3 b\n"
CORPUS = [{"_id": f"d{number}", "title": "", "text": f"document {number}"} for number in (1, 2, 3)]
QUERIES = [{"_id": f"q{number}", "text": f"query {number}"} for number in (1, 2, 3)]
REPORT = ["--report", "out.html", "--queries", "queries.jsonl", "--corpus", "corpus.jsonl"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, which holds valid files."""
    write(tmp_path / "qrels.tsv", QRELS)
    write(tmp_path / "run.trec", RUN)
    write(tmp_path / "baseline.trec", BASELINE)
    write(tmp_path / "corpus.jsonl", lines(*CORPUS))
    write(tmp_path / "queries.jsonl", lines(*QUERIES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(*options: str) -> int:
    return main(["evaluate", "--qrels", "qrels.tsv", "--run", "run.trec", *options])


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the only line of standard error."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error.removeprefix("llama-bidir: error: ").rstrip("\n")


def test_a_real_run_has_the_figures_of_another_implementation(tmp_path):
    files = ["--qrels", str(CRANFIELD / "qrels.tsv"), "--run", str(CRANFIELD / "run.bm25.trec")]
    expected = {"nDCG@10": 0.4072, "RR@10": 0.5951, "R@10": 0.4136, "R@50": 0.6461, "R@100": 0.7475}
    assert main(["evaluate", *files, "--measures", *expected, "--json", str(tmp_path / "out.json")]) == 0
    aggregated = json.loads((tmp_path / "out.json").read_text())["aggregated"]
    assert {measure: round(value, 4) for measure, value in aggregated.items()} == expected
    qrels, candidates = read_qrels(CRANFIELD / "qrels.tsv"), read_run(CRANFIELD / "run.bm25.trec")
    ideal = {
        query_id: {doc_id: float(qrels[query_id].get(doc_id, 0)) for doc_id in docs}
        for query_id, docs in candidates.items()
    }
    assert round(evaluate_run(qrels, ideal, "nDCG@10")["nDCG@10"], 4) == 0.8315


def test_a_run_is_measured_by_hand(folder, capsys):
    assert evaluate("--measures", "RR@10 P@1", "R@100") == 0
    assert capsys.readouterr().out.splitlines() == [
        "run.trec: 3 judged queries; not in the run (counted as 0): 1; in the run but not judged (ignored): 1",
        "",
        "RR@10               0.5000",
        "P@1                 0.3333",
        "R@100               0.6667",
    ]


def test_the_default_measures(folder, capsys):
    assert evaluate() == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["nDCG@10", "RR@10", "R@100"]


def test_a_baseline_and_the_json(folder, capsys):
    options = ["--baseline", "baseline.trec", "--measures", "RR@10", "--json", "new/out.json", "--report", "out.html"]
    assert evaluate(*options) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[3:5] == [
        "measure     run  baseline  difference  wins/losses/ties  p (t-test)  p (randomization)",
        "RR@10    0.5000    0.5000     +0.0000             2/1/0      1.0000             1.0000",
    ]
    assert printed[-2:] == ["written: new/out.json", "written: out.html"]
    text = (folder / "new" / "out.json").read_text(encoding="utf-8")
    result = json.loads(text)
    assert result["aggregated"] == {"RR@10": 0.5}
    assert result["per_query"] == {"RR@10": {"q1": 1.0, "q2": 0.5, "q3": 0.0}}
    assert result["baseline"]["per_query"] == {"RR@10": {"q1": 0.5, "q2": 0.0, "q3": 1.0}}
    comparison = result["comparison"]["RR@10"]
    assert (comparison["wins"], comparison["losses"], comparison["ties"]) == (2, 1, 0)
    assert (result["run"], result["baseline"]["run"]) == ("run.trec", "baseline.trec")
    # The randomization test has a fixed seed.
    assert evaluate(*options, "--overwrite") == 0
    assert (folder / "new" / "out.json").read_text(encoding="utf-8") == text


def test_values_are_not_rounded(folder):
    write(folder / "run.trec", "q1 Q0 d2 1 3 a\nq1 Q0 d0 2 2 a\nq1 Q0 d1 3 1 a\n")
    assert evaluate("--measures", "RR@10", "--json", "out.json") == 0
    result = json.loads((folder / "out.json").read_text())
    assert (result["per_query"]["RR@10"]["q1"], result["aggregated"]["RR@10"]) == (1 / 3, 1 / 9)


def test_formats_and_the_order_of_lines_do_not_change_the_values(folder, capsys):
    assert evaluate("--json", "tsv.json") == 0
    trec = "".join(f"{q} 0 {d} {s}\n" for q, d, s in map(str.split, QRELS.splitlines()[1:]))
    write(folder / "qrels.txt.gz", trec)
    write(folder / "run.trec.gz", "\ufeff" + RUN.replace("\n", "\r\n"))
    assert main(["evaluate", "--qrels", "qrels.txt.gz", "--run", "run.trec.gz", "--json", "trec.json"]) == 0
    results = [json.loads((folder / name).read_text()) for name in ("tsv.json", "trec.json")]
    assert results[0]["per_query"] == results[1]["per_query"]
    # The order of the lines and the ranks do not matter.
    write(folder / "run.trec", "".join(reversed(RUN.splitlines(keepends=True))).replace(" 1 9.5", " 7 9.5"))
    assert evaluate("--json", "turned.json") == 0
    assert json.loads((folder / "turned.json").read_text())["per_query"] == results[0]["per_query"]


def test_the_report_shows_the_texts_and_the_latency(folder):
    write(folder / "latency.json", json.dumps({"q1": 0.25, "q2": 1}))
    assert evaluate("--baseline", "baseline.trec", *REPORT, "--latency", "latency.json") == 0
    page = (folder / "out.html").read_text(encoding="utf-8")
    for text in ("run.trec against baseline.trec", "query 1", "document 2", "625.0 ms"):
        assert text in page


def test_a_report_shows_the_identifier_of_a_judged_query_without_a_text(folder, caplog):
    write(folder / "qrels.tsv", QRELS + "q9\td1\t2\n")
    assert evaluate(*REPORT) == 0
    assert caplog.messages == ["qrels.tsv: left out 1 judged queries that queries.jsonl lacks: q9"]
    page = (folder / "out.html").read_text(encoding="utf-8")
    assert "query 1" in page
    assert "q9" in page


OWN = "documents that are the query itself, by identifier or text; ignore_identical_ids=False"


def test_documents_with_the_identifier_of_their_query_are_left_out_as_in_beir(folder, caplog):
    write(folder / "qrels.tsv", "query-id\tcorpus-id\tscore\na\tb\t1\nb\tb\t1\nc\td\t1\n")
    write(
        folder / "run.trec",
        "".join(f"{q} Q0 {d} 1 {s} t\n" for q in "abc" for d, s in zip("abcd", "9876", strict=True)),
    )
    assert evaluate("--measures", "RR@10", "--json", "out.json") == 0
    left_out = json.loads((folder / "out.json").read_text())["per_query"]["RR@10"]
    # Without a and c themselves. A judgement says that b is relevant to b.
    assert left_out == {"a": 1.0, "b": 0.5, "c": 1 / 3}
    assert caplog.messages == [f"run.trec: left out 2 {OWN} (--no-ignore-identical-ids) keeps them"]
    caplog.clear()
    assert evaluate("--measures", "RR@10", "--json", "out.json", "--overwrite", "--no-ignore-identical-ids") == 0
    assert json.loads((folder / "out.json").read_text())["per_query"]["RR@10"] == {"a": 0.5, "b": 0.5, "c": 0.25}
    assert caplog.messages == []
    qrels, run = read_qrels("qrels.tsv"), read_run("run.trec")
    assert evaluate_run(qrels, run, "RR@10")["RR@10"] == (1 + 0.5 + 1 / 3) / 3
    assert evaluate_run(qrels, run, "RR@10", ignore_identical_ids=False)["RR@10"] == (0.5 + 0.5 + 0.25) / 3
    assert caplog.messages == [f"the run: left out 2 {OWN} (--no-ignore-identical-ids) keeps them"]


def test_numbers_of_queries_and_documents_that_coincide_by_chance_stay(capsys, caplog):
    """Query 1 of Cranfield is not its document 1; a judgement of such a pair as relevant tells."""
    qrels, run = read_qrels(CRANFIELD / "qrels.tsv"), read_run(CRANFIELD / "run.bm25.trec")
    assert sum(query_id in run[query_id] for query_id in qrels) == 7
    assert evaluate_run(qrels, run) == evaluate_run(qrels, run, ignore_identical_ids=False)
    assert caplog.messages == []


def test_runs_with_the_same_file_name_are_shown_with_their_paths(folder):
    write(folder / "old" / "run.trec", BASELINE)
    assert evaluate("--baseline", "old/run.trec", *REPORT) == 0
    assert "run.trec against old/run.trec" in (folder / "out.html").read_text(encoding="utf-8")


def test_a_run_without_a_judged_document_gets_a_note(folder, capsys):
    write(folder / "run.trec", "q1 Q0 D1 1 9.5 a\n")
    assert evaluate() == 0
    assert "no document of the run is judged: do the identifiers match?" in capsys.readouterr().out


def test_existing_files_are_replaced_only_with_overwrite(folder, capsys):
    for name in ("out.json", "out.html"):
        write(folder / name, "mine")
    assert evaluate("--json", "out.json") == 2
    assert error_of(capsys) == "'out.json' exists: pass overwrite (--overwrite) to replace it, or choose another output"
    # If one of the files exists, the other one is not written either.
    (folder / "out.json").unlink()
    assert evaluate("--json", "out.json", "--report", "out.html") == 2
    assert sorted(path.name for path in folder.glob("out*")) == ["out.html"]
    assert (folder / "out.html").read_text() == "mine"
    assert evaluate("--json", "out.json", "--report", "out.html", "--overwrite") == 0
    assert (folder / "out.html").read_text().startswith("<!DOCTYPE html>")
    assert stat.S_IMODE((folder / "out.html").stat().st_mode) & 0o444


def test_nothing_is_written_when_an_input_is_bad(folder):
    write(folder / "corpus.jsonl", lines(*CORPUS[1:]))
    before = sorted(path.name for path in folder.iterdir())
    assert evaluate("--json", "out.json", *REPORT) == 2
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--measures", "nDCG10"], "unknown measure 'nDCG10'; the nearest is 'nDCG'"),
        (["--json", "run.trec"], "--json and --run must be two files, got 'run.trec' for both"),
        (["--json", "x", "--report", "./x"], "--report and --json must be two files, got './x' for both"),
        (["--baseline", "./run.trec"], "--run and --baseline must be different files, got the same one twice"),
        (["--json", "."], "'.' is a folder: name a file"),
        (["--corpus", "corpus.jsonl"], "--corpus is for the report: add --report OUT.html, or leave it out"),
        (["--baseline", "gone.trec"], "there is no file 'gone.trec'"),
    ],
)
def test_bad_arguments(options, message, folder, capsys):
    assert evaluate(*options, "--overwrite") == 2
    assert error_of(capsys) == message
    assert (folder / "run.trec").read_text() == RUN


COLUMNS = "a line of a run must have 6 columns (query-id, Q0, doc-id, rank, score, tag), got str "
QRELS_COLUMNS = "a line of qrels must have 3 columns separated by tabs (query-id, corpus-id, score), got str "
MALFORMED = [
    # runs
    ("run.trec", RUN + "q1 Q0 d3 3 7\n", f":6: {COLUMNS}'q1 Q0 d3 3 7'"),
    ("run.trec", RUN + "q1 Q0 d3 3 7 a b\n", f":6: {COLUMNS}'q1 Q0 d3 3 7 a b'"),
    ("run.trec", RUN + "q1 Q0 d3 3 nan a\n", ":6: score must be a finite number, got 'nan'" + CORRECT),
    ("run.trec", RUN + "q1 Q0 d3 x 7 a\n", ":6: rank must be a whole number, got 'x'" + CORRECT),
    (
        "run.trec",
        RUN + "q1 Q0 d1 3 7 a\n",
        ":6: doc-id: the query 'q1' has the document 'd1' already, in line 1" + KEEP,
    ),
    (
        "run.trec",
        RUN + "q1 Q0 d9 3 7 a\n",
        ":6: doc-id: there is no document 'd9' in corpus.jsonl; both files must be of the same dataset",
    ),
    (
        "run.trec",
        RUN.encode() + b"q1 Q0 d\xff",
        ":6: the file must be UTF-8 text: invalid start byte at byte 8 of the line" + CONVERT,
    ),
    ("run.trec", "", ":1: the run has no entries; it needs one per line"),
    (
        "run.trec",
        "other Q0 d1 1 1 t\n",
        ": the run has no entry for any query of qrels.tsv; both must be about the same queries",
    ),
    # qrels
    ("qrels.tsv", QRELS + "q1\td1\n", f":6: {QRELS_COLUMNS}'q1\\td1'"),
    ("qrels.tsv", QRELS + "q1\t\t1\n", f":6: {QRELS_COLUMNS}'q1\\t\\t1'"),
    ("qrels.tsv", QRELS + "q1 d1 1\n", f":6: {QRELS_COLUMNS}'q1 d1 1'"),
    ("qrels.tsv", QRELS + "q1\td3\tNaN\n", ":6: score must be a whole number, got 'NaN'" + CORRECT),
    (
        "qrels.tsv",
        QRELS + "q1\td1\t2\n",
        ":6: score: the document 'd1' of query 'q1' is judged 2 here and 1 in line 2" + KEEP,
    ),
    (
        "qrels.tsv",
        QRELS.replace("q", "p").replace("puery", "query") + "other\td1\t2\n",
        ":2: query-id: there is no query 'p1' in queries.jsonl; both files must be of the same dataset",
    ),
    (
        "qrels.tsv",
        b"q1\t\xe9",
        ":1: the file must be UTF-8 text: unexpected end of data at byte 4 of the line" + CONVERT,
    ),
    ("qrels.tsv", "", ":1: the file has no judgements; it needs one per line"),
    # corpus
    ("corpus.jsonl", lines(*CORPUS, {"_id": "d4"}), ":4: text must be a string, got NoneType None" + CORRECT),
    ("corpus.jsonl", lines({"text": "t"}), ":1: _id must be a string or an int, got NoneType None"),
    ("corpus.jsonl", lines(*CORPUS, CORPUS[0]), ":4: _id: the document 'd1' is there already, in line 1" + KEEP),
    ("corpus.jsonl", lines(*CORPUS) + "{", ":4: a line must be one JSON object: Expecting property name enclosed in "),
    (
        "corpus.jsonl",
        b"\xff\xfe",
        ":1: the file must be UTF-8 text: invalid start byte at byte 1 of the line" + CONVERT,
    ),
    ("corpus.jsonl", "", ":1: the file has no lines; it needs one JSON object per line, one for each document"),
    # queries
    ("queries.jsonl", lines(*QUERIES, {"_id": "q4"}), ":4: text must be a string, got NoneType None" + CORRECT),
    ("queries.jsonl", lines(*QUERIES, QUERIES[0]), ":4: _id: the query 'q1' is there already, in line 1" + KEEP),
    ("queries.jsonl", lines(*QUERIES) + "[]", ":4: a line must be one JSON object, got list []"),
    (
        "queries.jsonl",
        b'{"_id": "\xff"}',
        ":1: the file must be UTF-8 text: invalid start byte at byte 10 of the line" + CONVERT,
    ),
    ("queries.jsonl", "", ":1: the file has no lines; it needs one JSON object per line, one for each query"),
    # latency
    ("latency.json", '{"q1": "fast"}', ": the seconds of 'q1' must be a number from 0, got str 'fast'"),
    ("latency.json", '{"q1": NaN}', ": the seconds of 'q1' must be a number from 0, got float nan"),
    ("latency.json", "{}", ': the file has no queries; it must map each query to seconds, as in {"q1": 0.25}'),
]


@pytest.mark.parametrize(("name", "content", "message"), MALFORMED)
def test_malformed_lines_are_named(name, content, message, folder, capsys):
    write(folder / "latency.json", '{"q1": 1}')
    write(folder / name, content)
    assert evaluate(*REPORT, "--latency", "latency.json") == 2
    assert error_of(capsys).startswith(name + message)
    assert not (folder / "out.html").exists()


@pytest.mark.parametrize("name", ["run.trec", "qrels.tsv", "corpus.jsonl", "queries.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "plain", "empty"])
def test_damaged_gzip_files_are_named(name, damage, folder, capsys):
    content = (folder / name).read_bytes()
    damaged = {"cut": gzip.compress(content)[:-8], "plain": b"plain text\n", "empty": b""}[damage]
    (folder / f"{name}.gz").write_bytes(damaged)
    (folder / name).unlink()
    names = [path.name for path in folder.iterdir()]
    options = [f"--{path.split('.')[0]}={path}" for path in names if not path.startswith("baseline")]
    assert main(["evaluate", *options, "--report", "out.html"]) == 2
    rule = {
        "cut": f":{content.count(bytes([10])) + 1}: the file must be whole gzip data: Compressed file ended before ",
        "plain": ":1: the file must be whole gzip data: Not a gzipped file (b'pl')" + FETCH,
        "empty": ":1: the ",
    }[damage]
    assert error_of(capsys).startswith(f"{name}.gz{rule}")
    assert not (folder / "out.html").exists()

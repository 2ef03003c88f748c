import json
import re
from pathlib import Path

import pytest
import yaml
from helpers import lines, make_model, make_tokenizer, write

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from llama_bidir.cli import main
from llama_bidir.data import load_rows
from llama_bidir.training import read_history

WORDS = ["bees", "hive", "clover", "sun", "Paris", "France", "Seine", "garden", "flowers", "white"]
ROWS = [
    {
        "question_id": number,
        "query": f"where is the {word}?",
        "pos_doc": [f"The {word} is here."],
        "neg_doc": [f"The {other} is not {word}." for other in WORDS if other != word],
    }
    for number, word in enumerate(WORDS)
]
CORPUS = [{"_id": f"d{number}", "title": "", "text": f"A {word} is everywhere."} for number, word in enumerate(WORDS)]
PAGE = (Path(__file__).parents[2] / "docs" / "mining.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher")
    make_model(seed=5, rerank_max_length=48).save_pretrained(path)
    make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>").save_pretrained(path)
    return path


@pytest.fixture
def command(tmp_path, teacher):
    """A command line that mines from the rows' own candidates."""
    write(tmp_path / "rows.jsonl", lines(*ROWS))
    write(tmp_path / "corpus.jsonl", lines(*CORPUS))

    def make(*options, **values):
        values = {"model": teacher, "source": tmp_path / "rows.jsonl", "output": tmp_path / "mined.jsonl", **values}
        return ["mine", *(f"--{name.replace('_', '-')}={value}" for name, value in values.items()), *options]

    return make


def test_mines_and_says_what_became_of_the_rows(command, tmp_path, capsys):
    assert main(command("--num-negatives=2", "--relative-margin=1")) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    num_negatives = sum(len(row["neg_doc"]) for row in rows)
    assert printed[0] == f"10 rows, {len(rows)} written; 90 candidates, {num_negatives} negatives"
    assert re.fullmatch(r"not taken: (\d+) not below the margin, (\d+) more than needed", printed[1])
    assert sum(map(int, re.findall(r"\d+", printed[1]))) == 90 - num_negatives
    assert printed[-1] == f"rows: {tmp_path / 'mined.jsonl'}"
    left_out = [number for number in range(10) if number not in {row["question_id"] for row in rows}]
    assert 0 < len(left_out) < 10
    named = ", ".join(f"{tmp_path / 'rows.jsonl'}:{number + 1}" for number in left_out)
    assert printed[2] == f"{len(left_out)} rows without a negative, left out (--keep-empty writes them): {named}"
    assert main(command("--num-negatives=2")) == 2
    assert capsys.readouterr().err == (
        f"llama-bidir: error: '{tmp_path / 'mined.jsonl'}' exists: pass overwrite (--overwrite) to replace it, or "
        "choose another output\n"
    )


@pytest.mark.parametrize("loss", ["margin_mse", "kl_div"])
def test_the_recipe_of_the_page_distils_what_is_mined(loss, command, base_checkpoint, tmp_path, capsys):
    mined = tmp_path / "distil.jsonl.gz"
    assert main(command("--relative-margin=1", output=mined)) == 0
    assert all(len(row["neg_score"]) == len(row["neg_doc"]) > 0 for row in load_rows(mined))
    [text] = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)
    assert yaml.safe_load(text)["training"]["loss"] == "margin_mse"
    recipe = write(tmp_path / "distil.yaml", text)
    values = {
        "model.model_name_or_path": base_checkpoint,
        "data.train": mined,
        "data.rerank_max_length": 48,
        "training.output_dir": tmp_path / "student",
        "training.loss": loss,
        "training.max_steps": 12,
        "training.learning_rate": "1e-2",
        "training.warmup_steps": 0,
        "training.logging_steps": 1,
        "training.save_strategy": "no",
    }
    assert main(["train", str(recipe), *(f"--{key}={value}" for key, value in values.items())]) == 0
    losses = [entry["loss"] for entry in read_history(tmp_path / "student" / "history.jsonl") if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4]) / 2, losses


@pytest.mark.parametrize("options", [{"candidates": "bm25"}, {"run": "run.trec"}])
def test_bm25_and_runs(options, command, tmp_path, capsys):
    pytest.importorskip("bm25s")
    write(tmp_path / "run.trec", "".join(f"{q} Q0 d{(q + k) % 10} {k} 0 x\n" for q in range(10) for k in range(3)))
    options = {name: tmp_path / value if name == "run" else value for name, value in options.items()}
    assert main(command("--keep-empty", corpus=tmp_path / "corpus.jsonl", **options)) == 0
    rows = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == list(range(10))
    for number, row in enumerate(rows):
        reach = range(1) if "candidates" in options else range(3)
        assert {*row["neg_doc"]} <= {f"A {WORDS[(number + k) % 10]} is everywhere." for k in reach}
    assert capsys.readouterr().out.startswith(
        f"10 rows, 10 written; {10 if 'candidates' in options else 30} candidates"
    )


def test_a_corpus_that_is_not_searched_is_said(command, tmp_path, caplog):
    assert main(command("--keep-empty", corpus=tmp_path / "corpus.jsonl")) == 0
    assert "rows.jsonl: all rows have candidates in neg_doc, so the corpus is not searched; --candidates" in caplog.text


def test_cut_pairs_are_said_once(command, monkeypatch, caplog):
    from llama_bidir.jobs.mining import job

    monkeypatch.setattr(job.mine_file, "__kwdefaults__", {**job.mine_file.__kwdefaults__, "window_pairs": 16})
    assert main(command("--keep-empty", "--max-length=16")) == 0
    assert sum("were cut to fit" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.jsonl",
            '{"_id": 1, "query": "q", "pos_doc": "a", "neg_doc": "b"}\n{"query": "q"}\n',
            ":2: pos_doc is missing; it m",
        ),
        ("rows.jsonl", '{"query": "q"\n', ":1: a line must be one JSON object: Expecting ',' delimiter at column 14"),
        ("rows.jsonl", b'{"query": "\xff"}\n', ":1: the file must be UTF-8 text: invalid start byte at byte 12 of the"),
        ("rows.jsonl", "", ":1: the file has no rows; it needs one JSON object per line, with query and pos_doc"),
        (
            "rows.jsonl",
            '{"query": "q", "pos_doc": "a"}\n',
            ":1: a row must have query_id, question_id or _id to be fou",
        ),
        ("corpus.jsonl", '{"_id": "d1"}\n', ":1: text must be a string, got NoneType None"),
        ("corpus.jsonl", lines(CORPUS[0], CORPUS[0]), ":2: _id: the document 'd0' is there already, in line 1"),
        ("run.trec", "0 Q0 d0 1 nan x\n", ":1: score must be a finite number, got 'nan'"),
        ("run.trec", "0 Q0 d0 1 0.5\n", ":1: a line of a run must have 6 columns (query-id, Q0, doc-id, rank, score, "),
        ("run.trec", "5 Q0 d0 1 0 x\n0 Q0 d99 1 0 x\n", ":2: doc-id: there is no document 'd99' in "),
        (
            "run.trec",
            "0 Q0 d0 1 0 x\n0 Q0 d0 2 0 x\n",
            ":2: doc-id: the query '0' has the document 'd0' already, in line 1",
        ),
        ("run.trec", "q99 Q0 d0 1 0 x\n", ": the run has no entry for any query of the rows; both must be about the "),
    ],
)
def test_input_errors_name_file_and_line(name, content, message, command, tmp_path, capsys):
    arguments = command(corpus=tmp_path / "corpus.jsonl", run=tmp_path / "run.trec")
    write(tmp_path / "run.trec", "0 Q0 d0 1 0 x\n")
    write(tmp_path / name, content)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"llama-bidir: error: {tmp_path / name}{message}")
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("mined*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--relative-margin=1.5",
            "relative_margin must be above 0 and at most 1, such as 0.95 for 95% of the positive",
        ),
        ("--depth=0", "depth must be an int above 0, got 0"),
        ("--candidates=bm25", "candidates of bm25 are documents of a corpus: name it with corpus (--corpus)"),
        ("--run=rows.jsonl", "candidates of run are documents of a corpus: name it with corpus (--corpus)"),
        ("--candidates=run", "candidates of a run need the run: name it with run (--run)"),
        ("--candidates=bm25 --run=x", "a run is given, so candidates must be 'run' (or 'auto'), got 'bm25'"),
        ("--qrels=x", "rows.jsonl: qrels can be given for a BEIR folder only, and this is not one"),
        (
            "--output=mined.json",
            "output must end in .jsonl or .jsonl.gz, by which train knows its kind, got 'mined.json'",
        ),
        ("--source=gone.jsonl", "there is no file 'gone.jsonl'"),
        ("--corpus=gone.jsonl", "there is no file 'gone.jsonl'"),
        ("--model=./gone", "'./gone' is no checkpoint: there is no such folder"),
        (
            "--max-length=4",
            "rerank_max_length counts the tokens of a rendered pair and must be an int from 8",
        ),
    ],
)
def test_argument_errors_are_one_line(options, message, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command(source="rows.jsonl", output="mined.jsonl"), *options.split()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"llama-bidir: error: {message}")
    assert not list(tmp_path.glob("mined*"))


def test_rows_without_candidates_need_a_corpus(command, tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", lines({"query": "q", "pos_doc": "a"}))
    assert main(command()) == 2
    assert capsys.readouterr().err.startswith(
        f"llama-bidir: error: {tmp_path / 'rows.jsonl'}: no row has candidates in neg_doc: name a corpus (--corpus)"
    )
    write(source, lines({"query": "q", "pos_doc": "a"}))
    assert main(command(candidates="neg_doc", corpus=tmp_path / "corpus.jsonl")) == 2
    assert "so that no corpus is searched: leave corpus out" in capsys.readouterr().err

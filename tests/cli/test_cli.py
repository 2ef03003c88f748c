import argparse
import json

import pytest

from llama_bidir import __version__
from llama_bidir.cli import VERBS, main, recipes
from llama_bidir.cli.options import check_job_options
from llama_bidir.utils.errors import InputTypeError, ScoreError


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.strip() == f"llama-bidir {__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "fly",
        "quickstart --wings 2",
        "quickstart --max-steps x",
        "quickstart --max-steps 0",
        "quickstart --max-step 3",
        "quickstart --learning-rate nan",
        "quickstart --batch-size -1",
        "recipes --all",
        "train",
        "merge --adapter a",
    ],
)
def test_bad_arguments_exit_with_2(arguments):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments.split())
    assert exit_info.value.code == 2


def test_a_typo_is_answered_with_the_nearest_option(capsys):
    with pytest.raises(SystemExit):
        main(["quickstart", "--lerning-rate", "1"])
    error = capsys.readouterr().err
    assert "--learning-rate LR" in error
    assert "unknown option '--lerning-rate'; the nearest is '--learning-rate'" in error


def test_recipes_are_listed_with_what_they_do(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["llama3_1_8b", "llama3_2_1b", "llama3_2_1b_lora", "quickstart"]
    name, _, summary = lines[1].partition("  ")
    assert (name, summary.strip()) == (
        "llama3_2_1b",
        "Fine-tunes Llama 3.2 1B with the data and the values of NeMo AutoModel's cross-encoder recipe.",
    )


def test_other_processes_name_themselves_in_errors(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert main(["quickstart", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("llama-bidir: error (process 3): ")


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys):
    output = tmp_path / "out"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "q"}) + "\n")
    assert main(["quickstart", "--output", str(output), "--train", str(tmp_path / "rows.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "rows.jsonl:1: pos_doc is missing" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    assert main(["quickstart", "--output", str(output), "--model", str(tmp_path / "gone")]) == 2
    assert "not a checkpoint: there is no such folder" in capsys.readouterr().err
    assert not output.exists()


def test_existing_output_is_kept_without_overwrite(tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    assert main(["quickstart", "--output", str(tmp_path)]) == 2
    assert "exists: pass overwrite (--overwrite) to replace it" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "x"


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileExistsError):
        main(["quickstart", "--output", str(tmp_path), "--debug"])


@pytest.mark.parametrize(
    ("values", "device"),
    [
        (None, None),
        (["cpu"], "cpu"),
        (["cuda:0", "cuda:1"], ["cuda:0", "cuda:1"]),
        (["cuda:0,cuda:1"], ["cuda:0", "cuda:1"]),
        (["cpu,cuda", "cuda:1"], ["cpu", "cuda", "cuda:1"]),
    ],
)
@pytest.mark.parametrize("verb", ["rerank", "mine"])
def test_devices_are_named_in_either_form(verb, values, device):
    parser = argparse.ArgumentParser()
    VERBS[verb].add_arguments(parser)
    files = ["--corpus=c", "--queries=q"] if verb == "rerank" else ["--source=s"]
    options = [] if values is None else ["--device", *values]
    arguments = parser.parse_args(["--model=m", "--output=o", *files, *options])
    assert check_job_options(arguments)["device"] == device


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("x"), 2),
        (InputTypeError("x"), 2),
        (TypeError("'NoneType' object is not callable"), 1),
        (ScoreError("x"), 1),
        (RuntimeError("x"), 1),
        (OSError("no such checkpoint"), 2),
        (OSError(28, "No space left on device"), 1),
    ],
)
def test_only_bad_input_exits_with_2(error, status, monkeypatch, capsys):
    def run(arguments):
        raise error

    monkeypatch.setattr(recipes, "run", run)
    assert main(["recipes"]) == status
    assert capsys.readouterr().err == f"llama-bidir: error: {error}\n"

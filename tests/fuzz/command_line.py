"""Command lines of every verb, in this process: mutated arguments and mutated files."""

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from hypothesis import strategies as st

from llama_bidir.cli import main
from llama_bidir.data.trec import write_qrels
from tests.helpers import ROWS, lines, make_model, make_tokenizer, write, write_collection

from .damage import damaged
from .target import Target, new_folder, workspace
from .texts import any_texts

# Arguments that work, but for the quickstart, which takes long.
VERBS = {
    "evaluate": "evaluate --qrels qrels.tsv --run run.trec --baseline other.trec --measures nDCG@10 --json out.json",
    "report": "evaluate --qrels qrels.tsv --run run.trec --report out.html --queries queries.jsonl "
    "--corpus corpus.jsonl",
    "rerank": "rerank --model model --corpus corpus.jsonl --queries queries.jsonl --run run.trec --output out.trec "
    "--depth 2",
    "mine": "mine --model model --source rows.jsonl --output out.jsonl --num-negatives 1 --max-length 16",
    "train": "train recipe.yaml --dry-run --training.max_steps 2 --data.group_size 2",
    "export": "export --model model --format vllm --output out",
    "merge": "merge --adapter model --output out --dtype float32",
    "recipes": "recipes",
    "quickstart": "quickstart --output out --max-steps 1 --batch-size 2",
}
SLOW = ("rerank", "mine", "train", "export")
OPTIONS = [
    "--model",
    "--output",
    "--overwrite",
    "--qrels",
    "--run",
    "--depth",
    "--measures",
    "--json",
    "--tag",
    "--dtype",
]
OPTIONS += [
    "--debugg",
    "--lora.r",
    "--training.seed",
    "--data.train",
    "--skip-bad-rows",
    "--",
    "-x",
    "--seed",
    "--margin",
]
OPTIONS += ["--batch-size", "--max-length", "--candidates", "--keep-empty", "--write-run", "--baseline", "--revision"]
VALUES = [
    "",
    "0",
    "-1",
    "1e9",
    "nan",
    "x",
    "model",
    "out",
    "rows.jsonl",
    "run.trec",
    "corpus.jsonl",
    "missing",
    "folder",
]
VALUES += [
    "float16",
    "random",
    "neg_doc",
    "bm25",
    "é",
    "a b",
    "=",
    "org/repo",
    "hf://org/repo",
    "[",
    "{",
    "hub",
    "cuda:99",
]
FILES = ["qrels.tsv", "run.trec", "other.trec", "queries.jsonl", "corpus.jsonl", "rows.jsonl", "recipe.yaml"]
RECIPE = """\
model: {model_name_or_path: model}
data: {train: [rows.jsonl], group_size: 2, rerank_max_length: 32}
training: {output_dir: out, max_steps: 2, report_to: none}
"""


@cache
def files() -> Path:
    """A folder with what the verbs read."""
    folder = new_folder("command line files")
    make_model().save_pretrained(folder / "model")
    make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>").save_pretrained(folder / "model")
    write_collection(folder, num_queries=3, num_documents=8, depth=4)
    run = (folder / "run.trec").read_text()
    write(folder / "other.trec", run.replace(" 49 ", " 3 "))
    write_qrels(folder / "qrels.tsv", {"q0": {"d1": 1, "d2": 0}, "q1": {"d3": 2}})
    write(folder / "rows.jsonl", lines(*ROWS[:3]))
    write(folder / "recipe.yaml", RECIPE)
    write(folder / "folder" / "file.txt", "x")
    return folder


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """A copy of the files as the working folder."""
    former, folder = Path.cwd(), workspace() / "command line"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(files(), folder)
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(former)


def call(arguments: list[str]) -> tuple[int, str, str]:
    """Returns the exit status, the output and what stands on standard error."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            status = main(arguments)
        except SystemExit as exit_:  # of argparse
            status = {0: 0, 2: 2}.get(exit_.code, -1)
    return status, output.getvalue(), errors.getvalue()


def check_call(arguments: list[str], *, changed: str | None = None, content: bytes = b"") -> None:
    """
    The exit status is 0, 1 or 2, an error is one line on standard error and no traceback, and the input is as before.
    """
    with working_folder() as folder:
        if changed is not None:
            (folder / changed).write_bytes(content)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        status, output, errors = call(arguments)
        assert status in (0, 1, 2)
        assert "Traceback" not in errors + output
        if status == 0:
            assert "error:" not in errors
        else:
            (message,) = (line for line in errors.splitlines() if "error: " in line)
            assert message.startswith("llama-bidir")
            assert errors.endswith(message + "\n")
        if "--overwrite" not in arguments and "--write-run" not in arguments:
            for path, former in before.items():
                assert path.read_bytes() == former, f"{path} has changed"
        left = [path.name for path in folder.iterdir() if path.name.startswith(".") or path.name.endswith(".tmp")]
        assert not left, f"left behind: {left}"


def check_arguments(verb: str, changes: list[tuple[str, int, str]]) -> None:
    """A verb with mutated arguments."""
    words = VERBS[verb].split()
    for kind, place, value in changes:
        at = place % (len(words) + 1)
        if kind == "insert":
            words.insert(at, value)
        elif kind == "remove":
            del words[at : at + 1]
        elif kind == "replace":
            words[at : at + 1] = [value]
        elif kind == "join":
            words[at : at + 2] = ["=".join(words[at : at + 2])]
        else:
            words[at:at] = words[max(0, at - 2) : at]
    if "quickstart" in words:
        words.append("--train=missing.jsonl")  # never trains
    if "train" in words and "--dry-run" not in words:
        words.append("--dry-run")
    check_call(words)


def check_files(verb: str, name: str, data: st.DataObject) -> None:
    """A verb with a damaged file."""
    content = data.draw(damaged((files() / name).read_bytes(), most=2))
    check_call(VERBS[verb].split(), changed=name, content=content)


changes = st.tuples(
    st.sampled_from(["insert", "remove", "replace", "join", "twice"]),
    st.integers(0, 20),
    st.sampled_from(OPTIONS) | st.sampled_from(VALUES) | any_texts.filter(lambda text: not set("/.~") & set(text)),
)
quick = st.sampled_from([name for name in VERBS if name not in SLOW])
TARGETS = [
    Target(
        "command lines",
        check_arguments,
        {"verb": quick, "changes": st.lists(changes, min_size=1, max_size=4)},
        weight=0.5,
        test_cases=40,
    ),
    Target(
        "command lines with a model",
        check_arguments,
        {"verb": st.sampled_from(SLOW), "changes": st.lists(changes, min_size=1, max_size=4)},
        weight=0.15,
        test_cases=20,
    ),
    Target(
        "evaluation of damaged files",
        check_files,
        {"verb": st.sampled_from(["evaluate", "report"]), "name": st.sampled_from(FILES[:5]), "data": st.data()},
        weight=0.1,
        test_cases=10,
    ),
    Target(
        "jobs on damaged files",
        check_files,
        {"verb": st.sampled_from(["rerank", "mine", "train"]), "name": st.sampled_from(FILES), "data": st.data()},
        weight=0.05,
        test_cases=10,
    ),
]

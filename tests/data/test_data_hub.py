"""Training rows of datasets, which the real clients read from a local Hub."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Handler, run_hub

from llama_bidir.data.hub import load_hub, parse_hub_source

pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

OFFLINE = (
    "OSError: hf://tester/rows: cannot be read from the Hub: Cannot reach .*: offline mode is enabled. .*Check the "
    "name, the network and, for a private dataset, HF_TOKEN"
)


class DatasetHandler(Handler):
    """Serves datasets as the Hub of the other tests serves models, and lists folders."""

    def do_GET(self) -> None:  # noqa: N802
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/?]+/?([^?]*)\??(.*)", self.path):
            return self.list_folder(match[1], match[2], is_recursive="recursive=true" in match[3].lower())
        self.path = self.path.replace("/api/datasets/", "/api/models/").removeprefix("/datasets")
        return super().do_GET()

    do_HEAD = do_GET  # noqa: N815

    def list_folder(self, repo: str, folder: str, *, is_recursive: bool) -> None:
        if repo not in self.server.repos:
            return self.reply({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
        files = {Path(name): body for name, body in self.server.repos[repo].items()}
        entries = [
            {"type": "file", "path": str(file), "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
            for file, body in files.items()
            if file.parent == Path(folder) or (is_recursive and Path(folder) in file.parents)
        ]
        folders = {file.parent for file in files if file.parent.parent == Path(folder) != file.parent}
        entries += [{"type": "directory", "path": str(path), "size": 0, "oid": "0" * 40} for path in sorted(folders)]
        return self.reply(entries)


def parquet(rows: list[dict[str, object]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def make_repository(subsets: dict[str, tuple[dict, list, list]]) -> dict[str, bytes]:
    """The files of a dataset whose subsets are metadata, documents and rows."""
    files, configs = {}, ""
    for name, (metadata, documents, rows) in subsets.items():
        files[f"{name}/dataset_metadata.json"] = json.dumps(metadata).encode()
        for config, file, table in ((f"{name}_corpus", "corpus", documents), (name, "queries", rows)):
            files[f"{name}/{file}.parquet"] = parquet(table)
            configs += f"- config_name: {config}\n  data_files:\n  - split: train\n    path: {name}/{file}.parquet\n"
    return {"README.md": f"---\nconfigs:\n{configs}---\n".encode(), **files}


READ = """
import json, sys
from llama_bidir.data import load_rows
for source in sys.argv[1:]:
    try:
        print(json.dumps(list(load_rows(source))))
    except (OSError, ValueError) as error:
        print(f"{type(error).__name__ if type(error) is ValueError else 'OSError'}: {error}")
"""


def read(path: Path, *sources: str, **environment: str) -> list[str]:
    """Returns what a separate process prints for each source. It reads the address of the Hub when it starts."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    variables |= {"HF_HOME": str(path / "hf"), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, "-W", "ignore", "-c", READ, *sources]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=path, env=variables)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
def test_rows_of_the_hub_are_read_once(tmp_path):
    news = [{"id": "d1", "text": "one"}, {"id": "d2", "text": "two"}]
    wiki = [{"id": 1, "text": "uno"}, {"id": 2, "text": "due"}]
    subsets = {
        "news": (
            {"corpus_id": "n"},
            news,
            [{"question_id": "1", "question": "q1", "pos_doc": [{"id": "d2"}], "neg_doc": [{"id": "d1"}]}],
        ),
        "wiki": (
            {"corpus_id": "n"},
            wiki,
            [{"question": "q2", "pos_doc": ["2"]}, {"question": "q3", "pos_doc": ["1"]}],
        ),
    }
    faulty = {
        "ids": ({"corpus_id": "i", "ids_only": True}, news, [{"question": "q", "pos_doc": ["d1"]}]),
        "anonymous": ({}, news, [{"question": "q", "pos_doc": ["d1"]}]),
        "columns": ({"corpus_id": "c"}, news, [{"query": "q", "pos_doc": ["d1"]}]),
        "texts": ({"corpus_id": "c"}, [{"id": "d1", "body": "b"}], [{"question": "q", "pos_doc": ["d1"]}]),
        "unknown": ({"corpus_id": "c"}, news, [{"question": "q", "pos_doc": ["d1"], "neg_doc": ["d2", "d3"]}]),
    }
    no_scores = {"pos_score": None, "neg_score": None}
    first = {"query": "q1", "pos_doc": ["two"], "neg_doc": ["one"], **no_scores}
    others = [{"query": f"q{n}", "pos_doc": [text], "neg_doc": [], **no_scores} for n, text in ((2, "due"), (3, "uno"))]
    with run_hub() as hub:
        hub.RequestHandlerClass = DatasetHandler
        endpoint = hub.endpoint
        hub.repos["tester/rows"] = make_repository(subsets)
        hub.repos["tester/faulty"] = make_repository(faulty)
        hub.repos["tester/empty"] = {"README.md": b""}
        names = [f"hf://tester/faulty/{name}" for name in faulty]
        one, every, *messages, empty, gone, no_subset = read(
            tmp_path,
            "hf://tester/rows/news",
            "hf://tester/rows",
            *names,
            "hf://tester/empty",
            "hf://tester/gone",
            "hf://tester/rows/gone",
            HF_ENDPOINT=endpoint,
        )
    assert json.loads(one) == [first]
    assert json.loads(every) == [first, *others]
    assert messages == [
        "ValueError: hf://tester/faulty/ids: dataset_metadata.json says ids_only: the dataset holds identifiers "
        "without texts. Add the texts as NeMo AutoModel's data preparation does, and train on the .json file that "
        "it writes",
        "ValueError: hf://tester/faulty/anonymous: dataset_metadata.json: corpus_id must be a string or an int, got "
        "NoneType None",
        "ValueError: hf://tester/faulty/columns: the rows must have the columns question and pos_doc, got query, "
        "pos_doc",
        "ValueError: hf://tester/faulty/texts_corpus: the documents must have the columns id and text, got id, body",
        "ValueError: hf://tester/faulty/unknown: train[0]: neg_doc[1]: the corpus 'c' has no document 'd3'",
    ]
    assert empty == (
        "ValueError: hf://tester/empty: no folder of the dataset holds a dataset_metadata.json, which would make it a "
        "subset"
    )
    assert re.match("OSError: hf://tester/gone: cannot be read from the Hub: .*404.*Check the name, the network", gone)
    assert re.match("OSError: hf://tester/rows/gone: cannot be read from the Hub: .*404.*Check the name", no_subset)

    again, listed = read(
        tmp_path, "hf://tester/rows/wiki", "hf://tester/rows", HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1"
    )
    assert json.loads(again) == others
    assert re.fullmatch(OFFLINE, listed)


def test_without_a_network_there_is_one_clear_error(tmp_path):
    with pytest.raises(OSError, match=r"^hf://tester/rows/news: cannot be read from the Hub: [^\n]+, HF_TOKEN$"):
        load_hub("hf://tester/rows/news", tmp_path)


@pytest.mark.parametrize(
    ("source", "parsed"),
    [
        ("hf://org/repo", ("org/repo", "")),
        ("hf://org/repo/", ("org/repo", "")),
        ("hf://org/repo/a/b", ("org/repo", "a/b")),
    ],
)
def test_names_on_the_hub(source, parsed):
    assert parse_hub_source(source) == parsed


@pytest.mark.parametrize("source", ["hf://", "hf://org", "hf:///repo", "org/repo"])
def test_other_names_are_refused(source):
    message = f"a dataset on the Hub is named hf://org/repo/subset or hf://org/repo, got {source!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_hub_source(source)

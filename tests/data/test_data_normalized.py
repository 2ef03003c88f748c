"""NeMo AutoModel's normalized Arrow layout."""

import json
import shutil

import datasets
import pytest

from llama_bidir.data import GroupDataset, Grouping, load_rows
from llama_bidir.data.normalized import FORMAT
from llama_bidir.jobs.mining.sources import open_source

DOCUMENTS = {"id": ["d1", "d2", "d3"], "text": ["home", "the sea", "a king"], "image_jpeg": [None, None, None]}
ROWS = [
    {"question_id": "1", "question": "bees", "corpus_id": "c", "pos_doc": [{"id": "d1"}], "neg_doc": [{"id": "d3"}]},
    {"question_id": "2", "question": "fish", "corpus_id": "c", "pos_doc": [{"id": "d2"}], "neg_doc": [{"id": "d1"}]},
]


def write_arrow(path, rows):
    """A file as `datasets` writes it to its cache."""
    made = path.parent / "made"
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows).save_to_disk(made) if isinstance(rows, dict) else datasets.Dataset.from_list(
        rows
    ).save_to_disk(made)
    (made / "data-00000-of-00001.arrow").rename(path)
    shutil.rmtree(made)


def write_bundle(folder, *, documents=DOCUMENTS, rows=ROWS, **metadata):
    write_arrow(folder / "corpus" / "0.arrow", documents)
    write_arrow(folder / "train" / "0.arrow", rows[:1])
    write_arrow(folder / "train" / "1.arrow", rows[1:])
    content = {
        "format": FORMAT,
        "train_shards": ["train/0.arrow", "train/1.arrow"],
        "corpora": [{"corpus_id": "c", "shards": ["corpus/0.arrow"], "metadata": {"corpus_id": "c"}}],
        **metadata,
    }
    (folder / "metadata.json").write_text(json.dumps(content))
    return folder


EXPECTED = [
    {"query": "bees", "pos_doc": ["home"], "neg_doc": ["a king"]},
    {"query": "fish", "pos_doc": ["the sea"], "neg_doc": ["home"]},
]


def shown(rows):
    return [{name: row[name] for name in ("query", "pos_doc", "neg_doc")} for row in rows]


@pytest.mark.parametrize("name", ["", "metadata.json"])
def test_a_folder_is_read(tmp_path, name):
    folder = write_bundle(tmp_path / "bundle")
    assert shown(load_rows(folder / name)) == EXPECTED
    dataset = GroupDataset([(load_rows(folder / name), 1.0)], Grouping(group_size=2))
    assert dataset[1]["passages"] == ["the sea", "home"]


def test_a_relative_name_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(write_bundle(tmp_path / "bundle"))
    assert shown(load_rows("metadata.json")) == EXPECTED


def test_passages_may_be_json(tmp_path):
    rows = [
        {
            **{name: row[name] for name in ("question", "corpus_id")},
            "pos_doc_json": json.dumps(row["pos_doc"]),
            "neg_doc_json": json.dumps([each["id"] for each in row["neg_doc"]]),
        }
        for row in ROWS
    ]
    assert shown(load_rows(write_bundle(tmp_path / "bundle", rows=rows))) == EXPECTED


def test_a_folder_of_sources_is_read(tmp_path):
    write_bundle(tmp_path / "all" / "first")
    other = {"id": ["d1", "d9"], "text": ["other home", "ninth"]}
    rows = [
        {"question": "wasps", "corpus_id": "c", "pos_doc": [{"id": "d9"}], "neg_doc": [{"id": "d1"}]},
        {"question": "ants", "corpus_id": "c", "pos_doc": [{"id": "d1"}], "neg_doc": []},
    ]
    write_bundle(tmp_path / "all" / "second", documents=other, rows=rows)
    sources = [{"path": "first"}, {"path": "second"}]
    (tmp_path / "all" / "metadata.json").write_text(json.dumps({"format": FORMAT, "sources": sources}))
    assert shown(load_rows(tmp_path / "all")) == [
        *EXPECTED,
        {"query": "wasps", "pos_doc": ["ninth"], "neg_doc": ["other home"]},
        {"query": "ants", "pos_doc": ["other home"], "neg_doc": []},
    ]


def test_a_changed_folder_is_read_again(tmp_path):
    folder = write_bundle(tmp_path / "bundle")
    load_rows(folder)
    write_arrow(folder / "corpus" / "0.arrow", {**DOCUMENTS, "text": ["hive", "the sea", "a king"]})
    assert load_rows(folder)[0]["pos_doc"] == ["hive"]


@pytest.mark.parametrize("name", ["", "metadata.json"])
def test_such_rows_can_be_mined(tmp_path, name):
    source = open_source(str(write_bundle(tmp_path / "bundle") / name))
    assert [row.fields["neg_doc"] for row in source.read()] == [["a king"], ["home"]]


def test_bad_rows_are_named(tmp_path):
    rows = [ROWS[0], {**ROWS[1], "pos_doc": [{"id": "d8"}]}]
    folder = write_bundle(tmp_path / "bundle", rows=rows)
    with pytest.raises(ValueError, match=r"bundle: row 1: pos_doc\[0\]: the corpus 'c' has no document 'd8'"):
        load_rows(folder)
    assert len(load_rows(folder, skip_bad_rows=True)) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"train_shards": []},
            ValueError,
            r"metadata\.json: train_shards must be a list of Arrow files, got list \[\]",
        ),
        (
            {"corpora": None},
            ValueError,
            r"metadata\.json: corpora must be a list with at least one object, got NoneType",
        ),
        ({"corpora": [5]}, ValueError, r"corpora\[0\] must be an object, got int 5"),
        ({"corpora": [{"shards": []}]}, ValueError, r"corpora\[0\]: corpus_id"),
        ({"corpora": [{"corpus_id": "c"}]}, ValueError, r"corpora\[0\]: shards must be a list of Arrow files"),
        ({"train_shards": ["none.arrow"]}, FileNotFoundError, r"none\.arrow"),
        ({"train_shards": ["metadata.json"]}, ValueError, r"metadata\.json: this is not an Arrow file of the library"),
        (
            {"train_shards": ["corpus/0.arrow"]},
            ValueError,
            r"0\.arrow: the column question is missing; the columns are",
        ),
        ({"sources": [{}]}, ValueError, r"sources\[0\]: path must be the name of a folder, got NoneType None"),
        ({"sources": [{"path": "none"}]}, FileNotFoundError, r"none/metadata\.json"),
    ],
)
def test_a_wrong_folder_is_told(tmp_path, change, error, message):
    folder = write_bundle(tmp_path / "bundle", **change)
    with pytest.raises(error, match=message):
        load_rows(folder)


def test_documents_without_text_are_refused(tmp_path):
    folder = write_bundle(tmp_path / "bundle", documents={**DOCUMENTS, "text": ["home", None, "a king"]})
    with pytest.raises(ValueError, match="the document 'd2' has no text: images are not supported"):
        load_rows(folder)


def test_images_are_refused(tmp_path):
    documents = {**DOCUMENTS, "text": ["", "the sea", "a king"], "image_jpeg": [b"jpeg", None, None]}
    with pytest.raises(ValueError, match="the document 'd1' has no text: images are not supported"):
        load_rows(write_bundle(tmp_path / "bundle", documents=documents))
    empty = {**documents, "image_jpeg": [None, None, None]}
    assert load_rows(write_bundle(tmp_path / "other", documents=empty))[0]["pos_doc"] == [""]


def test_options_of_a_beir_folder_are_refused(tmp_path):
    with pytest.raises(ValueError, match="depth can be given for a BEIR folder only, and this is not one"):
        load_rows({"path": str(write_bundle(tmp_path / "bundle")), "depth": 5})

"""Training rows that name documents of corpora, in NeMo AutoModel's layout."""

import json
import pickle
import re
from pathlib import Path

import pytest
from helpers import NO_SCORES, arrow_bytes, lines, write
from torch.utils.data import DataLoader

datasets = pytest.importorskip("datasets")


def make_corpus(
    folder: Path, corpus_id: object, documents: dict[str, list[object]], kind: str = "TextQADataset"
) -> None:
    write(folder / "merlin_metadata.json", json.dumps({"class": kind, "corpus_id": corpus_id}))
    datasets.Dataset.from_dict(documents).to_parquet(folder / "documents.parquet")


@pytest.fixture
def corpus_id_file(folder):
    """Two corpora, one with ints as identifiers and one in JSON Lines, and rows in every form."""
    make_corpus(folder / "wiki", "wiki", {"id": [7, 8, 9], "text": ["seven", "eight", "nine"], "title": ["", "", ""]})
    write(folder / "news" / "merlin_metadata.json", json.dumps({"class": "WikiSSNQDataset", "corpus_id": 1}))
    write(folder / "news" / "part-1.jsonl", lines({"docid": "a", "text": "first"}))
    write(folder / "news" / "part-2.jsonl.gz", lines({"docid": "b", "text": "second"}))
    content = {
        "corpus": [{"path": "wiki"}, {"path": str(folder / "news")}, {"path": "./wiki/"}],
        "data": [
            {
                "question_id": "1",
                "question": "q1",
                "corpus_id": "wiki",
                "pos_doc": [{"id": 8}],
                "neg_doc": [{"id": "7"}, {"id": "9"}],
            },
            {
                "question": "q2",
                "corpus_id": "1",
                "pos_doc": ["b"],
                "neg_doc": ["a"],
                "pos_score": [1],
                "neg_score": [0],
            },
            {
                "question": "q3",
                "corpus_id": "wiki",
                "pos_doc": [{"id": 9, "score": 2}, {"id": 7, "score": 1.5}],
                "neg_doc": [{"id": "8", "score": -1}],
            },
            {"question": "q4", "corpus_id": "wiki", "pos_doc": [{"id": 9, "score": 2}], "neg_doc": [{"id": 8}]},
            {"question": "q5", "corpus_id": 1, "pos_doc": "a", "neg_doc": None},
        ],
    }
    return write(folder / "train.json", json.dumps(content))


CORPUS_ID_ROWS = [
    {"query": "q1", "pos_doc": ["eight"], "neg_doc": ["seven", "nine"], **NO_SCORES},
    {"query": "q2", "pos_doc": ["second"], "neg_doc": ["first"], "pos_score": [1.0], "neg_score": [0.0]},
    {"query": "q3", "pos_doc": ["nine", "seven"], "neg_doc": ["eight"], "pos_score": [2.0, 1.5], "neg_score": [-1.0]},
    {"query": "q4", "pos_doc": ["nine"], "neg_doc": ["eight"], **NO_SCORES},
    {"query": "q5", "pos_doc": ["first"], "neg_doc": [], **NO_SCORES},
]


def test_rows_name_documents_of_corpora(corpus_id_file, load):
    dataset = load(corpus_id_file)
    assert list(dataset) == CORPUS_ID_ROWS
    assert dataset[1:3]["pos_doc"] == [["second"], ["nine", "seven"]]
    assert dataset["neg_doc"][0] == ["seven", "nine"]
    assert dataset["query"][:] == ["q1", "q2", "q3", "q4", "q5"]
    assert dataset.select([4])[0] == CORPUS_ID_ROWS[4]
    zipped = write(corpus_id_file.parent / "train.json.gz", corpus_id_file.read_bytes())
    assert list(load(zipped)) == CORPUS_ID_ROWS


def test_texts_are_looked_up_when_rows_are_read(corpus_id_file, load):
    dataset = load(corpus_id_file)
    assert dataset.with_format(None)[0] == {"query": "q1", "pos_doc": [1], "neg_doc": [0, 2], **NO_SCORES}
    assert dataset.with_format(None)[1]["pos_doc"] == [4]
    stored = arrow_bytes(dataset)
    assert b"q1" in stored
    assert b"eight" not in stored
    assert pickle.loads(pickle.dumps(dataset))[0] == CORPUS_ID_ROWS[0]
    assert len(pickle.dumps(dataset)) < 20000
    rows = DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=list)
    assert [row for batch in rows for row in batch] == CORPUS_ID_ROWS


def test_the_cache_follows_the_corpus(corpus_id_file, load):
    load(corpus_id_file)
    make_corpus(corpus_id_file.parent / "wiki", "wiki", {"id": ["9", "7", "8"], "text": ["9", "7", "8 anew"]})
    assert load(corpus_id_file)[0] == {"query": "q1", "pos_doc": ["8 anew"], "neg_doc": ["7", "9"], **NO_SCORES}


def data_row(**fields: object) -> dict[str, object]:
    return {"question": "q", "corpus_id": "wiki", "pos_doc": ["7"], "neg_doc": ["8"], **fields}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (5, "a row must be an object with question, corpus_id and pos_doc, got int 5"),
        (data_row(corpus_id=None), "corpus_id must be a string or an int, got NoneType None"),
        (data_row(corpus_id="x"), "corpus_id: there is no corpus 'x'; the file's corpora are 'wiki', '1'"),
        (data_row(question=None), "query (or question) must be a string, got NoneType None"),
        (data_row(pos_doc=None), "pos_doc is missing; it must be a passage or a list of passages"),
        (data_row(pos_doc=[]), "pos_doc must hold at least one passage, got list []"),
        (data_row(pos_doc=[{"id": "a"}]), "pos_doc[0]: the corpus 'wiki' has no document 'a'"),
        (data_row(neg_doc=["7", 70]), "neg_doc[1]: the corpus 'wiki' has no document '70'"),
        (data_row(neg_doc=[{"text": "t"}]), "neg_doc[0]: id must be a string or an int, got NoneType None"),
        (data_row(neg_doc=[1.5]), "neg_doc[0]: id must be a string or an int, got float 1.5"),
        (
            data_row(pos_doc=[{"id": 7, "score": "x"}], neg_doc=[{"id": 8, "score": 1}]),
            "pos_score[0] must be a finite number, got str 'x'",
        ),
    ],
)
def test_malformed_rows_of_a_corpus_id_file_are_named(row, message, corpus_id_file, load, caplog):
    content = json.loads(corpus_id_file.read_text())
    write(corpus_id_file, json.dumps({**content, "data": [content["data"][0], row]}))
    message = f"train.json: data[1]: {message}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load("train.json")
    assert list(load("train.json", skip_bad_rows=True)) == CORPUS_ID_ROWS[:1]
    assert caplog.records[0].message == f"train.json: left out 1 bad rows:\n  {message}"


def test_malformed_files_of_the_corpus_id_layout_are_named(corpus_id_file, load):
    folder, content = corpus_id_file.parent, json.loads(corpus_id_file.read_text())

    def check(new: object, message: str, kind: type[Exception] = ValueError) -> None:
        write(corpus_id_file, new if isinstance(new, (str, bytes)) else json.dumps(new))
        with pytest.raises(kind, match=f"^{re.escape(message)}$"):
            load("train.json")

    check('{\n"data": ]', "train.json:2: the file must hold one JSON object: Expecting value at column 9")
    check(b'{\n\n"\xff', "train.json:3: the file must be UTF-8 text: invalid start byte")
    check([], "train.json: the file must hold one JSON object, got list []")
    check(
        {"data": []},
        "train.json: corpus must be an object with the path of a folder, or a list of them, got NoneType None; rows "
        "that hold their texts themselves belong in a .jsonl file, one per line",
    )
    check(
        {**content, "corpus": [{"path": "wiki"}, {}]},
        "train.json: corpus[1] must be an object with the path of a folder, got dict {}",
    )
    check({**content, "data": {}}, "train.json: data must be a list of rows, got dict {}")
    check({**content, "data": []}, "train.json: data must be a list of rows, got list []")
    check(
        {**content, "corpus": {"path": "gone"}},
        f"train.json: corpus[0]: there is no file '{folder}/gone/merlin_metadata.json', which must name class and "
        "corpus_id",
        FileNotFoundError,
    )

    def check_corpus(message: str) -> None:
        check({**content, "corpus": [{"path": "wiki"}, {"path": "new"}]}, message)

    new = folder / "new"
    make_corpus(new, "images", {"id": ["1"], "text": ["t"]}, kind="ColPaliDataset")
    check_corpus(
        f"{new}/merlin_metadata.json: class must be one of TextQADataset, WikiSSNQDataset, as only documents with a "
        "text are supported, got str 'ColPaliDataset'"
    )
    make_corpus(new, None, {"id": ["1"], "text": ["t"]})
    check_corpus(f"{new}/merlin_metadata.json: corpus_id must be a string or an int, got NoneType None")
    make_corpus(new, "wiki", {"id": ["1"], "text": ["t"]})
    check_corpus(
        f"train.json: corpus[1]: {new} has the corpus_id 'wiki' of {folder}/wiki; give each folder a corpus_id of its "
        "own"
    )
    make_corpus(new, "new", {"key": ["1"], "text": ["t"]})
    check_corpus(f"{new}: the documents must have the columns id and text, got key, text")
    make_corpus(new, "new", {"id": ["1"], "text": [5]})
    check_corpus(f"{new}: the column text must be one of string, large_string, got int64")
    make_corpus(new, "new", {"id": ["1", "2"], "text": ["t", None]})
    check_corpus(f"{new}: row 1: the document has no text")
    make_corpus(new, "new", {"id": [1, 2, 1], "text": ["t", "u", "v"]})
    check_corpus(
        f"{new}: row 2: the document '1' is there already, in row 0; give each document an identifier of its own"
    )
    (new / "documents.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        ValueError, match=f"^{new}: the documents cannot be read: .*; the folder must hold parquet, arrow"
    ):
        load("train.json")
    write(new / "documents.jsonl", lines({"id": "1", "text": "t"}, {"id": "2"}))
    check_corpus(f"{new}/documents.jsonl:2: text must be a string, got NoneType None; correct or remove the line")

"""Documents that are the query itself are neither reranked nor mined, and what a BEIR folder lacks stops no job."""

import json

import pytest
from helpers import command, lines, names, read_lines_of, write

pytest.importorskip("datasets")
pytest.importorskip("bm25s")

from llama_bidir import CrossEncoder
from llama_bidir.cli import main
from llama_bidir.jobs.mining import Selection, mine_file, mine_negatives
from llama_bidir.jobs.rerank import rerank_run

EVERYTHING = Selection(num_negatives=100, absolute_margin=-1000, relative_margin=1)
CORPUS = [
    {"_id": "arg-1", "title": "Bees", "text": "Bees make honey."},
    {"_id": "arg-2", "title": "", "text": "Honey is not made by bees."},
    {"_id": "copy", "title": "Bees", "text": "Where do  bees fly?"},
    {"_id": "1", "title": "", "text": "Bees fly home."},
    {"_id": "d", "title": "", "text": "The garden and the bees."},
]
QUERIES = [
    {"_id": "arg-1", "text": "Honey is made by bees."},
    {"_id": "q", "text": "Where do bees fly?"},
    {"_id": "1", "text": "home of bees"},
]
IDS = [document["_id"] for document in CORPUS]
TEXTS = {document["_id"]: f"{document['title']} {document['text']}".strip() for document in CORPUS}
KEPT = {"arg-1": set(IDS) - {"arg-1"}, "q": set(IDS) - {"copy"}, "1": set(IDS)}
WARNING = "left out 2 candidates that are the query itself, by identifier or text; ignore_identical_ids=False"
WARNING += " (--no-ignore-identical-ids) keeps them"


@pytest.fixture
def files(tmp_path):
    write(tmp_path / "corpus.jsonl", lines(*CORPUS))
    write(tmp_path / "queries.jsonl", lines(*QUERIES))
    write(tmp_path / "qrels.tsv", "query-id\tcorpus-id\tscore\narg-1\targ-2\t1\nq\td\t1\n1\targ-2\t1\n")
    run = [f"{query['_id']} Q0 {name} {rank} {-rank} t" for query in QUERIES for rank, name in enumerate(IDS, 1)]
    write(tmp_path / "run.trec", "\n".join(run) + "\n")
    return {name: tmp_path / f"{name}.jsonl" for name in ("corpus", "queries")}


def documents_of(path):
    return {query_id: [doc_id for doc_id, *_ in entries] for query_id, entries in read_lines_of(path).items()}


@pytest.mark.parametrize("first_stage", ["run", "bm25"])
def test_rerank_leaves_them_out(first_stage, files, reranker_checkpoint, tmp_path, caplog):
    reranker = CrossEncoder(reranker_checkpoint, device="cpu")
    run = {"run": tmp_path / "run.trec"} if first_stage == "run" else {"write_run": tmp_path / "bm25.trec"}
    result = rerank_run(reranker, **files, **run, output=tmp_path / "out.trec")
    assert {query_id: set(ids) for query_id, ids in documents_of(result.output).items()} == KEPT
    assert result.num_pairs == 13
    where = tmp_path / "run.trec" if first_stage == "run" else files["corpus"]
    assert [message for message in caplog.messages if "left out" in message] == [f"{where}: {WARNING}"]
    if first_stage == "bm25":
        assert {query_id: set(ids) for query_id, ids in documents_of(tmp_path / "bm25.trec").items()} == KEPT
        run = {}
    # They do not count for the depth.
    shallow = rerank_run(reranker, **files, **run, output=tmp_path / "2.trec", depth=2)
    assert shallow.num_pairs == 6
    if first_stage == "run":
        assert documents_of(shallow.output)["q"][2:] == ["1", "d"]
    kept = rerank_run(reranker, **files, **run, output=tmp_path / "all.trec", ignore_identical_ids=False)
    assert [set(ids) for ids in documents_of(kept.output).values()] == [set(IDS)] * 3


def test_the_option_of_rerank_belongs_to_the_job(files, reranker_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llama_bidir.jobs.job.Job.finish", lambda job: None)
    arguments = ["--model", reranker_checkpoint, "--device", "cpu", "--run", tmp_path / "run.trec"]
    arguments += ["--output", tmp_path / "out.trec", *(f"--{name}={path}" for name, path in files.items())]
    assert main(["rerank", *map(str, arguments)]) == 0
    assert main(["rerank", *map(str, arguments), "--no-ignore-identical-ids"]) == 2
    changed = "different arguments: ignore_identical_ids was True and is False. Use"
    assert changed in capsys.readouterr().err


def test_a_run_of_nothing_else_is_refused(files, reranker_checkpoint, tmp_path, capsys):
    from helpers import Collection

    collection = Collection(**files, run=write(tmp_path / "run.trec", "arg-1 Q0 arg-1 1 1 t\nq Q0 copy 1 1 t\n"))
    before = names(tmp_path)
    assert main(command(collection, reranker_checkpoint, tmp_path / "out.trec", "--device", "cpu")) == 2
    assert "every document is the query itself, so nothing is left to rerank" in capsys.readouterr().err
    assert names(tmp_path) == before


@pytest.mark.parametrize("candidates", ["run", "bm25"])
def test_mine_leaves_them_out(candidates, files, reranker_checkpoint, tmp_path, caplog):
    if candidates == "bm25":
        (tmp_path / "run.trec").unlink()

    def mine(name, **options):
        output = tmp_path / f"{name}.jsonl"
        result = mine_file(str(reranker_checkpoint), tmp_path, output, selection=EVERYTHING, keep_empty=True, **options)
        return result, {row["query_id"]: row["neg_doc"] for row in map(json.loads, output.read_text().splitlines())}

    result, mined = mine("out")
    assert {query_id: TEXTS["arg-1"] in texts for query_id, texts in mined.items()} == {
        "arg-1": False,
        "q": True,
        "1": True,
    }
    assert not any("Where do" in text for text in mined["q"])
    assert any("Where do" in text for text in mined["arg-1"])
    assert "Bees fly home." in mined["1"]
    assert result.num_identical == 2
    assert result.num_candidates == result.num_negatives + sum(result.removed.values()) == 3 + 3 + 4
    assert [message for message in caplog.messages if "left out" in message] == [f"{tmp_path}: {WARNING}"]
    kept, mined = mine("all", ignore_identical_ids=False)
    assert (kept.num_identical, kept.num_candidates) == (0, 12)
    assert TEXTS["arg-1"] in mined["arg-1"]


def test_candidates_of_the_rows_themselves(reranker_checkpoint, tmp_path, caplog):
    row = {"query_id": "q", "query": "a b", "pos_doc": "p", "neg_doc": ["a  b", {"id": "q", "text": "c"}, "d"]}
    rows = write(tmp_path / "rows.jsonl", lines(row))
    result = mine_file(str(reranker_checkpoint), rows, tmp_path / "out.jsonl", selection=EVERYTHING)
    assert (result.num_candidates, result.num_identical) == (1, 2)
    assert json.loads((tmp_path / "out.jsonl").read_text())["neg_doc"] == ["d"]
    reranker = CrossEncoder(reranker_checkpoint, device="cpu")
    [mined] = mine_negatives(reranker, [row], EVERYTHING)
    assert (mined.fields["neg_doc"], mined.num_candidates, mined.num_identical) == (["d"], 1, 2)
    assert caplog.messages == [f"{rows}: {WARNING}", f"the rows: {WARNING}"]
    [kept] = mine_negatives(reranker, [row], EVERYTHING, ignore_identical_ids=False)
    assert (len(kept.fields["neg_doc"]), kept.num_candidates) == (3, 3)


def test_mine_goes_without_the_judged_queries_and_documents_that_are_missing(
    files, reranker_checkpoint, tmp_path, caplog
):
    judged = "query-id\tcorpus-id\tscore\nq\td\t1\nq\tgone-1\t1\ngone\td\t1\n1\tgone-2\t1\n"
    write(tmp_path / "qrels.tsv", judged)
    result = mine_file(str(reranker_checkpoint), tmp_path, tmp_path / "out.jsonl", selection=EVERYTHING)
    assert result.num_rows == 1
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert (row["query_id"], row["pos_doc"]) == ("q", [TEXTS["d"]])
    qrels, queries, corpus = (tmp_path / name for name in ("qrels.tsv", "queries.jsonl", "corpus.jsonl"))
    assert caplog.messages[:2] == [
        f"{qrels}: left out 1 judged queries that {queries} lacks: gone",
        f"{qrels}: left out 2 relevant documents that {corpus} lacks: gone-1, gone-2",
    ]

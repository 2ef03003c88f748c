import gzip
import json
import re
import sqlite3
from contextlib import closing
from functools import partial

import numpy as np
import pytest
import torch
from helpers import command, lines, names, read_lines_of, write, write_collection

pytest.importorskip("datasets")

from llama_bidir import CrossEncoder
from llama_bidir.cli import main
from llama_bidir.data.corpus import open_corpus, read_documents, read_queries
from llama_bidir.jobs import scoring
from llama_bidir.jobs.rerank import rank_candidates, rerank_run
from llama_bidir.jobs.rerank.candidates import open_candidates
from llama_bidir.utils.sharing import deal


@pytest.fixture
def reranker(reranker_checkpoint):
    return CrossEncoder(reranker_checkpoint, device="cpu")


@pytest.fixture
def files(tmp_path):
    return write_collection(tmp_path)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr(scoring, "CPU_WINDOW_PAIRS", 25)


def test_ranking_by_hand():
    order, scores = rank_candidates([0.5, 2.0, -1.0, 2.0], 7)
    assert order == [1, 3, 0, 2, 4, 5, 6]
    step = 2.0**-23  # between float32 values from 1 to 2
    assert scores == [2.0, 2.0, 0.5, -1.0, -1 - step, -1 - 2 * step, -1 - 3 * step]
    assert rank_candidates([0.0, -0.0, 0.0], 3)[0] == [0, 1, 2]


def test_a_run_holds_the_scores_of_predict_and_the_rest_in_order(reranker, files, tmp_path):
    result = rerank_run(reranker, **files.arguments(), output=tmp_path / "out" / "run.trec", depth=6, tag="mine")
    assert (result.output, result.num_pairs) == (tmp_path / "out" / "run.trec", 11 * 6)
    assert names(tmp_path / "out") == ["run.trec"]
    documents, queries = dict(read_documents(files.corpus)), read_queries(files.queries)
    first, ranked = read_lines_of(files.run), read_lines_of(result.output)
    assert list(ranked) == [f"q{n}" for n in range(12) if n != 3]
    for query_id, entries in ranked.items():
        candidates = [doc_id for doc_id, *_ in first[query_id]]
        scores = reranker.predict([(queries[query_id], documents[doc_id]) for doc_id in candidates[:6]])
        order = np.argsort(-scores, kind="stable")
        assert [doc_id for doc_id, *_ in entries] == [candidates[place] for place in order] + candidates[6:]
        assert [rank for _, rank, *_ in entries] == list(range(1, 11))
        assert {tag for *_, tag in entries} == {"mine"}
        written = [score for _, _, score, _ in entries]
        assert [float(np.float32(score)) for score in written] == written
        np.testing.assert_allclose(written[:6], scores[order], rtol=1e-5, atol=1e-6)
        assert written[6:] == [float(np.nextafter(np.float32(score), np.float32(-9e9))) for score in written[5:-1]]


def test_ranks_decide_and_ties_keep_the_order_of_the_file(reranker, files, tmp_path):
    # Two documents of one text tie; a run need not be sorted, nor have the lines of a query together.
    write(
        files.corpus, lines(*({"_id": doc_id, "text": "bees"} for doc_id in ("a", "b", "c")), {"_id": "d", "text": ""})
    )
    rows = ["q0 Q0 d 4 1 x", "q0 Q0 c 2 9 x", "q1 Q0 a 1 1 x", "q0 Q0 a 2 8 x", "q0 Q0 b 1 1 x"]
    write(files.run, "\n".join(rows))
    rerank_run(reranker, **files.arguments(), output=tmp_path / "out.trec", depth=3)
    ranked = read_lines_of(tmp_path / "out.trec")
    assert [doc_id for doc_id, *_ in ranked["q0"]] == ["b", "c", "a", "d"]
    assert len({score for _, _, score, _ in ranked["q0"][:3]}) == 1
    assert [doc_id for doc_id, *_ in ranked["q1"]] == ["a"]


def test_compressed_files_give_the_same_run(reranker, files, tmp_path):
    expected = rerank_run(reranker, **files.arguments(), output=tmp_path / "plain.trec").output.read_bytes()
    packed = {
        name: write(path.with_name(f"{path.name}.gz"), path.read_bytes()) for name, path in files._asdict().items()
    }
    again = [rerank_run(reranker, **packed, output=tmp_path / f"{n}.trec.gz").output.read_bytes() for n in range(2)]
    assert gzip.decompress(again[0]) == expected
    assert again[0] == again[1]


def test_queries_without_candidates_are_told(reranker, files, tmp_path, caplog):
    rerank_run(reranker, **files.arguments(), output=tmp_path / "out.trec")
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 12 queries have no candidates and thus no line in the output: q3"
    ]


def test_bm25_makes_the_run_that_is_not_given(reranker, files, tmp_path):
    pytest.importorskip("bm25s")
    documents = [{"_id": "a", "text": "bees fly"}, {"_id": "b", "text": "bees fly"}, {"_id": "c", "title": "cats"}]
    write(files.corpus, lines(*({"text": "", **document} for document in documents)))
    queries = [{"_id": "q1", "text": "bees and cats"}, {"_id": "q2", "text": "dogs"}, {"_id": "q3", "text": "bees"}]
    write(files.queries, lines(*queries))
    options = {"corpus": files.corpus, "queries": files.queries, "depth": 2}
    rerank_run(reranker, **options, output=tmp_path / "out.trec", write_run=tmp_path / "bm25.trec")
    found = read_lines_of(tmp_path / "bm25.trec")
    assert {query_id: [doc_id for doc_id, *_ in entries] for query_id, entries in found.items()} == {
        "q1": ["c", "a"],
        "q3": ["a", "b"],
    }
    rerank_run(reranker, **options, output=tmp_path / "again.trec", run=tmp_path / "bm25.trec")
    assert (tmp_path / "out.trec").read_bytes() == (tmp_path / "again.trec").read_bytes()
    rerank_run(reranker, **options, output=tmp_path / "third.trec", write_run=tmp_path / "bm25.trec.gz")
    assert gzip.decompress((tmp_path / "bm25.trec.gz").read_bytes()) == (tmp_path / "bm25.trec").read_bytes()
    assert not [name for name in names(tmp_path) if "partial" in name]
    with pytest.raises(FileExistsError, match=r"bm25\.trec' exists: pass overwrite \(--overwrite\) to replace it"):
        rerank_run(reranker, **options, output=tmp_path / "fourth.trec", write_run=tmp_path / "bm25.trec")


def test_an_existing_output_is_replaced_only_when_asked(reranker, files, tmp_path):
    output = tmp_path / "out.trec"
    output.write_text("mine")
    with pytest.raises(FileExistsError, match=r"out\.trec' exists: pass overwrite \(--overwrite\) to replace it, or"):
        rerank_run(reranker, **files.arguments(), output=output)
    assert output.read_text() == "mine"
    rerank_run(reranker, **files.arguments(), output=output, overwrite=True)
    assert output.read_text().startswith("q0 Q0 ")


def test_scores_that_have_no_rank_are_refused(reranker, files, tmp_path):
    with torch.no_grad():
        reranker.model.score.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the score of document 'd\d+' for query 'q0' is nan and has no rank"):
        rerank_run(reranker, **files.arguments(), output=tmp_path / "out.trec")
    assert not (tmp_path / "out.trec").exists()


@pytest.mark.parametrize("verb", ["rerank", "mine"])
def test_a_score_that_has_no_rank_is_a_failure_at_work(verb, files, reranker_checkpoint, tmp_path, capsys):
    broken = CrossEncoder(reranker_checkpoint, device="cpu")
    broken.model.score.weight.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    arguments = command(files, tmp_path / "broken", tmp_path / "out.trec")
    if verb == "mine":
        rows = write(tmp_path / "rows.jsonl", lines({"query": "q", "pos_doc": "bees", "neg_doc": ["hive"]}))
        output = tmp_path / "out.jsonl"
        arguments = ["mine", f"--model={tmp_path / 'broken'}", f"--source={rows}", f"--output={output}"]
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"llama-bidir: error: .*the score of .* is nan and has no rank.*: the weights hold NaN or infinity, first in "
        r"score\.weight: check the checkpoint, or use bfloat16 or float32",
        error,
    )


def test_windows_hold_whole_queries(files):
    candidates = open_candidates(open_corpus(files.corpus), files.queries, files.run)
    assert candidates.windows(depth=4, window_pairs=10) == [range(n, min(n + 2, 11)) for n in range(0, 11, 2)]
    assert candidates.windows(depth=10, window_pairs=9) == [range(n, n + 1) for n in range(11)]
    assert candidates.windows(depth=10, window_pairs=10**6) == [range(11)]
    assert [len(candidates.pairs(window, 4)) for window in candidates.windows(4, 10)] == [8] * 5 + [4]


def test_shares_hold_each_window_once_and_like_costs():
    costs = [number * 37 % 500 for number in range(101)]
    for size in (1, 2, 3, 8):
        shares = deal(costs, size)
        assert sorted(number for share in shares for number in share) == list(range(101))
        assert all(share == sorted(share) for share in shares)
        sums = [sum(costs[number] for number in share) for share in shares]
        assert max(sums) - min(sums) <= 500


def test_the_command_reranks(files, reranker, reranker_checkpoint, tmp_path, capsys):
    output = tmp_path / "out.trec"
    options = ("--depth", 6, "--device", "cpu", "--max-length", 48, "--tag", "t")
    assert main(command(files, reranker_checkpoint, output, *options)) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(rf"run: {output} \(66 pairs scored in [\d.]+ s, [\d.]+ pairs/s\)\n", printed.out)
    assert "66/66" in printed.err
    assert "pair/s" in printed.err
    short = CrossEncoder(reranker_checkpoint, device="cpu", max_length=48)
    expected = rerank_run(short, **files.arguments(), output=tmp_path / "b.trec", depth=6, tag="t").output
    assert output.read_bytes() == expected.read_bytes()


BAD_FILES = [
    ("corpus", '{"_id": "d0", "text": "a"}\n{"_id": "d0", "text": "b"}', ":2: _id: the document 'd0' is there already"),
    ("corpus", '{"_id": "d0"}', ":1: text must be a string, got NoneType None"),
    ("corpus", "", ":1: the file has no lines; it needs one JSON object per line, one for each document"),
    ("corpus", '\n{"_id": "d0", "text": "a"', ":2: a line must be one JSON object: "),
    ("corpus", b'{"_id": "d0", "text": "\xff"}', ":1: the file must be UTF-8 text: invalid start byte at byte 24"),
    ("queries", '{"text": "a"}', ":1: _id must be a string or an int, got NoneType None"),
    ("queries", '{"_id": "q1", "text": 3}', ":1: text must be a string, got int 3"),
    ("run", "q0 Q0 d0 1 0.5", ":1: a line of a run must have 6 columns (query-id"),
    ("run", "q0 Q0 d0 1 nan x", ":1: score must be a finite number, got 'nan'"),
    ("run", "q0 Q0 d0 first 1 x", ":1: rank must be a whole number, got 'first'"),
    ("run", "", ":1: the run has no entries; it needs one per line"),
    (
        "run",
        "q0 Q0 d0 1 1 x\nq0 Q0 d99 2 1 x",
        ":2: doc-id: there is no document 'd99' in CORPUS; both files must be of the same dataset",
    ),
    (
        "run",
        "q0 Q0 d0 1 1 x\nq99 Q0 d0 1 1 x",
        ":2: query-id: there is no query 'q99' in QUERIES; both files must be of the same dataset",
    ),
    (
        "run",
        "q0 Q0 d0 1 1 x\nq0 Q0 d0 2 1 x",
        ":2: doc-id: the query 'q0' has the document 'd0' already, in line 1; keep one",
    ),
    (
        "run",
        "q0 Q0 d0 1 1 x\nq1 Q0 d0 1 1 x\nq0 Q0 d0 2 1 x",
        ":3: doc-id: the query 'q0' has the document 'd0' already, in ",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_malformed_input_is_told_with_file_and_line(files, tmp_path, capsys, name, content, message):
    path = write(getattr(files, name), content)
    before = names(tmp_path)
    assert main(command(files, tmp_path / "no-model-is-loaded", tmp_path / "out" / "out.trec")) == 2
    error = capsys.readouterr().err
    message = message.replace("CORPUS", str(files.corpus)).replace("QUERIES", str(files.queries))
    assert error.startswith(f"llama-bidir: error: {path}{message}")
    assert error.count("\n") == 1
    assert names(tmp_path) == before


def test_a_truncated_gzip_file_is_told(files, tmp_path, capsys):
    path = tmp_path / "run.trec.gz"
    path.write_bytes(gzip.compress(files.run.read_bytes())[:-30])
    assert main(command(files._replace(run=path), "m", tmp_path / "out.trec")) == 2
    assert re.match(rf"llama-bidir: error: {path}:\d+: the file must be whole gzip data: ", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--corpus", "gone"], "there is no file 'gone'"),
        (["--tag", "two words"], "tag must be one word because it is a column of the run, got 'two words'"),
        (
            ["--write-run", "x"],
            "write_run keeps the run that BM25 makes when none is given: leave out write_run or run",
        ),
        (["--device", "typo"], "--device: "),
        (["--model", "./gone"], "not a checkpoint: there is no such folder"),
        (["--max-length", "4"], "must be an int from 8 to max_position_embeddings (256), got 4"),
    ],
)
def test_bad_arguments_leave_nothing(files, reranker_checkpoint, tmp_path, capsys, options, message):
    before = names(tmp_path)
    assert main(command(files, reranker_checkpoint, tmp_path / "out.trec", *options)) == 2
    assert message in capsys.readouterr().err
    assert names(tmp_path) == before


def test_a_model_of_several_labels_is_refused(model, tokenizer, files, tmp_path):
    two = CrossEncoder(type(model)(type(model.config)(**{**model.config.to_dict(), "num_labels": 2})), tokenizer)
    with pytest.raises(ValueError, match="Reranking needs one score per pair, but the model has 2 labels: use a model"):
        rerank_run(two, **files.arguments(), output=tmp_path / "out.trec")


def test_an_activation_is_applied(reranker, reranker_checkpoint, files, tmp_path):
    rerank_run(reranker, **files.arguments(), output=tmp_path / "logits.trec")
    squashed = CrossEncoder(reranker_checkpoint, device="cpu", activation_fn=torch.sigmoid)
    rerank_run(squashed, **files.arguments(), output=tmp_path / "squashed.trec")
    logits, scores = read_lines_of(tmp_path / "logits.trec"), read_lines_of(tmp_path / "squashed.trec")
    for query_id, entries in logits.items():
        expected = {doc_id: 1 / (1 + np.exp(-score)) for doc_id, _, score, _ in entries}
        assert {doc_id: score for doc_id, _, score, _ in scores[query_id]} == pytest.approx(expected, rel=1e-5)


def test_the_journal_is_a_sqlite_file_that_other_tools_read(reranker, files, tmp_path, monkeypatch):
    monkeypatch.setattr("llama_bidir.jobs.job.Job.finish", lambda job: None)
    rerank_run(reranker, **files.arguments(), output=tmp_path / "out.trec", depth=3)
    assert names(tmp_path) == ["corpus.jsonl", "out.trec.partial", "queries.jsonl", "run.trec"]
    with closing(sqlite3.connect(tmp_path / "out.trec.partial")) as database:
        notes = {name: json.loads(value) for name, value in database.execute("SELECT name, value FROM notes")}
        windows = database.execute("SELECT number, length(record) FROM windows ORDER BY number").fetchall()
    assert (notes["verb"], notes["arguments"]["depth"], notes["settings"]["window_pairs"]) == ("rerank", 3, 25)
    assert windows == [(0, 4 * 24), (1, 4 * 9)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--write-run", "out.trec"], "output and write_run must be two files"),
        (["--write-run", "corpus.jsonl", "--overwrite"], "write_run and corpus must be two files"),
        (["--ray-actors", "2"], "--ray-actors is for --engine ray"),
    ],
)
def test_outputs_that_would_be_lost_are_refused(options, message, folder, reranker_checkpoint, capsys):
    write_collection(folder)
    arguments = ["--corpus", "corpus.jsonl", "--queries", "queries.jsonl", "--output", "out.trec"]
    assert main(["rerank", "--model", str(reranker_checkpoint), *arguments, *options]) == 2
    assert message in capsys.readouterr().err
    assert "hive" in (folder / "corpus.jsonl").read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("queries.jsonl", {"_id": "q 1", "text": "bees"}, "queries.jsonl: _id: 'q 1' is not one word"),
        ("corpus.jsonl", {"_id": "d 1", "text": "bees"}, "corpus.jsonl: _id: 'd 1' is not one word"),
        ("queries.jsonl", {"_id": "q1", "text": "zebra"}, "no query shares a word with a document of corpus.jsonl"),
        ("corpus.jsonl", {"_id": "d1", "text": "the"}, "no query shares a word with a document of corpus.jsonl"),
    ],
)
def test_what_bm25_cannot_rank_is_told_and_holds_no_later_start(name, content, message, folder, reranker, tmp_path):
    files = write_collection(folder)
    kept = (folder / name).read_text()
    (folder / name).write_text(lines(content))
    start = partial(
        rerank_run, reranker, corpus=files.corpus.name, queries=files.queries.name, output="out.trec", depth=3
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        start()
    assert not (folder / "out.trec").exists()
    (folder / name).write_text(kept)
    assert start().num_pairs > 0

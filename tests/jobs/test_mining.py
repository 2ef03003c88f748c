import gzip
import json
import math
import random

import numpy as np
import pytest
import torch
from helpers import lines, make_model, make_tokenizer, write

from llama_bidir import CrossEncoder
from llama_bidir.jobs.mining import Selection, mine_file, mine_negatives, select_negatives
from llama_bidir.jobs.mining.duplicates import are_near_duplicates, make_shingles, split_words

WORDS = ["bees", "hive", "clover", "sun", "Paris", "France", "Seine", "garden", "flowers", "white"]
EVERYTHING = Selection(num_negatives=100, relative_margin=1)


def texts(count):
    return [f"passage number {WORDS[index]}" for index in range(count)]


def select(positive_scores, scores, candidates=None, positives=None, **rules):
    positives = positives or [f"positive {index}" for index in range(len(positive_scores))]
    return select_negatives(
        positives, positive_scores, candidates or texts(len(scores)), scores, Selection(**rules), draw="q"
    )


def removed(selected):
    return {reason: count for reason, count in selected.removed.items() if count}


@pytest.mark.parametrize("positive", [3.0, 0.0, -4.0])
def test_absolute_margin_is_in_logits_and_strict(positive):
    scores = [positive + 1, positive, positive - 1.5, positive - 2, positive - 2.5]
    selected = select([positive], scores, absolute_margin=2.0, relative_margin=1)
    assert selected.indices == [4]
    assert removed(selected) == {"margin": 4}
    assert select([positive], scores, relative_margin=1).indices == [2, 3, 4]


@pytest.mark.parametrize(
    ("positive", "threshold"),
    [
        (0.0, math.log(0.475 / 0.525)),  # 95% of 0.5
        (math.log(3), math.log(0.7125 / 0.2875)),  # 95% of 0.75
        (-math.log(3), math.log(0.2375 / 0.7625)),  # 95% of 0.25
        (1000.0, math.log(0.95 / 0.05)),  # 95% of 1
        (-1000.0, -1000 + math.log(0.95)),  # of next to nothing: exp(x) and sigmoid(x) are then the same
    ],
)
def test_relative_margin_is_a_share_of_the_positives_probability(positive, threshold):
    assert Selection().threshold(positive) == pytest.approx(threshold, rel=1e-12)
    selected = select([positive], [threshold + 1e-6, threshold - 1e-6])
    assert (selected.indices, removed(selected)) == ([1], {"margin": 1})


def test_both_margins_hold():
    assert Selection(absolute_margin=0.5).threshold(0.0) == -0.5
    assert Selection(absolute_margin=0.05).threshold(0.0) == pytest.approx(math.log(0.475 / 0.525))
    assert Selection(relative_margin=1, absolute_margin=0.25).threshold(1000.0) == 999.75


def test_a_negative_margin_lets_everything_through_to_be_scored():
    selected = select([0.0], [50.0, -50.0, 1.0], absolute_margin=-100.0, relative_margin=1)
    assert selected.indices == [0, 2, 1]


def test_the_lowest_positive_is_the_measure():
    selected = select([5.0, -1.0, 2.0], [4.0, -1.0, -1.5], relative_margin=1)
    assert selected.indices == [2]


def test_by_falling_score_in_the_order_of_the_candidates_where_equal():
    selected = select([9.0], [1.0, 2.0, 1.0, 2.0, 0.5], relative_margin=1, num_negatives=4)
    assert selected.indices == [1, 3, 0, 2]
    assert removed(selected) == {"surplus": 1}


def test_empty_candidates_and_those_with_the_words_of_a_positive_are_left_out():
    candidates = ["", "...", "The  HIVE, is white!", "\uff34he hive is white", "The hive is green"]
    selected = select([9.0], [0.0] * 5, candidates, ["the hive is white"])
    assert (selected.indices, removed(selected)) == ([4], {"empty": 2, "positive": 2})


def test_near_duplicates_of_a_positive_or_of_a_better_negative_are_left_out():
    words = [f"word{number}" for number in range(100)]
    positive, negative = " ".join(words), " ".join(reversed(words))
    candidates = [positive.replace("word50", "other"), negative.replace("word50", "other"), negative]
    selected = select([9.0], [3.0, 1.0, 2.0], candidates, [positive], relative_margin=1)
    assert (selected.indices, removed(selected)) == ([2], {"duplicate": 2})
    known = select_negatives([positive], [9.0], [negative], [1.0], known_positives=[candidates[1]])
    assert (known.indices, known.removed["duplicate"]) == ([], 1)


def test_skipped_ranks_do_not_count_positives():
    selected = select([9.0], [0.0, 1.0, 2.0, 3.0], ["positive 0", *texts(3)], skip_top=2, relative_margin=1)
    assert (selected.indices, removed(selected)) == ([3], {"positive": 1, "skipped": 2})


def test_max_score_is_the_highest_that_passes():
    selected = select([9.0], [2.0, 2.5, -1.0], max_score=2.0)
    assert (selected.indices, removed(selected)) == ([0, 2], {"max_score": 1})


def test_a_random_draw_depends_on_seed_and_query_alone():
    scores = [float(index) for index in range(10)]
    drawn = {
        (seed, query): tuple(
            select_negatives(
                ["positive"],
                [20.0],
                texts(10),
                scores,
                Selection(num_negatives=4, sampling="random", seed=seed, relative_margin=1),
                draw=query,
            ).indices
        )
        for seed in range(5)
        for query in ("a", "b")
    }
    assert len(set(drawn.values())) > 5
    assert all(list(indices) == sorted(indices, reverse=True) and len(indices) == 4 for indices in drawn.values())
    again = Selection(num_negatives=4, sampling="random", seed=3, relative_margin=1)
    # The draw takes from what passes: a candidate above the threshold is never in it.
    assert tuple(select_negatives(["p"], [20.0], texts(10), scores, again, draw="a").indices) == drawn[3, "a"]
    assert 9 not in select_negatives(["p"], [8.5], texts(10), scores, again, draw="a").indices


@pytest.mark.parametrize("sampling", ["top", "random"])
def test_no_negative_is_a_positive_or_above_the_threshold(sampling):
    generator = random.Random(1)
    selection = Selection(num_negatives=5, absolute_margin=0.3, skip_top=2, sampling=sampling)
    num_taken = 0
    for _ in range(200):
        passages = [" ".join(generator.choices(WORDS[:4], k=generator.randrange(4))) for _ in range(40)]
        scores = [generator.gauss(0, 3) for _ in passages]
        selected = select_negatives(passages[:2], scores[:2], passages[2:], scores[2:], selection, draw=passages[2])
        negatives = [(passages[2:][index], scores[2:][index]) for index in selected.indices]
        threshold = min(selection.threshold(score) for score in scores[:2])
        assert all(text and text not in passages[:2] and score < threshold for text, score in negatives)
        assert len({text for text, _ in negatives}) == len(negatives) <= 5
        assert len(negatives) + sum(selected.removed.values()) == 38
        num_taken += len(negatives)
    assert num_taken > 200


@pytest.mark.parametrize("score", [math.nan, -math.inf, math.inf])
def test_a_score_that_is_not_finite_is_an_error(score):
    with pytest.raises(ValueError, match=rf"the score of candidates\[1\] is {score} and has no rank"):
        select([1.0], [0.0, score])
    with pytest.raises(ValueError, match=r"the score of positives\[0\]"):
        select([score], [0.0])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"num_negatives": 0}, "num_negatives must be an int above 0, got 0"),
        ({"absolute_margin": math.nan}, "absolute_margin must be a finite number, got nan"),
        ({"relative_margin": 0.0}, "relative_margin must be above 0 and at most 1"),
        ({"relative_margin": 1.05}, "relative_margin must be above 0 and at most 1"),
        ({"skip_top": -1}, "skip_top must be an int of 0 or more, got -1"),
        ({"max_score": math.inf}, "max_score must be None or a finite number, got inf"),
        ({"sampling": "best"}, "sampling must be one of top, random, got 'best'"),
    ],
)
def test_rules_are_checked(rules, message):
    with pytest.raises(ValueError, match=message):
        Selection(**rules)


def test_jaccard_of_shingles_by_hand():
    first = make_shingles(tuple("abcdefghijkl"))  # 10 shingles
    assert len(first) == 10
    second = make_shingles(tuple("abcdefghijk"))  # the first 9 of them: 9 / 10
    assert are_near_duplicates(first, second)
    assert are_near_duplicates(second, first)
    third = make_shingles(tuple("abcdefghijkx"))  # 9 shared of 11
    assert not are_near_duplicates(first, third)
    assert make_shingles(("one", "two")) == {("one", "two")}


def test_words_of_many_scripts():
    assert split_words("Don't STOP—now_2") == ("don", "t", "stop", "now", "2")
    assert split_words("巴黎在法国。") == tuple("巴黎在法国")
    assert split_words("कि") != split_words("की")  # they differ in a vowel sign alone
    assert split_words("Straße") == split_words("STRASSE")
    assert split_words("🐝 !?") == ()


def teacher(**kwargs):
    return CrossEncoder(make_model(**kwargs), make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"), max_length=48)


ROWS = [
    {
        "id": number,
        "question": f"where is the {word}?",
        "pos_doc": f"The {word} is here." if number % 2 else [{"text": f"The {word} is here.", "title": word}],
        "neg_doc": [f"The {other} is not {word}." for other in WORDS if other != word],
        "extra": {"list": [1.5, None, "Zürich"]},
    }
    for number, word in enumerate(WORDS)
]


def test_rows_keep_their_fields_and_get_the_teachers_logits():
    cross_encoder = teacher()
    cross_encoder.activation_fn = torch.nn.Sigmoid()  # not used: the scores are logits
    mined = list(mine_negatives(cross_encoder, iter(ROWS), EVERYTHING, window_pairs=25))
    assert len(mined) == len(ROWS)
    num_negatives = 0
    for source, row in zip(ROWS, mined, strict=True):
        fields = row.fields
        assert {name: fields[name] for name in source if name != "neg_doc"} == {
            name: value for name, value in source.items() if name != "neg_doc"
        }
        pairs = [(source["question"], text) for text in (f"The {WORDS[source['id']]} is here.", *source["neg_doc"])]
        scores = cross_encoder.predict(pairs, activation_fn=torch.nn.Identity())
        np.testing.assert_allclose(fields["pos_score"], scores[:1], rtol=1e-5)
        below = {text: score for text, score in zip(source["neg_doc"], scores[1:], strict=True) if score < scores[0]}
        assert fields["neg_doc"] == sorted(below, key=lambda text: -below[text])
        np.testing.assert_allclose(fields["neg_score"], sorted(below.values(), reverse=True), rtol=1e-5)
        assert row.num_candidates == 9 == len(below) + sum(row.removed.values())
        num_negatives += len(below)
    assert 10 < num_negatives < 80


def test_windows_do_not_change_what_is_mined():
    def mine(window_pairs):
        return [row.fields for row in mine_negatives(teacher(), ROWS, window_pairs=window_pairs)]

    for row, expected in zip(mine(1), mine(10_000), strict=True):
        assert row["neg_doc"] == expected["neg_doc"]
        np.testing.assert_allclose(row["neg_score"], expected["neg_score"], rtol=1e-4)


def test_candidates_that_are_objects_stay_objects():
    best, *others = (result["text"] for result in teacher().rank("q", WORDS, return_documents=True))
    candidates = [{"text": word, "id": number} for number, word in enumerate(others)]
    row = {"query": "q", "pos_doc": best, "neg_doc": candidates[::-1], "neg_score": [0.0] * 9, "pos_score": 1.0}
    [mined] = mine_negatives(teacher(), [row], EVERYTHING)
    assert mined.fields["neg_doc"] == candidates


def test_a_bad_row_or_teacher_is_named():
    with pytest.raises(ValueError, match="row 1: pos_doc is missing"):
        list(mine_negatives(teacher(), [ROWS[0], {"query": "q"}]))
    with pytest.raises(ValueError, match="mining needs one score per pair, but the model has 3 labels"):
        list(mine_negatives(teacher(num_labels=3), ROWS))
    broken = teacher()
    broken.model.score.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match=r"row 0: the score of positives\[0\] is nan"):
        list(mine_negatives(broken, ROWS))


def read(path):
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


CORPUS = [{"_id": f"d{number}", "title": word, "text": f"The {word} is here."} for number, word in enumerate(WORDS)]
SHORT_ROWS = [
    {"query_id": f"q{number}", "query": f"where is the {word}?", "pos_doc": [f"{word} The {word} is here."]}
    for number, word in enumerate(WORDS)
]


@pytest.fixture
def files(tmp_path):
    write(tmp_path / "rows.jsonl", lines(*SHORT_ROWS))
    write(tmp_path / "corpus.jsonl.gz", lines(*CORPUS))
    return tmp_path


def test_candidates_of_a_run(files, reranker_checkpoint):
    run = [f"q{query} Q0 d{(query + rank) % 10} {rank} {-rank} x" for query in range(9) for rank in (3, 0, 1, 2)]
    write(files / "run.trec", "\n".join(run) + "\n")
    arguments = {
        "corpus": files / "corpus.jsonl.gz",
        "run": files / "run.trec",
        "selection": EVERYTHING,
        "keep_empty": True,
    }
    result = mine_file(str(reranker_checkpoint), files / "rows.jsonl", files / "out.jsonl", **arguments)
    # The first of the four is the positive, which is there by its text; the last query is not in the run.
    assert (result.num_rows, result.num_written, result.num_candidates) == (10, 10, 36)
    assert result.removed["positive"] == 9
    rows = read(files / "out.jsonl")
    for number, row in enumerate(rows[:9]):
        listed = {f"{WORDS[(number + rank) % 10]} The {WORDS[(number + rank) % 10]} is here." for rank in (1, 2, 3)}
        assert set(row["neg_doc"]) <= listed
    assert rows[9]["neg_doc"] == rows[9]["neg_score"] == []
    assert str(files / "rows.jsonl:10") in result.without_negatives
    shallow = mine_file(str(reranker_checkpoint), files / "rows.jsonl", files / "2.jsonl", depth=2, **arguments)
    assert (shallow.num_candidates, shallow.removed["positive"]) == (18, 9)


def test_positives_are_known_by_identifier_and_from_other_rows_of_the_query(files, reranker_checkpoint):
    rows = [
        {"_id": 1, "query": "where?", "pos_doc": [{"id": "d0", "text": "Here."}]},
        {"_id": 2, "query": "where?", "pos_doc": ["sun The sun is here.", {"_id": "d1", "text": "There."}]},
    ]
    write(files / "rows.jsonl", lines(*rows))
    run = [f"{query} Q0 d{rank} {rank} 0 x" for query in (1, 2) for rank in range(5)]
    write(files / "run.trec.gz", "\n".join(run) + "\n")
    result = mine_file(
        str(reranker_checkpoint),
        files / "rows.jsonl",
        files / "out.jsonl",
        corpus=files / "corpus.jsonl.gz",
        run=files / "run.trec.gz",
        keep_empty=True,
    )
    assert (result.num_candidates, result.removed["positive"]) == (6, 2)  # d0 and d1 by identifier, d3 by its text
    for row in read(files / "out.jsonl"):
        assert not {"bees The bees is here.", "hive The hive is here.", "sun The sun is here."} & {*row["neg_doc"]}


def test_candidates_of_bm25(files, reranker_checkpoint):
    pytest.importorskip("bm25s")
    rows = [
        {"query": "bees clover", "pos_doc": ["something else"]},
        {"query": "unknown words", "pos_doc": ["something else"]},
        {"query": "bees", "pos_doc": ["something else"], "neg_doc": ["The row has its own."]},
    ]
    write(files / "rows.jsonl", lines(*rows))
    model, arguments = str(reranker_checkpoint), {"corpus": files / "corpus.jsonl.gz", "keep_empty": True}
    result = mine_file(model, files / "rows.jsonl", files / "out.jsonl", **arguments)
    assert result.num_candidates == 3  # two documents of BM25, none, and the row's own
    rows = read(files / "out.jsonl")
    assert {*rows[0]["neg_doc"]} <= {"bees The bees is here.", "clover The clover is here."}
    assert {*rows[2]["neg_doc"]} <= {"The row has its own."}
    own = mine_file(model, files / "rows.jsonl", files / "own.jsonl", candidates="neg_doc", keep_empty=True)
    assert own.num_candidates == 1
    searched = mine_file(model, files / "rows.jsonl", files / "bm25.jsonl", candidates="bm25", **arguments)
    assert searched.num_candidates == 3
    assert {*read(files / "bm25.jsonl")[2]["neg_doc"]} <= {"bees The bees is here."}


@pytest.mark.parametrize("has_run", [True, False])
def test_a_beir_folder(has_run, tmp_path, reranker_checkpoint):
    pytest.importorskip("bm25s")
    folder = tmp_path / "beir"
    write(folder / "corpus.jsonl", lines(*CORPUS))
    write(folder / "queries.jsonl", lines({"_id": "q1", "text": "bees hive"}, {"_id": "q2", "text": "sun"}))
    write(folder / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore\nq2\td3\t1\nq1\td0\t1\nq1\td2\t2\nq2\td4\t0\n")
    if has_run:
        write(folder / "run.bm25.trec", "".join(f"q{q} Q0 d{d} {d} 0 x\n" for q in (1, 2) for d in range(6)))
    result = mine_file(str(reranker_checkpoint), folder, tmp_path / "out.jsonl", keep_empty=True, selection=EVERYTHING)
    rows = read(tmp_path / "out.jsonl")
    assert [(row["query_id"], row["query"]) for row in rows] == [("q2", "sun"), ("q1", "bees hive")]
    assert rows[1]["pos_doc"] == ["bees The bees is here.", "clover The clover is here."]
    assert len(rows[1]["pos_score"]) == 2
    assert rows[1]["pos_relevance"] == [1.0, 2.0]
    assert "pos_relevance" not in rows[0]
    # Six documents of the run or those that BM25 finds, without d3, and without d0 and d2.
    assert result.num_candidates == ((6 - 1) + (6 - 2) if has_run else 0 + 1)


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        (
            "q1\td0\t1\nq1\td0\t2\n",
            r"qrels\.tsv:3: score: the document 'd0' of query 'q1' is judged 2 here and 1 in line 2",
        ),
        ("q9\td0\t1\n", r"qrels\.tsv:2: query-id: there is no query 'q9' in .*queries\.jsonl"),
        ("q1\td99\t1\n", r"qrels\.tsv:2: corpus-id: there is no document 'd99' in .*corpus\.jsonl"),
        ("q1\td0\t0\n", r"qrels\.tsv: no query has a relevant document, one with a score of 1 or more"),
    ],
)
def test_errors_of_a_beir_folder(qrels, message, tmp_path, reranker_checkpoint):
    write(tmp_path / "corpus.jsonl", lines(*CORPUS))
    write(tmp_path / "queries.jsonl", lines({"_id": "q1", "text": "bees"}))
    write(tmp_path / "qrels.tsv", "query-id\tcorpus-id\tscore\n" + qrels)
    with pytest.raises(ValueError, match=message):
        mine_file(str(reranker_checkpoint), tmp_path, tmp_path / "out.jsonl")
    write(tmp_path / "qrels.tsv", "query-id\tcorpus-id\tscore\nq1\td0\t1\n")
    with pytest.raises(ValueError, match="corpus must not be given for a BEIR folder, which has its own"):
        mine_file(str(reranker_checkpoint), tmp_path, tmp_path / "out.jsonl", corpus=tmp_path / "corpus.jsonl")


def test_a_corpus_id_file_keeps_its_fields(tmp_path, reranker_checkpoint):
    write(tmp_path / "corpus" / "merlin_metadata.json", '{"class": "TextQADataset", "corpus_id": "c"}')
    write(tmp_path / "corpus" / "train.jsonl", lines(*({"id": row["_id"], "text": row["text"]} for row in CORPUS)))
    row = {
        "question_id": "q",
        "question": "bees?",
        "corpus_id": "c",
        "pos_doc": [{"id": "d0"}],
        "neg_doc": ["d1", "d2"],
    }
    write(tmp_path / "rows.json", json.dumps({"corpus": {"path": "corpus"}, "data": [{**row, "note": [1]}]}))
    mine_file(str(reranker_checkpoint), tmp_path / "rows.json", tmp_path / "out.jsonl", keep_empty=True)
    [mined] = read(tmp_path / "out.jsonl")
    assert mined == {
        **row,
        "note": [1],
        "pos_doc": ["The bees is here."],
        "neg_doc": mined["neg_doc"],
        "pos_score": mined["pos_score"],
        "neg_score": mined["neg_score"],
    }
    assert {*mined["neg_doc"]} <= {"The hive is here.", "The clover is here."}


def test_plain_and_compressed_rows_are_the_same(tmp_path, reranker_checkpoint):
    source = write(tmp_path / "rows.jsonl", lines(*ROWS))
    for name in ("out.jsonl", "out.jsonl.gz"):
        mine_file(str(reranker_checkpoint), source, tmp_path / name, window_pairs=16)
    assert gzip.decompress((tmp_path / "out.jsonl.gz").read_bytes()) == (tmp_path / "out.jsonl").read_bytes()


def test_an_output_is_replaced_only_with_overwrite(tmp_path, reranker_checkpoint):
    source, output = write(tmp_path / "rows.jsonl", lines(*ROWS)), write(tmp_path / "out.jsonl", "mine\n")
    with pytest.raises(FileExistsError, match=r"out\.jsonl' exists: pass overwrite \(--overwrite\) to replace it"):
        mine_file(str(reranker_checkpoint), source, output)
    assert output.read_text() == "mine\n"
    mine_file(str(reranker_checkpoint), source, output, overwrite=True)
    assert len(read(output)) > 3
    with pytest.raises(ValueError, match=r"output and the source's rows\.jsonl must be two files"):
        mine_file(str(reranker_checkpoint), source, source, overwrite=True)


def test_rows_without_a_negative_are_counted_and_named(tmp_path, reranker_checkpoint):
    same = {"query": "q", "pos_doc": ["One."], "neg_doc": ["one", "ONE!"]}
    source = write(tmp_path / "rows.jsonl", lines(*ROWS, same))
    result = mine_file(str(reranker_checkpoint), source, tmp_path / "out.jsonl", selection=EVERYTHING)
    assert result.num_rows == 11
    assert f"{source}:11" in result.without_negatives
    assert result.num_written == 11 - len(result.without_negatives) == len(read(tmp_path / "out.jsonl"))
    assert result.num_candidates == 92 == result.num_negatives + sum(result.removed.values())
    assert "rows without a negative, left out (--keep-empty writes them): " in result.format()
    kept = mine_file(str(reranker_checkpoint), source, tmp_path / "all.jsonl", keep_empty=True)
    assert (kept.num_written, read(tmp_path / "all.jsonl")[-1]["neg_doc"]) == (11, [])
    write(source, lines(same))
    with pytest.raises(
        ValueError, match=r"rows\.jsonl: no candidate of any row passed, and nothing was written: 1 row"
    ):
        mine_file(str(reranker_checkpoint), source, tmp_path / "none.jsonl")
    assert not list(tmp_path.glob("none*"))


def test_lone_surrogates_in_other_fields_survive(tmp_path, reranker_checkpoint):
    source = write(tmp_path / "rows.jsonl", '{"note": "\\ud800", "query": "q", "pos_doc": "a", "neg_doc": ["b"]}\n')
    mine_file(str(reranker_checkpoint), source, tmp_path / "out.jsonl", keep_empty=True)
    assert read(tmp_path / "out.jsonl")[0]["note"] == "\ud800"


def test_a_positive_behind_its_title_is_no_negative():
    candidates = ["Bees Honey bees live in a hive.", "Honey bees live in a hive of wax.", "He went to Paris."]
    selected = select_negatives(["Honey bees live in a hive.", "Paris"], [9.0, 9.0], candidates, [1.0] * 3, EVERYTHING)
    assert selected.indices == [1, 2]
    assert selected.removed["positive"] == 1


def test_bm25_mines_a_beir_folder_of_several_runs(tmp_path, reranker_checkpoint):
    write(tmp_path / "corpus.jsonl", lines(*({"_id": f"d{n}", "text": f"bees {word}"} for n, word in enumerate(WORDS))))
    write(tmp_path / "queries.jsonl", lines({"_id": "q", "text": "bees"}))
    write(tmp_path / "qrels.tsv", "query-id\tcorpus-id\tscore\nq\td1\t1\n")
    for name in ("run.a.trec", "run.b.trec"):
        write(tmp_path / name, "q Q0 d1 1 1 t\n")
    result = mine_file(
        str(reranker_checkpoint), tmp_path, tmp_path / "out.jsonl", candidates="bm25", selection=EVERYTHING
    )
    assert (result.num_rows, result.num_candidates) == (1, len(WORDS) - 1)


def test_a_negative_that_has_the_id_of_a_positive_is_none(tmp_path, reranker_checkpoint):
    row = {
        "query": "q",
        "pos_doc": [{"id": "1", "text": "Bees fly."}],
        "neg_doc": [{"id": "1", "text": "Bees fly, and more of it."}, {"id": "2", "text": "The garden."}],
    }
    write(tmp_path / "rows.jsonl", lines(row))
    result = mine_file(
        str(reranker_checkpoint), tmp_path / "rows.jsonl", tmp_path / "out.jsonl", keep_empty=True, selection=EVERYTHING
    )
    assert result.num_candidates == 1

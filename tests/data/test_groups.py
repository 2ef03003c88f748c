import math
import pickle

import pytest
import torch
from helpers import lines, write
from torch.utils.data import DataLoader

from llama_bidir.data import FixedGroups, GroupCollator, GroupDataset, Grouping, GroupStream, TrainingRow
from llama_bidir.data.arrow import are_valid, row_features
from llama_bidir.prompts import PromptEncoder

ROW = TrainingRow("q", ["p0", "p1"], ["n0", "p1", "n1", "n2", "n3"])


def group(row=ROW, *, epoch=0, key="", positive=None, **kwargs):
    return Grouping(**kwargs).group(row, "here", epoch=epoch, key=key, positive=positive)


def test_a_group_is_one_positive_and_negatives_that_are_not_positives():
    for epoch in range(20):
        passages = group(group_size=3, epoch=epoch)["passages"]
        assert passages[0] == ("p0", "p1")[epoch % 2]
        assert len(passages) == 3
        assert set(passages[1:]) < {"n0", "n1", "n2", "n3"}


def test_each_epoch_has_its_own_draw_of_negatives():
    draws = [tuple(group(group_size=3, epoch=epoch)["passages"][1:]) for epoch in range(20)]
    assert draws == [tuple(group(group_size=3, epoch=epoch)["passages"][1:]) for epoch in range(20)]
    assert len(set(draws)) > 3
    assert all(draw == tuple(sorted(draw)) for draw in draws)  # in the order of the row
    assert draws != [tuple(group(group_size=3, epoch=epoch, seed=7)["passages"][1:]) for epoch in range(20)]
    assert draws != [tuple(group(group_size=3, epoch=epoch, key="other")["passages"][1:]) for epoch in range(20)]


def test_first_negatives():
    assert group(group_size=3, negatives="first", epoch=5)["passages"] == ["p1", "n0", "n1"]


def test_short_groups_are_smaller_or_repeat():
    row = TrainingRow("q", ["p"], ["n0", "n1"])
    assert group(row, group_size=6)["passages"] == ["p", "n0", "n1"]
    assert group(row, group_size=6, short_groups="repeat")["passages"] == ["p", "n0", "n1", "n0", "n1", "n0"]
    assert group(row, group_size=1)["passages"] == ["p"]


def test_whole_groups_have_every_passage():
    whole = group(group_size=None)
    assert whole["passages"] == ["p0", "p1", "n0", "n1", "n2", "n3"]
    assert whole["labels"] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_teacher_scores_follow_their_passages():
    row = TrainingRow("q", ["p0", "p1"], ["n0", "p0", "n1"], [5.0, 4.0], [1.0, 5.0, 2.0])
    assert group(row, group_size=3, epoch=1)["teacher_scores"] == [4.0, 1.0, 2.0]
    assert group(row, group_size=None)["teacher_scores"] == [5.0, 4.0, 1.0, 2.0]
    assert group(group_size=3)["teacher_scores"] is None


def test_a_row_without_a_negative_is_named():
    for negatives in ([], ["p"]):
        with pytest.raises(
            ValueError, match=r"here: the row has no neg_doc that is not one of its positives.*of 4 need"
        ):
            group(TrainingRow("q", ["p"], negatives), group_size=4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"group_size": 2, "positives": "any"}, "positives must be one of cycle, expand, all, got 'any'"),
        ({"group_size": 2, "negatives": "x"}, "negatives must be one of sample, first"),
        ({"group_size": 2, "short_groups": "x"}, "short_groups must be one of mask, repeat"),
    ],
)
def test_invalid_groupings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Grouping(**kwargs)


def rows(name, count, num_positives=1):
    return [
        {"query": f"{name}{i}", "pos_doc": [f"p{j}" for j in range(num_positives)], "neg_doc": ["n"]}
        for i in range(count)
    ]


def queries(dataset):
    return [dataset[index]["query"] for index in range(len(dataset))]


def test_weights_mix_sources():
    dataset = GroupDataset([(rows("a", 4), 1.0), (rows("b", 4), 2.5), (rows("c", 6), 0.5)], Grouping(group_size=2))
    assert len(dataset) == 4 + 10 + 3
    seen = []
    for epoch in range(12):
        dataset.set_epoch(epoch)
        shown = queries(dataset)
        assert shown[:4] == ["a0", "a1", "a2", "a3"]
        assert shown[4:12] == ["b0", "b1", "b2", "b3"] * 2
        assert len(set(shown[12:14])) == 2
        assert len(set(shown[14:])) == 3
        seen.append(tuple(shown[14:]))
    for first, second in zip(seen[::2], seen[1::2], strict=True):  # each epoch shows the other half
        assert {*first, *second} == {f"c{i}" for i in range(6)}
    assert len(set(seen)) > 2


def test_expand_makes_a_group_of_each_positive():
    data = [*rows("a", 1, 3), *rows("b", 1, 1), *rows("c", 1, 2)]
    dataset = GroupDataset([(data, 1.0)], Grouping(group_size=2, positives="expand"))
    shown = [(dataset[index]["query"], dataset[index]["passages"][0]) for index in range(len(dataset))]
    assert shown == [("a0", "p0"), ("a0", "p1"), ("a0", "p2"), ("b0", "p0"), ("c0", "p0"), ("c0", "p1")]


def test_a_group_may_have_all_positives_with_their_relevance():
    row = TrainingRow("q", ["p0", "p1", "p2"], ["n0", "n1", "n2"], relevance=[1.0, 3.0, 2.0])
    whole = group(row, group_size=5, positives="all", negatives="first")
    assert whole["passages"] == ["p0", "p1", "p2", "n0", "n1"]
    assert whole["labels"] == [1.0, 3.0, 2.0, 0.0, 0.0]
    drawn = set()
    for epoch in range(20):
        small = group(row, group_size=3, positives="all", epoch=epoch)
        assert small["labels"][2] == 0.0
        assert dict(zip(row.positives, row.relevance, strict=True)).items() >= set(
            zip(small["passages"][:2], small["labels"][:2], strict=True)
        )
        drawn.add(tuple(small["passages"][:2]))
    assert drawn == {("p0", "p1"), ("p0", "p2"), ("p1", "p2")}
    assert group(row, group_size=1, positives="all", epoch=1)["labels"] == [3.0]
    for positives in ("cycle", "expand"):
        assert group(row, group_size=2, positives=positives, epoch=2)["labels"] == [2.0, 0.0]


def test_indices_weights_and_rows_are_checked():
    dataset = GroupDataset([(rows("a", 2), 1.0)], Grouping(group_size=2))
    with pytest.raises(IndexError, match="there is no group 2: the dataset has 2"):
        dataset[2]
    for weight in (0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="the weight of a source must be above 0"):
            GroupDataset([(rows("a", 2), weight)], Grouping(group_size=2))
    for sources in ([], [([], 1.0)]):
        with pytest.raises(ValueError, match="there is no row to make a group of"):
            GroupDataset(sources, Grouping(group_size=2))
    with pytest.raises(ValueError, match="row 1 of source 0: query"):
        GroupDataset([([rows("a", 1)[0], {"pos_doc": "p"}], 1.0)], Grouping(group_size=2))[1]


SCORED = {"query": "q", "pos_doc": ["p0", "p1"], "neg_doc": ["n"], "pos_score": [2.0, 1.0], "neg_score": [0.5]}
PLAIN = {**SCORED, "pos_score": None, "neg_score": None}
GRADED = {**SCORED, "pos_relevance": [3.0, 2.0]}


def as_loaded(*rows):
    """Rows in the columns of `load_rows`, unchecked."""
    datasets = pytest.importorskip("datasets")
    features = row_features("string")
    for name in features.keys() - rows[0].keys():
        features.pop(name)
    return datasets.Dataset.from_list(list(rows), features=features)


def test_rows_that_load_rows_has_checked_give_the_groups_of_parsed_rows(load, folder):
    write(folder / "rows.jsonl", lines(SCORED, PLAIN, {}, {**SCORED, "pos_doc": ["p2"], "pos_score": [3]}, PLAIN))
    loaded = load("rows.jsonl", skip_bad_rows=True)
    for rows in (loaded, loaded.select([2, 0]), as_loaded(SCORED, PLAIN), as_loaded(GRADED)):
        assert are_valid(rows)
        for positives in ("cycle", "expand", "all"):
            grouping = Grouping(group_size=2, positives=positives)
            trusted, parsed = (GroupDataset([(each, 1.5)], grouping) for each in (rows, list(rows)))
            assert list(map(trusted.__getitem__, range(len(trusted)))) == [
                parsed[index] for index in range(len(parsed))
            ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query": None}, r"query \(or question\) must be a string"),
        ({"pos_doc": [], "pos_score": []}, "pos_doc must hold at least one passage"),
        ({"pos_doc": None}, "pos_doc is missing"),
        ({"neg_doc": [None]}, r"neg_doc\[0\] must be a string"),
        ({"pos_score": [1.0]}, "pos_score must hold one number for each of the 2 passages"),
        ({"neg_score": [math.nan]}, r"neg_score\[0\] must be a finite number"),
        ({"pos_score": None}, "pos_score is missing although neg_score is given"),
        ({"pos_relevance": [1.0, 0.0]}, r"pos_relevance\[1\] must be a number above 0"),
        ({"pos_relevance": [1.0]}, "pos_relevance must hold one number for each of the 2 passages"),
    ],
)
def test_rows_in_the_same_columns_are_parsed_when_one_is_invalid(fields, message):
    rows = as_loaded(GRADED, {**GRADED, **fields})
    assert not are_valid(rows)
    dataset = GroupDataset([(rows, 1.0)], Grouping(group_size=2))
    assert dataset[0]["teacher_scores"] == [2.0, 0.5]
    with pytest.raises(ValueError, match=f"^row 1 of source 0: {message}"):
        dataset[1]


def test_rows_of_other_types_are_parsed():
    rows = as_loaded(SCORED)
    for other in ([SCORED], rows.with_format("numpy"), rows.remove_columns("neg_score"), rows.select_columns("query")):
        assert not are_valid(other)
    assert GroupDataset([(rows.with_format("numpy"), 1.0)], Grouping(group_size=2))[0]["passages"] == ["p0", "n"]


def test_worker_processes_follow_the_epoch():
    data = [{"query": f"q{i}", "pos_doc": ["p0", "p1", "p2"], "neg_doc": ["n"]} for i in range(4)]
    dataset = GroupDataset([(data, 1.0)], Grouping(group_size=2))
    loader = DataLoader(dataset, batch_size=4, num_workers=1, persistent_workers=True, collate_fn=list)
    for epoch in range(3):
        dataset.set_epoch(epoch)
        assert [item["passages"][0] for batch in loader for item in batch] == [f"p{epoch}"] * 4


def test_weights_of_a_third_take_all_rows_in_three_epochs():
    dataset = GroupDataset([(rows("a", 7), 1 / 3)], Grouping(group_size=2))
    shown = []
    for epoch in range(7):
        dataset.set_epoch(epoch)
        shown += queries(dataset)
    assert sorted(shown) == sorted(f"a{i}" for i in range(7) for _ in range(2))


def test_workers_share_a_stream():
    data = [{"query": f"q{i}", "pos_doc": ["p"], "neg_doc": ["n"]} for i in range(7)]
    loader = DataLoader(GroupStream(data, Grouping(group_size=2)), batch_size=2, num_workers=2, collate_fn=list)
    assert sorted(group["query"] for batch in loader for group in batch) == [f"q{i}" for i in range(7)]


def test_fixed_groups_do_not_follow_the_epoch():
    data = [{"query": "q", "pos_doc": ["p0", "p1"], "neg_doc": ["n"]}]
    dataset = GroupDataset([(data, 1.0)], Grouping(group_size=2))
    fixed = FixedGroups(dataset)
    dataset.set_epoch(1)
    assert (dataset[0]["passages"][0], fixed[0]["passages"][0]) == ("p1", "p0")
    assert not hasattr(fixed, "set_epoch")


def test_streams_make_the_same_kind_of_groups():
    data = [{"query": f"q{i}", "pos_doc": ["p0", "p1"], "neg_doc": [f"n{j}" for j in range(5)]} for i in range(3)]
    stream = GroupStream(data, Grouping(group_size=3))
    first = list(stream)
    assert [item["query"] for item in first] == ["q0", "q1", "q2"]
    assert first == list(pickle.loads(pickle.dumps(stream)))
    stream.set_epoch(1)
    assert [item["passages"][0] for item in stream] == ["p1"] * 3
    expanded = list(GroupStream(data, Grouping(group_size=3, positives="expand")))
    assert [item["passages"][0] for item in expanded] == ["p0", "p1"] * 3


def test_collator_pads_groups_and_packs_pairs(tokenizer):
    encoder = PromptEncoder(tokenizer, prompt_template="{query}|{passage}", max_length=64)
    groups = [
        {"query": "a", "passages": ["bc", "d", "e"], "labels": [1.0, 0.0, 0.0], "teacher_scores": [3.0, 2.0, 1.0]},
        {"query": "f", "passages": ["g"], "labels": [1.0], "teacher_scores": [4.0]},
    ]
    ids = tokenizer(["a|bc", "a|d", "a|e", "f|g"])["input_ids"]
    padded, packed = (GroupCollator(encoder, packed=is_packed)(groups) for is_packed in (False, True))
    for batch in (padded, packed):
        assert next(iter(batch)) == "labels"  # the Trainer counts groups by the first tensor
        assert batch["labels"].tolist() == [[1.0, 0.0, 0.0], [1.0, -100.0, -100.0]]
        assert batch["teacher_scores"].tolist() == [[3.0, 2.0, 1.0], [4.0, -100.0, -100.0]]
    longest = max(map(len, ids))
    assert padded["attention_mask"].tolist() == [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
    assert packed["input_ids"].tolist() == [[token for row in ids for token in row]]
    assert packed["cu_seq_lens_q"].tolist() == torch.tensor([0, *map(len, ids)]).cumsum(0).tolist()
    groups[1]["teacher_scores"] = None
    assert GroupCollator(encoder)(groups)["teacher_scores"].isnan().tolist() == [[False] * 3, [True, False, False]]
    with pytest.raises(ValueError, match="the row of query 'f' has no teacher scores, which the loss needs"):
        GroupCollator(encoder, needs_teacher=True)(groups)


def test_collator_says_once_that_it_cuts(tokenizer, caplog):
    collator = GroupCollator(PromptEncoder(tokenizer, prompt_template="{query}|{passage}", max_length=8))
    groups = [{"query": "a", "passages": ["b" * 50, "c"], "labels": [1.0, 0.0], "teacher_scores": None}]
    collator(groups)
    collator(groups)
    assert [record.getMessage() for record in caplog.records] == [
        "1 of the 2 pairs of a batch were longer than 8 tokens and were cut to fit: raise rerank_max_length to keep "
        "more (said once)"
    ]

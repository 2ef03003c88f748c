"""Rows without a negative are refused wherever groups are ranked, by one rule."""

import re

import pytest
from helpers import ROWS, arguments, losses, make_model, make_tokenizer

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

from llama_bidir import CrossEncoderTrainer, CrossEncoderTrainingArguments  # noqa: E402
from llama_bidir.data import FixedGroups, GroupDataset, Grouping, GroupStream  # noqa: E402


def make_trainer(path, rows=ROWS, eval_rows=None, *, trainer_fields=None, **kwargs):
    return CrossEncoderTrainer(
        make_model(),
        arguments(CrossEncoderTrainingArguments, path, **kwargs),
        rows,
        eval_rows,
        make_tokenizer(eos_token="<|end|>", pad_token="<|pad|>"),
        **{"group_size": 4, **(trainer_fields or {})},
    )


BARE = {"query": "q", "pos_doc": ["p"], "neg_doc": ["p"]}


@pytest.mark.parametrize("eval_group_size", [None, 3])
@pytest.mark.parametrize("kind", ["list", "dataset", "stream", "mapping", "groups", "group stream"])
def test_evaluation_rows_without_a_negative_are_refused_before_training(kind, eval_group_size, tmp_path):
    rows, grouping = [*ROWS[:2], BARE], Grouping.for_evaluation(eval_group_size)
    dataset = {
        "list": tuple(rows),
        "dataset": datasets.Dataset.from_list(rows),
        "stream": datasets.Dataset.from_list(rows).to_iterable_dataset(),
        "mapping": {"first": ROWS[:2], "second": rows},
        "groups": GroupDataset([(rows, 1.0)], grouping, names=["source 0"]),
        "group stream": GroupStream(rows, grouping),
    }[kind]
    size = "all passages of a row" if eval_group_size is None else eval_group_size
    where = "row 2 of the stream" if kind == "group stream" else "row 2 of source 0"
    message = (
        f"{where}: the row has no neg_doc that is not one of its positives, but groups of {size} need at least one"
    )
    fields = {"eval_group_size": eval_group_size, "group_size": 1}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_trainer(tmp_path, ROWS, dataset, trainer_fields=fields, loss="binary_cross_entropy")
    trainer = make_trainer(tmp_path, ROWS, trainer_fields=fields, loss="binary_cross_entropy")
    if kind != "mapping":
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            trainer.evaluate(dataset)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            trainer.predict(dataset)


def test_evaluation_in_groups_of_one_passage_is_refused(tmp_path):
    message = "eval_group_size must be None or at least 2: a group of one passage is always ranked perfectly"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_trainer(tmp_path, ROWS, ROWS[:2], trainer_fields={"eval_group_size": 1})
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_trainer(tmp_path, ROWS, GroupDataset([(ROWS, 1.0)], Grouping(group_size=1)))
    group = {"query": "q", "passages": ["p", "r"], "labels": [1.0, 2.0], "teacher_scores": None}
    with pytest.raises(ValueError, match=r"^group 0 has no passage with label 0, so it would always be"):
        FixedGroups([group])


def test_training_without_negatives_takes_a_loss_of_single_passages(tmp_path):
    """`group_size=1` is the one case in which a row needs no negative."""
    trainer = make_trainer(tmp_path, [BARE] * 4, trainer_fields={"group_size": 1}, loss="binary_cross_entropy")
    trainer.train()
    assert losses(trainer)[0] > 0
    for stream in (GroupStream([BARE], Grouping(group_size=2)), [BARE] * 4):
        with pytest.raises(ValueError, match=r"row 0 of .*: the row has no neg_doc that is not one of its positives"):
            make_trainer(tmp_path, stream, train_sampling_strategy="sequential").train()

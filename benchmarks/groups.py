"""Chooses the groups that all trainers train alike."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llama_bidir.data import load_rows, parse_row

from .models import SEED
from .peers import prompt_halves, render
from .trainers import Group


def choose_batches(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, steps: int, groups: int, group_size: int, max_length: int
) -> tuple[list[list[Group]], dict[str, Any]]:
    """Returns batches of `groups` groups for a task of `steps` timed steps, and the numbers of [`choose_groups`]."""
    # One batch more than is trained, because the next batch is built while one is trained.
    count = (steps + 2) * groups
    chosen, rows = choose_groups(path, tokenizer, count=count, group_size=group_size, max_length=max_length)
    return [chosen[start : start + groups] for start in range(0, count, groups)], rows


def choose_groups(
    path: Path, tokenizer: PreTrainedTokenizerBase, *, count: int, group_size: int, max_length: int
) -> tuple[list[Group], dict[str, Any]]:
    """
    Draws rows by a seed and makes a group of each: its first positive and its first negatives.

    A row is used only if all implementations train it alike:
    - No pair is cut, because sentence-transformers truncates the longer text of a pair and this package the passage.
    - All groups have the same number of passages, because sentence-transformers averages over the pairs of a batch and
      this package over groups.
    - A pair has the same tokens whether it is rendered or given in two halves.

    Returns:
        `count` groups, and the numbers of rows that were looked at and left out for each reason.

    Raises:
        ValueError: there are too few such rows.
    """
    rows = load_rows(path)
    order = random.Random(SEED).sample(range(len(rows)), len(rows))
    groups: list[Group] = []
    left_out: Counter[str] = Counter(too_few_negatives=0, too_long=0, other_tokens=0)
    for index in order:
        if len(groups) == count:
            break
        row = parse_row(rows[index], f"{path}, row {index}")
        negatives = [passage for passage in row.negatives if passage not in row.positives][: group_size - 1]
        if len(negatives) < group_size - 1:
            left_out["too_few_negatives"] += 1
            continue
        passages = [row.positives[0], *negatives]
        pairs = [(row.query, passage) for passage in passages]
        input_ids = tokenizer([render(*pair) for pair in pairs], verbose=False)["input_ids"]
        lengths = [len(ids) for ids in input_ids]
        if max(lengths) > max_length:
            left_out["too_long"] += 1
        elif tokenizer(*map(list, zip(*prompt_halves(pairs), strict=True)))["input_ids"] != input_ids:
            left_out["other_tokens"] += 1
        else:
            groups.append(Group(row.query, passages, lengths))
    if len(groups) < count:
        raise ValueError(
            f"{path}: {count} groups are needed, but only {len(groups)} of {len(rows)} rows are usable "
            f"(left out: {dict(left_out)}); lower steps, groups or group_size, or raise max_length"
        )
    return groups, {"looked_at": len(groups) + left_out.total(), "taken": len(groups), "left_out": dict(left_out)}

"""From rows to groups: the positive and the negatives of a row that an epoch shows."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..fields_llama_bidir import check_instruction
from ..prompts import Pair
from .arrow import are_valid, have_negatives, iterate_column
from .rows import COLUMNS, TrainingRow, parse_row

POSITIVES = ("cycle", "expand", "all")
NEGATIVES = ("sample", "first")
SHORT_GROUPS = ("mask", "repeat")

Integers = np.ndarray[Any, np.dtype[np.int64]]


class Group(TypedDict):
    """
    A query and its passages, the positives first.

    Keys:
        labels: the relevance of a positive (1.0 unless the row says otherwise), 0.0 for a negative, aligned with
            `passages`.
        teacher_scores: aligned with `passages`; None when the row has none.
        instruction: the text for the `{instruction}` of the template, if the row has one.
    """

    query: str
    passages: list[str]
    labels: list[float]
    teacher_scores: list[float] | None
    instruction: NotRequired[str]


def pairs_of(group: Group) -> list[Pair]:
    """Returns the pairs of a group, in the order of its passages."""
    return [(group["query"], passage, group.get("instruction")) for passage in group["passages"]]


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """
    How a row becomes a group.

    Args:
        group_size: passages per group; None takes all positives and negatives of a row.
        positives: for a row with several positives: `cycle` takes the next one each epoch, `expand` makes one group per
            positive, `all` takes all of them, or draws as many as leave room for one negative.
        negatives: for a row with more negatives than fit: `sample` draws them anew each epoch, `first` takes the first
            ones.
        short_groups: for a row with fewer negatives than fit: `mask` makes a smaller group, `repeat` shows them again
            in turn.
        seed: of the draws.

    Raises:
        ValueError: a value is not one of these.
    """

    group_size: int | None
    positives: str = "cycle"
    negatives: str = "sample"
    short_groups: str = "mask"
    seed: int = 42

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1 (passages per query), got {self.group_size!r}")
        for name, known in (("positives", POSITIVES), ("negatives", NEGATIVES), ("short_groups", SHORT_GROUPS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @classmethod
    def for_evaluation(cls, group_size: int | None) -> "Grouping":
        """
        Returns the grouping for evaluation, which takes the first negatives of each row.

        Raises:
            ValueError: `group_size` is 1, so every group would be ranked perfectly.
        """
        if group_size == 1:
            raise ValueError(
                "eval_group_size must be None or at least 2: a group of one passage is always ranked perfectly"
            )
        return cls(group_size=group_size, negatives="first")

    @property
    def needs_negatives(self) -> bool:
        """Whether each row must have a negative: without one, a group has nothing to compare or to rank."""
        return self.group_size != 1

    @property
    def expands(self) -> bool:
        """Whether each positive of a row makes a group of its own."""
        return self.positives == "expand" and self.group_size is not None

    def group(self, row: TrainingRow, where: str, *, epoch: int, key: str, positive: int | None = None) -> Group:
        """
        Makes the group of a row.

        Args:
            row: the row. A negative that is also one of its positives is left out.
            where: the name of the row in errors.
            epoch: decides the positive and the draw of the negatives.
            key: distinguishes rows in the draw: the same key gives the same negatives in the same epoch.
            positive: the index of the positive; None lets the epoch decide.

        Raises:
            ValueError: the row has no negative, and `group_size` is not 1.
        """
        known = set(row.positives)
        negatives = [index for index, passage in enumerate(row.negatives) if passage not in known]
        if self.needs_negatives and not negatives:
            raise self.no_negatives(where)
        positives = list(range(len(row.positives)))
        if self.group_size is not None:
            draw = f"{self.seed} {epoch} {key}"
            if self.positives != "all" or self.group_size == 1:
                positives = [epoch % len(row.positives) if positive is None else positive]
            elif len(positives) > self.group_size - 1:
                positives = sorted(random.Random(f"positives {draw}").sample(positives, self.group_size - 1))
            negatives = self._choose(negatives, self.group_size - len(positives), draw)
        scores = None
        if row.positive_scores is not None and (row.negative_scores is not None or not negatives):
            scores = [row.positive_scores[index] for index in positives]
            scores += [row.negative_scores[index] for index in negatives] if row.negative_scores is not None else []
        relevance = [1.0 if row.relevance is None else row.relevance[index] for index in positives]
        group: Group = {
            "query": row.query,
            "passages": [row.positives[index] for index in positives] + [row.negatives[index] for index in negatives],
            "labels": relevance + [0.0] * len(negatives),
            "teacher_scores": scores,
        }
        if row.instruction is not None:
            group["instruction"] = row.instruction
        return group

    def no_negatives(self, where: str) -> ValueError:
        """Returns the error for a row that has no negatives, although its group needs one."""
        size = "all passages of a row" if self.group_size is None else str(self.group_size)
        return ValueError(
            f"{where}: the row has no neg_doc that is not one of its positives, but groups of {size} need at least one"
        )

    def _choose(self, negatives: list[int], count: int, draw: str) -> list[int]:
        if len(negatives) > count:
            if self.negatives == "first":
                return negatives[:count]
            return sorted(random.Random(draw).sample(negatives, count))
        if self.short_groups == "repeat":
            return [negatives[index % len(negatives)] for index in range(count)]
        return negatives


class GroupDataset(Dataset[Group]):
    """
    Groups of several sources of rows, mixed by weight.

    A source of n rows gives `round(weight * n)` groups per epoch. The whole part of the weight says how often all rows
    are shown. The rest of the weight is a share of the rows, taken in turn from a shuffle that goes through all of
    them. Every draw depends on the seed, the epoch and the row alone, so a run can be resumed, and any number of
    processes see the same groups.

    Args:
        sources: (rows, weight) pairs; rows are any sequence of mappings of the training schema. They are parsed when
            they are read (see [`parse_row`]), unless their Arrow columns show that they are valid (see [`are_valid`]).
        grouping: how rows become groups.
        names: the names of the sources in errors, such as their paths. The default is their numbers.

    Raises:
        ValueError: a weight is not above 0, or there is no row.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Sequence[Mapping[str, Any]], float]],
        grouping: Grouping,
        *,
        names: Sequence[str] | None = None,
    ):
        self.sources = list(sources)
        self.grouping = grouping
        self.names = [f"source {number}" for number in range(len(self.sources))] if names is None else list(names)
        for _, weight in self.sources:
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of a source must be above 0, got {weight!r}")
        self._are_valid = [are_valid(rows) for rows, _ in self.sources]
        # An entry is what one group is made of: a row, or one of its positives.
        self._positive_ends: list[Integers] = []
        num_entries = [len(rows) for rows, _ in self.sources]
        if grouping.expands:
            counts = [self._count_positives(source) for source in range(len(self.sources))]
            self._positive_ends = [np.cumsum(count, dtype=np.int64) for count in counts]
            num_entries = [sum(count) for count in counts]
        self._num_entries = num_entries
        sizes = [round(weight * n) for (_, weight), n in zip(self.sources, num_entries, strict=True)]
        self._ends: Integers = np.cumsum([0, *sizes], dtype=np.int64)
        # In shared memory, so that the worker processes of a DataLoader follow.
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()
        self._shuffles: dict[tuple[int, int], Integers] = {}
        if len(self) == 0:
            raise ValueError("there is no row to make a group of: give at least one source of rows")

    def set_epoch(self, epoch: int) -> None:
        """Chooses the positives, the negatives and the shares of sources of this epoch (from 0)."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """The epoch whose groups the items are."""
        return int(self._epoch)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Group:
        return self.group(index, self.epoch)

    def group(self, index: int, epoch: int) -> Group:
        """Returns the group of an index in an epoch."""
        if not 0 <= index < len(self):
            raise IndexError(f"there is no group {index}: the dataset has {len(self)}")
        source = int(np.searchsorted(self._ends, index, side="right")) - 1
        start, end = self._ends[source : source + 2].tolist()
        entries = self._num_entries[source]
        repetition, entry = divmod(index - start, entries)
        if repetition == int(self.sources[source][1]):  # the fractional part of the weight
            share = end - start - repetition * entries
            round_, entry = divmod(epoch * share + entry, entries)
            entry = int(self._shuffle(source, round_)[entry])
        row, positive = entry, None
        if self.grouping.expands:
            row = int(np.searchsorted(self._positive_ends[source], entry, side="right"))
            positive = entry - int(self._positive_ends[source][row - 1] if row else 0)
        return self.grouping.group(
            self._read(source, row),
            self._name(source, row),
            epoch=epoch,
            key=f"{source} {entry} {repetition}",
            positive=positive,
        )

    def check_negatives(self) -> None:
        """Raises ValueError for a row that has no negatives, although its group needs one. Makes no group."""
        for source, (rows, _) in enumerate(self.sources if self.grouping.needs_negatives else ()):
            if self._are_valid[source]:
                bare = np.flatnonzero(~have_negatives(rows))
            else:
                parsed = (self._read(source, row) for row in range(len(rows)))
                bare = np.array([row for row, each in enumerate(parsed) if set(each.negatives) <= set(each.positives)])
            if len(bare):
                raise self.grouping.no_negatives(self._name(source, int(bare[0])))

    def check_instructions(self, prompt_template: str) -> None:
        """Raises ValueError for a row with an instruction if the template has no field for it. Makes no group."""
        for source in range(len(self.sources)):
            for row, instruction in enumerate(self._instructions(source)):
                try:
                    check_instruction(instruction, prompt_template)
                except ValueError as error:
                    raise ValueError(f"{self._name(source, row)}: {error}") from None

    def num_characters(self) -> list[int]:
        """Returns the characters of each group's longest pair in this epoch, for batches of similar lengths."""
        groups = (self[index] for index in range(len(self)))
        return [len(group["query"]) + max(map(len, group["passages"])) for group in groups]

    def _read(self, source: int, row: int) -> TrainingRow:
        values = self.sources[source][0][row]
        if self._are_valid[source]:
            return TrainingRow(*[values.get(column) for column in COLUMNS])  # type: ignore[arg-type]
        return parse_row(values, self._name(source, row))

    def _name(self, source: int, row: int) -> str:
        return f"row {row} of {self.names[source]}"

    def _shuffle(self, source: int, round_: int) -> Integers:
        """The order in which a round goes through all entries of a source."""
        if (source, round_) not in self._shuffles:
            # An epoch is in two rounds at most.
            self._shuffles = {key: value for key, value in self._shuffles.items() if key != (source, round_ - 2)}
            generator = np.random.default_rng((self.grouping.seed, round_, source))
            self._shuffles[source, round_] = generator.permutation(self._num_entries[source])
        return self._shuffles[source, round_]

    def _instructions(self, source: int) -> Iterator[Any]:
        """Yields the instructions of a source. Rows that are read only when they are needed give none."""
        rows: Any = self.sources[source][0]
        columns = set(getattr(rows, "column_names", None) or ())
        name = "instruction" if "instruction" in columns else "prompt" if {"prompt", "pos"} <= columns else None
        if name is not None:
            for part in iterate_column(rows, name):
                yield from part.to_pylist()
        elif isinstance(rows, list | tuple):
            for number, row in enumerate(rows):
                has_one = isinstance(row, Mapping) and any(row.get(each) for each in ("instruction", "prompt"))
                yield self._read(source, number).instruction if has_one else None

    def _count_positives(self, source: int) -> list[int]:
        rows: Any = self.sources[source][0]
        if self._are_valid[source]:
            return [size for part in iterate_column(rows, "pos_doc") for size in part.value_lengths().to_pylist()]
        return [len(self._read(source, row).positives) for row in range(len(rows))]


class FixedGroups(Dataset[Group]):
    """
    The groups of the first epoch, or of a list. Evaluation needs them, because they are the same at each reading.

    It has no `set_epoch`, because accelerate would call it for each evaluation and so change what is measured.

    Raises:
        ValueError: a group has no negative, so it would be ranked perfectly with any scores; or a row of a dataset
            breaks its rule.
    """

    def __init__(self, groups: GroupDataset | Sequence[Group]):
        if isinstance(groups, GroupDataset):
            Grouping.for_evaluation(groups.grouping.group_size)
            groups.check_negatives()
        elif bare := [index for index, group in enumerate(groups) if min(group["labels"], default=1) > 0]:
            raise ValueError(f"group {bare[0]} has no passage with label 0, so it would always be ranked perfectly")
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Group:
        return self.groups.group(index, 0) if isinstance(self.groups, GroupDataset) else self.groups[index]


class GroupStream(IterableDataset[Group]):
    """
    Groups of a stream of rows, in the order of the stream.

    Args:
        rows: an iterable of mappings that can be read again each epoch, such as a `datasets.IterableDataset`.
        grouping: how rows become groups. Draws distinguish rows by their query.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], grouping: Grouping):
        self.rows = rows
        self.grouping = grouping
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Chooses the positives and the negatives of this epoch (from 0), and the shuffle of a `datasets` stream."""
        self._epoch.fill_(epoch)
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Group]:
        epoch = int(self._epoch)
        worker = get_worker_info()
        # A `datasets.IterableDataset` splits its own rows among workers.
        is_shared = worker is None or hasattr(self.rows, "num_shards") or hasattr(self.rows, "n_shards")
        for number, item in enumerate(self.rows):
            if worker is not None and not is_shared and number % worker.num_workers != worker.id:
                continue
            where = f"row {number} of the stream"
            row = parse_row(item, where)
            for positive in range(len(row.positives)) if self.grouping.expands else [None]:
                key = f"{row.query} {positive}"
                yield self.grouping.group(row, where, epoch=epoch, key=key, positive=positive)

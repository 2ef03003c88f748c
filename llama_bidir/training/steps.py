"""
Gives each optimizer step the same groups on any number of processes, also at the end of an epoch.

accelerate gives each process the same number of groups. If some are missing at the end of an epoch, it repeats the
first groups. Here, stand-ins take these places: they fill a batch, and [`StepCollator`] leaves them out.
"""

from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from ..data import GroupDataset, GroupStream
from ..data.groups import Group

T = TypeVar("T")

STAND_IN_INDEX = -1


@dataclass(frozen=True)
class StandIn:
    """Takes the place of a missing group in a batch. It does not count in the loss."""

    group: Group


@dataclass(frozen=True, kw_only=True)
class Steps:
    """
    How the groups of an epoch become optimizer steps.

    Args:
        batch_size: groups per process that are scored together.
        processes: the number of processes.
        accumulation: batches per process in one step.
        drop_last: leave out the groups at the end of an epoch that do not fill a step.
    """

    batch_size: int
    processes: int
    accumulation: int
    drop_last: bool

    @property
    def groups_at_once(self) -> int:
        """Groups that all processes score together."""
        return self.batch_size * self.processes

    @property
    def groups_per_step(self) -> int:
        """Groups of a full step."""
        return self.groups_at_once * self.accumulation

    def count(self, num_groups: int) -> int:
        """
        Returns the steps per epoch.

        Raises:
            ValueError: all groups would be left out.
        """
        full, rest = divmod(num_groups, self.groups_per_step)
        if self.drop_last and not full:
            raise ValueError(
                f"dataloader_drop_last leaves out all {num_groups} groups, because a step has "
                f"{self.groups_per_step}: set it to false, or make global_batch_size smaller"
            )
        return full if self.drop_last else full + bool(rest)

    def num_places(self, num_groups: int) -> int:
        """Returns how many groups and stand-ins [`deal`] yields in an epoch."""
        if self.drop_last:
            return self.count(num_groups) * self.groups_per_step
        return num_groups if self.processes == 1 else -(-num_groups // self.groups_at_once) * self.groups_at_once

    def deal(self, groups: Sequence[T], stand_in: T) -> Iterator[T]:
        """
        Shares groups among the processes, which take `batch_size` groups each in turn. The last processes may get one
        group less than the first ones, and a stand-in in its place.
        """
        whole = len(groups) - len(groups) % (self.groups_per_step if self.drop_last else self.groups_at_once)
        yield from groups[:whole]
        if self.processes == 1:
            yield from () if self.drop_last else groups[whole:]
        elif whole < len(groups) and not self.drop_last:
            rest = groups[whole:]
            share, more = divmod(len(rest), self.processes)
            for process in range(self.processes):
                start, size = process * share + min(process, more), share + (process < more)
                yield from rest[start : start + size]
                yield from [stand_in] * (self.batch_size - size)


class StepSampler(Sampler[int]):
    """Deals the order of another sampler to the processes. The indices of stand-ins are [`STAND_IN_INDEX`]."""

    def __init__(self, sampler: Any, steps: Steps):
        self.sampler = sampler
        self.steps = steps

    def __len__(self) -> int:
        return self.steps.num_places(len(self.sampler))

    def __iter__(self) -> Iterator[int]:
        return self.steps.deal(list(self.sampler), STAND_IN_INDEX)


class StepGroups(Dataset[Group | StandIn], Sized):
    """The groups of a dataset by index. For a stand-in, it returns the first group."""

    def __init__(self, groups: GroupDataset):
        self.groups = groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> Group | StandIn:
        return StandIn(self.groups[0]) if index == STAND_IN_INDEX else self.groups[index]

    def set_epoch(self, epoch: int) -> None:
        self.groups.set_epoch(epoch)


class StepStream(IterableDataset[Group | StandIn]):
    """Deals the groups of a stream to the processes."""

    def __init__(self, groups: GroupStream, steps: Steps):
        self.groups = groups
        self.steps = steps

    def __iter__(self) -> Iterator[Group | StandIn]:
        step: list[Group] = []
        num_groups = 0
        for group in self.groups:
            step.append(group)
            num_groups += 1
            if len(step) == self.steps.groups_per_step:
                yield from step
                step = []
        if get_worker_info() is None and num_groups:
            self.steps.count(num_groups)  # raises if nothing was dealt
        if step:
            places: list[Group | StandIn] = [*step]
            yield from self.steps.deal(places, StandIn(step[0]))

    def set_epoch(self, epoch: int) -> None:
        self.groups.set_epoch(epoch)


class StepCollator:
    """
    Makes a batch of groups, and leaves out the stand-ins among them.

    A process without a group must still take part in the step. Its batch has the inputs of a stand-in, and `labels` and
    `teacher_scores` of shape `(0, group_size)`.
    """

    def __init__(self, collator: Callable[[Any], dict[str, Any]]):
        self.collator = collator

    def __call__(self, items: Sequence[Group | StandIn]) -> dict[str, Any]:
        groups = [item for item in items if not isinstance(item, StandIn)]
        stand_ins = [item.group for item in items if isinstance(item, StandIn)]
        return self.collator(groups) if groups else without_groups(self.collator(stand_ins[:1]))


def without_groups(batch: dict[str, Any]) -> dict[str, Any]:
    """Returns a batch with the same model inputs, in which no group counts."""
    return {**batch, "labels": batch["labels"][:0], "teacher_scores": batch["teacher_scores"][:0]}

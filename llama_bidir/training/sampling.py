"""The order of groups, which depends on the seed and the epoch alone: not on a resume or the number of processes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..data import GroupDataset


class EpochSampler(Sampler[int]):
    """
    Shuffles groups in a new order each epoch.

    It replaces accelerate's own sampler, which starts from its first epoch again when several processes resume.

    Args:
        dataset: the groups, whose `epoch` decides the order.
        seed: the seed of the shuffle.
        batch_size: groups per optimizer step, to put groups of similar length into the same step. None ignores lengths.
    """

    def __init__(self, dataset: GroupDataset, *, seed: int, batch_size: int | None = None):
        self.dataset = dataset
        self.seed = seed
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.dataset.epoch)
        with torch.device("cpu"):  # the device of the generator, independent of torch's default device
            if self.batch_size is None:
                order = torch.randperm(len(self.dataset), generator=generator).tolist()
            else:
                lengths = self.dataset.num_characters()
                order = list(LengthGroupedSampler(self.batch_size, lengths=lengths, generator=generator))
        yield from order


class EpochCallback(TrainerCallback):
    """Sets a dataset's epoch before the sampler starts. accelerate sets the epoch of only one of the two."""

    def __init__(self, dataset: GroupDataset):
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.dataset.set_epoch(int((state.epoch or 0.0) + 1e-6))

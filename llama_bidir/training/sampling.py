"""The order of groups: decided by the seed and the epoch alone, so that it survives a resume and more processes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..data import GroupDataset


class EpochSampler(Sampler[int]):
    """
    Shuffles groups anew each epoch.

    accelerate's own sampler starts from its first epoch again when a run of several processes is resumed.

    Args:
        dataset: knows the epoch.
        seed: of the shuffle.
        batch_size: groups a step over all processes that are to be of like lengths; any lengths when None.
    """

    def __init__(self, dataset: GroupDataset, *, seed: int, batch_size: int | None = None):
        self.dataset = dataset
        self.seed = seed
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.dataset.epoch)
        if self.batch_size is None:
            yield from torch.randperm(len(self.dataset), generator=generator).tolist()
        else:
            lengths = self.dataset.num_characters()
            yield from LengthGroupedSampler(self.batch_size, lengths=lengths, generator=generator)


class EpochCallback(TrainerCallback):
    """Tells a dataset the epoch before the sampler starts; accelerate tells the first of the two that it finds."""

    def __init__(self, dataset: GroupDataset):
        self.dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.dataset.set_epoch(int((state.epoch or 0.0) + 1e-6))

"""
Batches larger than memory: their pairs are computed in pieces, with the gradient of the whole batch.

A loss compares the passages of a group, so its gradient at one score depends on all scores. The pieces therefore run
twice: first without a graph, which gives the scores and the gradient of the loss at each of them, and then one after
another with a graph, through which that gradient flows back (GradCache, Gao et al., Scaling Deep Contrastive Learning
Batch Size under Memory Limited Setup, RepL4NLP 2021). Only one piece is in memory at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from ..scoring.packing import packed_batch


class Pieces:
    """
    The pairs of a batch, in pieces.

    Args:
        model: called with the inputs of one piece.
        batch: the model's inputs for all pairs, packed or padded.
        num_pieces: into how many pieces of nearly equal numbers of pairs to split the batch. If there are fewer pairs,
            the first one fills the other pieces, without a gradient.
        autocast: makes the context in which the model computes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batch: Mapping[str, Any],
        num_pieces: int,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self._model, self._autocast = model, autocast
        num_pairs = count_pairs(batch)
        ends = [num_pairs * (number + 1) // num_pieces for number in range(num_pieces)]
        self._ranges = list(zip([0, *ends], ends, strict=False))
        self._batch = batch
        self._states: list[RandomState] = []
        self._scores: torch.Tensor | None = None

    def scores(self) -> torch.Tensor:
        """Returns the scores of all pairs, a `torch.FloatTensor` of shape `(num_pairs,)` that takes a gradient."""
        device = self._batch["input_ids"].device
        parts = []
        with torch.no_grad():
            for start, end in self._ranges:
                self._states.append(RandomState(device))
                parts.append(self._forward(start, end))
        kept = [part for part, (start, end) in zip(parts, self._ranges, strict=True) if end > start]
        self._scores = torch.cat(kept).requires_grad_()
        return self._scores

    def backward(self, no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """
        Lets the gradient of the scores flow back into the model. Each piece sees the random state that it saw before.

        Args:
            no_sync: makes a context in which processes do not exchange gradients. The last piece exchanges them.
        """
        assert self._scores is not None
        gradient = self._scores.grad
        if gradient is None:  # the loss did not read the scores
            gradient = torch.zeros_like(self._scores)
        for number, ((start, end), state) in enumerate(zip(self._ranges, self._states, strict=True)):
            is_last = number == len(self._ranges) - 1
            with nullcontext() if is_last else no_sync():
                with state.restored():
                    scores = self._forward(start, end)
                scores.backward(gradient[start:end] if end > start else torch.zeros_like(scores))

    def _forward(self, start: int, end: int) -> torch.Tensor:
        inputs = select_pairs(self._batch, *((start, end) if end > start else (0, 1)))
        with self._autocast():
            logits: torch.Tensor = self._model(**inputs).logits
        return logits.squeeze(-1).float()


class RandomState:
    """The state of the random numbers of the CPU and of the current accelerator."""

    def __init__(self, device: torch.device):
        self._modules: list[Any] = [torch]
        if device.type not in ("cpu", "meta"):
            self._modules.append(torch.get_device_module(device))
        self._states = [module.get_rng_state() for module in self._modules]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restores the state until the context closes."""
        now = [module.get_rng_state() for module in self._modules]
        try:
            self._set(self._states)
            yield
        finally:
            self._set(now)

    def _set(self, states: Sequence[torch.Tensor]) -> None:
        for module, state in zip(self._modules, states, strict=True):
            module.set_rng_state(state)


def count_pairs(batch: Mapping[str, Any]) -> int:
    """Returns the number of pairs of a packed or a padded batch."""
    return len(batch["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in batch else len(batch["input_ids"])


def select_pairs(batch: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    """Returns the inputs of the pairs from `start` to `end`, of a batch that is packed or padded on the right."""
    if "cu_seq_lens_q" in batch:
        lengths: Sequence[int] = batch["sequence_lengths"]
        first = sum(lengths[:start])
        stream = batch["input_ids"][:, first : first + sum(lengths[start:end])]
        return packed_batch(stream, lengths[start:end])
    mask = batch["attention_mask"][start:end]
    longest = int(mask.sum(dim=1).max())
    return {"input_ids": batch["input_ids"][start:end, :longest], "attention_mask": mask[:, :longest]}

"""From groups to batches."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..losses import IGNORED
from ..prompts import PromptEncoder
from ..scoring.packing import pack, pad
from .groups import Group, pairs_of

logger = logging.getLogger(__name__)


class GroupCollator:
    """
    Makes a batch of groups: renders and tokenizes their pairs, one group after another.

    Args:
        prompt_encoder (`PromptEncoder`): renders and tokenizes the pairs.
        packed (`bool`): lay the pairs end to end, without padding (see [`~packing.pack`]).
        needs_teacher (`bool`): refuse a group without teacher scores.

    Returns:
        `labels`, a `torch.FloatTensor` of shape `(groups, largest_group)` with the relevance of each passage and -100
        as padding; `teacher_scores` of the same shape, NaN for a group without them; and the model's inputs:
        `input_ids` and `attention_mask` of shape `(num_pairs, longest_pair)`, or the keywords of a packed batch.
    """

    def __init__(self, prompt_encoder: PromptEncoder, *, packed: bool = False, needs_teacher: bool = False):
        self.prompt_encoder = prompt_encoder
        self.packed = packed
        self.needs_teacher = needs_teacher
        self._has_warned = False

    def __call__(self, groups: Sequence[Group]) -> dict[str, Any]:
        encoded = self.prompt_encoder.encode([pair for group in groups for pair in pairs_of(group)])
        if encoded.num_truncated and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"{encoded.num_truncated} of the {len(encoded.input_ids)} pairs of a batch were longer than "
                f"{self.prompt_encoder.max_length} tokens and were cut to fit: raise "
                "rerank_max_length to keep more (said once)"
            )
        # The labels come first: the Trainer takes the size of a batch from its first tensor.
        batch: dict[str, Any] = {"labels": _fill([group["labels"] for group in groups])}
        batch["teacher_scores"] = _fill([self._teacher_scores(group) for group in groups])
        return {**batch, **(pack if self.packed else pad)(encoded.input_ids)}

    def _teacher_scores(self, group: Group) -> list[float]:
        if group["teacher_scores"] is not None:
            return group["teacher_scores"]
        if self.needs_teacher:
            raise ValueError(
                f"the row of query {group['query']!r} has no teacher scores, which the loss needs: give every row "
                "pos_score and neg_score"
            )
        return [math.nan] * len(group["passages"])


def _fill(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    tensors = [torch.tensor(row, dtype=torch.float32, device="cpu") for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=IGNORED)

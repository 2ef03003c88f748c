"""From groups to batches."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from ..losses import IGNORED
from ..packing import pack
from ..prompts import PromptEncoder
from .groups import Group

logger = logging.getLogger(__name__)


class GroupCollator:
    """
    Makes a batch of groups: renders and tokenizes their pairs, group after group.

    Args:
        prompt_encoder (`PromptEncoder`): renders and tokenizes the pairs.
        packed (`bool`): lay the pairs end to end, without padding (see [`~packing.pack`]).

    Returns:
        `labels`, a `torch.FloatTensor` of shape `(groups, largest_group)` with the relevance of each passage and -100
        where there is none; `teacher_scores` of the same shape where every row has them; and what the model takes:
        `input_ids` and `attention_mask` of shape `(num_pairs, longest_pair)`, or the keywords of a packed batch.
    """

    def __init__(self, prompt_encoder: PromptEncoder, *, packed: bool = False):
        self.prompt_encoder = prompt_encoder
        self.packed = packed
        self._has_warned = False

    def __call__(self, groups: Sequence[Group]) -> dict[str, Any]:
        encoded = self.prompt_encoder.encode(
            [(group["query"], passage) for group in groups for passage in group["passages"]]
        )
        if encoded.num_truncated and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"{encoded.num_truncated} of the {len(encoded.input_ids)} pairs of a batch were longer than "
                f"{self.prompt_encoder.max_length} tokens and were cut to fit: raise "
                "rerank_max_length to keep more (said once)"
            )
        # The labels come first: the Trainer takes the size of a batch from its first tensor.
        batch: dict[str, Any] = {"labels": _fill([group["labels"] for group in groups])}
        teacher_scores = [scores for group in groups if (scores := group["teacher_scores"]) is not None]
        if len(teacher_scores) == len(groups):
            batch["teacher_scores"] = _fill(teacher_scores)
        if self.packed:
            return {**batch, **pack(encoded.input_ids)}
        padded = self.prompt_encoder.tokenizer.pad({"input_ids": encoded.input_ids}, return_tensors="pt")
        return {**batch, "input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}


def _fill(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    tensors = [torch.tensor(row, dtype=torch.float32) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=IGNORED)

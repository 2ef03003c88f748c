"""From training rows to batches."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..losses import IGNORED
from ..prompts import PromptEncoder
from .rows import parse_row

logger = logging.getLogger(__name__)


class GroupCollator:
    """
    Makes a batch of groups from training rows: for each query its first positive, then its first `group_size - 1`
    negatives. A row with fewer negatives makes a smaller group.

    Args:
        prompt_encoder (`PromptEncoder`): renders and tokenizes the pairs.
        group_size (`int`): passages a query.

    Returns:
        `input_ids` and `attention_mask` of shape `(num_pairs, longest_pair)`, group after group, and `labels`, a
        `torch.FloatTensor` of shape `(groups, largest_group)` with 1 for a positive, 0 for a negative and -100 beyond
        the end of a group.

    Raises:
        ValueError: a row is malformed, or has no negative where `group_size` is above 1.
    """

    def __init__(self, prompt_encoder: PromptEncoder, *, group_size: int):
        self.prompt_encoder = prompt_encoder
        self.group_size = group_size
        self._has_warned = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        pairs, sizes = [], []
        for index, item in enumerate(rows):
            row = parse_row(item, f"row {index} of the batch")
            negatives = row.negatives[: self.group_size - 1]
            if self.group_size > 1 and not negatives:
                raise ValueError(
                    f"the row of query {row.query!r} has no neg_doc: groups of {self.group_size} need some"
                )
            pairs += [(row.query, passage) for passage in [row.positives[0], *negatives]]
            sizes.append(1 + len(negatives))
        labels = torch.full((len(sizes), max(sizes)), IGNORED)
        for group, size in enumerate(sizes):
            labels[group, :size] = 0.0
        labels[:, 0] = 1.0
        encoded = self.prompt_encoder.encode(pairs)
        if encoded.num_truncated and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"{encoded.num_truncated} of the {len(pairs)} pairs of a batch were longer than "
                f"{self.prompt_encoder.max_length} tokens and were cut to fit: raise "
                "rerank_max_length to keep more (said once)"
            )
        batch = self.prompt_encoder.tokenizer.pad({"input_ids": encoded.input_ids}, return_tensors="pt")
        return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}

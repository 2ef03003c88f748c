"""From rows with candidates to rows with negatives: read and scored by the teacher window by window."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch

from ...cross_encoder import CrossEncoder
from ...data import TrainingRow, parse_row
from ...utils.validation import describe
from .selection import DEFAULT_SELECTION, Selection, select_negatives

# Pairs that are worth scoring together, and that are lost when a job is killed.
WINDOW_PAIRS = 4096


class CandidateRow(NamedTuple):
    """
    A row with candidates.

    Args:
        where: what errors call the row.
        fields: of the training schema (see [`~data.parse_row`]) and others; `neg_doc` holds the candidates, best first.
        known_positives: relevant passages beside the row's own.
    """

    where: str
    fields: Mapping[str, Any]
    known_positives: Sequence[str] = ()


class MinedRow(NamedTuple):
    """
    A row with its negatives.

    Args:
        where: what errors call the row.
        fields: those of the row, with `neg_doc`, `pos_score` and `neg_score` (raw logits) replaced. `neg_doc` is empty
            where no candidate passed.
        num_candidates: how many the row had.
        removed: how many of them fell out, by reason (see [`select_negatives`]).
    """

    where: str
    fields: dict[str, Any]
    num_candidates: int
    removed: dict[str, int]


def mine_negatives(
    cross_encoder: CrossEncoder,
    rows: Iterable[Mapping[str, Any]],
    selection: Selection = DEFAULT_SELECTION,
    *,
    batch_size: int | None = None,
    window_pairs: int = WINDOW_PAIRS,
) -> Iterator[MinedRow]:
    """
    Chooses negatives among the `neg_doc` of rows, which are read and scored window by window.

    Args:
        cross_encoder: the teacher, with one label.
        rows: rows of the training schema (see [`~data.parse_row`]) whose `neg_doc` holds the candidates, best first.
        selection: which candidates become negatives.
        batch_size: see [`CrossEncoder.predict`].
        window_pairs: rows are scored together as soon as they have so many pairs.

    Yields:
        each row in turn.

    Raises:
        ValueError: a row breaks its rule, a score is not finite, or the model has several labels.
    """
    named = (CandidateRow(f"row {number}", row) for number, row in enumerate(rows))
    for window in mine_windows(cross_encoder, named, selection, batch_size=batch_size, window_pairs=window_pairs):
        yield from window


def check_teacher(cross_encoder: CrossEncoder) -> None:
    """Raises ValueError for a model of several labels."""
    if cross_encoder.config.num_labels != 1:
        raise ValueError(
            f"a teacher gives one score a pair, but the model has {cross_encoder.config.num_labels} labels: name "
            "another model"
        )


def mine_windows(
    cross_encoder: CrossEncoder,
    rows: Iterable[CandidateRow],
    selection: Selection,
    *,
    batch_size: int | None,
    window_pairs: int,
) -> Iterator[list[MinedRow]]:
    """Yields the rows of [`mine_negatives`] a window at a time. Where windows end depends on the rows alone."""
    check_teacher(cross_encoder)
    for window in _read_windows(rows, window_pairs):
        pairs = [(row.query, text) for _, row in window for text in (*row.positives, *row.negatives)]
        # Raw logits, whatever activation the caller has set.
        scores = iter(
            cross_encoder.predict(
                pairs, batch_size, show_progress_bar=False, activation_fn=torch.nn.Identity()
            ).tolist()
        )
        yield [_mine(given, row, list(islice(scores, _num_pairs(row))), selection) for given, row in window]


def as_list(value: Any) -> list[Any]:
    """Returns the passages of a field, which may be None, a single one, a list, a tuple or an array."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _num_pairs(row: TrainingRow) -> int:
    return len(row.positives) + len(row.negatives)


def _read_windows(rows: Iterable[CandidateRow], window_pairs: int) -> Iterator[list[tuple[CandidateRow, TrainingRow]]]:
    window: list[tuple[CandidateRow, TrainingRow]] = []
    num_pairs = 0
    for given in rows:
        row = parse_row(given.fields, given.where)
        window.append((given, row))
        num_pairs += _num_pairs(row)
        if num_pairs >= window_pairs:
            yield window
            window, num_pairs = [], 0
    if window:
        yield window


def _mine(given: CandidateRow, row: TrainingRow, all_scores: list[float], selection: Selection) -> MinedRow:
    positive_scores, scores = all_scores[: len(row.positives)], all_scores[len(row.positives) :]
    try:
        indices, removed = select_negatives(
            row.positives,
            positive_scores,
            row.negatives,
            scores,
            selection,
            known_positives=given.known_positives,
            draw=row.query,
        )
    except ValueError as error:
        raise ValueError(f"{given.where}: {error}; the query is {describe(row.query)}") from None
    candidates = as_list(given.fields.get("neg_doc"))
    mined = {
        "neg_doc": [candidates[index] for index in indices],
        "pos_score": positive_scores,
        "neg_score": [scores[index] for index in indices],
    }
    return MinedRow(given.where, {**given.fields, **mined}, len(scores), removed)

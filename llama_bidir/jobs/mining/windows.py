"""From rows with candidates to rows with negatives."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, tee
from typing import Any, NamedTuple

import torch

from ...cross_encoder import CrossEncoder
from ...data import TrainingRow, parse_row
from ...data.foreign_rows import read_foreign
from ...data.identical import find_query_id, is_query, tell_identical
from ...data.rows import as_list
from ...prompts import Pair
from ...scoring.pipeline import check_one_label
from ...utils.errors import ScoreError
from ...utils.validation import describe
from ..scoring import naming_the_cause
from .selection import DEFAULT_SELECTION, Selection, select_negatives

WINDOW_PAIRS = 4096
# Scores are raw logits, whatever activation the caller has set.
LOGITS = torch.nn.Identity()


class CandidateRow(NamedTuple):
    """
    A row with candidates.

    Args:
        where: the name of the row in errors.
        fields: of the training schema (see [`~data.parse_row`]) and others. `neg_doc` holds the candidates, best first.
        known_positives: relevant passages besides the row's own.
        num_identical: how many candidates were left out because they are the query itself.
    """

    where: str
    fields: Mapping[str, Any]
    known_positives: Sequence[str] = ()
    num_identical: int = 0


class MinedRow(NamedTuple):
    """
    A row with its negatives.

    Args:
        where: the name of the row in errors.
        fields: those of the row, with new `neg_doc`, `pos_score` and `neg_score` (raw logits). `neg_doc` is empty if no
            candidate passed.
        num_candidates: how many the row had.
        removed: how many of them were not taken, by reason (see [`select_negatives`]).
        num_identical: how many candidates were left out before scoring because they are the query itself.
    """

    where: str
    fields: dict[str, Any]
    num_candidates: int
    removed: dict[str, int]
    num_identical: int = 0


class ParsedRow(NamedTuple):
    """A row as it was given, and its texts."""

    given: CandidateRow
    row: TrainingRow

    @classmethod
    def parse(cls, given: CandidateRow) -> "ParsedRow":
        """Raises ValueError if the row breaks a rule of the schema."""
        row = parse_row(given.fields, given.where)
        return cls(given._replace(fields=read_foreign(given.fields, given.where)[0]), row)

    def pairs(self) -> list[Pair]:
        """Returns the pairs to score: the positives, then the candidates."""
        instruction = self.row.instruction
        return [(self.row.query, text, instruction) for text in (*self.row.positives, *self.row.negatives)]


def mine_negatives(
    cross_encoder: CrossEncoder,
    rows: Iterable[Mapping[str, Any]],
    selection: Selection = DEFAULT_SELECTION,
    *,
    ignore_identical_ids: bool = True,
    batch_size: int | None = None,
    window_pairs: int = WINDOW_PAIRS,
) -> Iterator[MinedRow]:
    """
    Chooses negatives among the `neg_doc` of rows. Rows are read and scored window by window.

    Args:
        cross_encoder: the teacher, a model with one label.
        rows: rows of the training schema (see [`~data.parse_row`]) whose `neg_doc` holds the candidates, best first.
        selection: which candidates become negatives.
        ignore_identical_ids: leave out candidates that are the query itself (see [`~data.identical`]), with a warning
            that counts them after the last row.
        batch_size: see [`CrossEncoder.predict`].
        window_pairs: a window of rows ends as soon as it has this many pairs.

    Yields:
        each row in turn.

    Raises:
        ValueError: a row breaks its rule, or the model has several labels.
        ScoreError: a score is NaN or infinite.
    """
    check_one_label(cross_encoder.config, "mining")
    named = (CandidateRow(f"row {number}", row) for number, row in enumerate(rows))
    checked = map(_without_query, named) if ignore_identical_ids else named
    num_identical = 0
    first, second = tee(_cut(map(ParsedRow.parse, checked), window_pairs))
    chunks = ([pair for row in window for pair in row.pairs()] for window in first)
    scores = cross_encoder.predict_chunks(chunks, batch_size, activation_fn=LOGITS)
    for window, window_scores in zip(second, scores, strict=True):
        num_identical += sum(row.given.num_identical for row in window)
        with naming_the_cause(cross_encoder):
            mined = list(choose_negatives(window, window_scores.tolist(), selection))
        yield from mined
    tell_identical("the rows", num_identical)


def choose_negatives(window: Sequence[ParsedRow], scores: Sequence[float], selection: Selection) -> Iterator[MinedRow]:
    """Yields the rows of a window with their negatives. `scores` are those of its pairs."""
    remaining = iter(scores)
    for given, row in window:
        positive_scores = list(islice(remaining, len(row.positives)))
        negative_scores = list(islice(remaining, len(row.negatives)))
        try:
            indices, removed = select_negatives(
                row.positives,
                positive_scores,
                row.negatives,
                negative_scores,
                selection,
                known_positives=given.known_positives,
                draw=row.query,
            )
        except ScoreError as error:
            raise ScoreError(f"{given.where}: {error}; the query is {describe(row.query)}") from None
        candidates = as_list(given.fields.get("neg_doc"))
        mined = {
            "neg_doc": [candidates[index] for index in indices],
            "pos_score": positive_scores,
            "neg_score": [negative_scores[index] for index in indices],
        }
        fields = {**given.fields, **mined}
        yield MinedRow(given.where, fields, len(negative_scores), removed, given.num_identical)


def _without_query(given: CandidateRow) -> CandidateRow:
    """Returns a row without the candidates that are the query itself. Drops the scores of the row."""
    row = parse_row(given.fields, given.where)
    given = given._replace(fields=read_foreign(given.fields, given.where)[0])
    candidates = as_list(given.fields.get("neg_doc"))
    query_id = find_query_id(given.fields)
    mask = [is_query(query_id, row.query, *pair) for pair in zip(candidates, row.negatives, strict=True)]
    if not any(mask):
        return given
    kept = [candidate for candidate, is_own in zip(candidates, mask, strict=True) if not is_own]
    fields = {**given.fields, "neg_doc": kept, "pos_score": None, "neg_score": None}
    return given._replace(fields=fields, num_identical=sum(mask))


def _cut(rows: Iterable[ParsedRow], window_pairs: int) -> Iterator[list[ParsedRow]]:
    window: list[ParsedRow] = []
    num_pairs = 0
    for row in rows:
        window.append(row)
        num_pairs += len(row.pairs())
        if num_pairs >= window_pairs:
            yield window
            window, num_pairs = [], 0
    if window:
        yield window

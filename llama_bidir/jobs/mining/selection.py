"""
The negatives among the candidates of a query, by the scores of a cross-encoder, the teacher.

Positive-aware mining after Moreira et al., NV-Retriever: Improving text embedding models with effective hard-negative
mining, 2024 (arXiv 2407.15831). A candidate that scores too close to the positive is probably an unlabelled positive.
The score of the positive therefore sets the limit.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...utils.validation import check_int
from ..scoring import check_score
from .duplicates import SHINGLE_WORDS, are_near_duplicates, make_shingles, split_words

SAMPLING = ("top", "random")
# Why a candidate is not taken, in the order of the checks.
REASONS = ("empty", "positive", "skipped", "margin", "max_score", "duplicate", "surplus")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """
    Which candidates become negatives.

    Args:
        num_negatives: most negatives per row.
        absolute_margin: by how much a negative's score must be below the positive's, in logits; may be negative.
        relative_margin: share of the positive's probability that a negative's must be below, in (0, 1]. The probability
            is the sigmoid of the score, because a share of a negative logit means nothing. 0.95 is
            TopK-PercPos of NV-Retriever, and `relative_margin=0.05` of sentence-transformers. 1 leaves the decision to
            `absolute_margin` alone.
        skip_top: how many of the first candidates to leave out, not counting positives.
        max_score: the highest score of a negative, as a logit; None is no limit.
        sampling: `top` takes the candidates with the highest scores of those that pass, `random` draws among them.
        seed: of the draw, which depends only on the seed and the query.

    Raises:
        ValueError: a value breaks its rule.
    """

    num_negatives: int = 7
    absolute_margin: float = 0.0
    relative_margin: float = 0.95
    skip_top: int = 0
    max_score: float | None = None
    sampling: str = "top"
    seed: int = 42

    def __post_init__(self) -> None:
        # The only way to set a field of a frozen dataclass here.
        object.__setattr__(self, "num_negatives", check_int("num_negatives", self.num_negatives))
        object.__setattr__(self, "skip_top", check_int("skip_top", self.skip_top, lowest=0))
        if not math.isfinite(self.absolute_margin):
            raise ValueError(f"absolute_margin must be a finite number, got {self.absolute_margin!r}")
        if not 0 < self.relative_margin <= 1:
            raise ValueError(
                f"relative_margin must be above 0 and at most 1, such as 0.95 for 95% of the positive's probability, "
                f"got {self.relative_margin!r}"
            )
        if self.max_score is not None and not math.isfinite(self.max_score):
            raise ValueError(f"max_score must be None or a finite number, got {self.max_score!r}")
        if self.sampling not in SAMPLING:
            raise ValueError(f"sampling must be one of {', '.join(SAMPLING)}, got {self.sampling!r}")

    def threshold(self, positive_score: float) -> float:
        """
        Returns the logit that a negative's score must be below: the smaller of `s - absolute_margin` and
        `logit(relative_margin * sigmoid(s))` for a positive with score s.
        """
        limit = positive_score - self.absolute_margin
        if self.relative_margin == 1:
            return limit
        # In logarithms, because the probability itself is 0 or 1 for large scores.
        log_sigmoid = min(positive_score, 0.0) - math.log1p(math.exp(-abs(positive_score)))
        log_probability = math.log(self.relative_margin) + log_sigmoid
        return min(limit, log_probability - math.log(-math.expm1(log_probability)))


DEFAULT_SELECTION = Selection()


class Selected(NamedTuple):
    """Positions of the negatives among the candidates, by falling score, and the number of the others by reason."""

    indices: list[int]
    removed: dict[str, int]


def select_negatives(
    positives: Sequence[str],
    positive_scores: Sequence[float],
    candidates: Sequence[str],
    scores: Sequence[float],
    selection: Selection = DEFAULT_SELECTION,
    *,
    known_positives: Sequence[str] = (),
    draw: str = "",
) -> Selected:
    """
    Chooses the negatives of a query among candidates.

    A candidate is left out for the first of these reasons that holds. It has no letter and no digit (`empty`). It has
    the words of a positive, alone or after a title (`positive`). It is one of the first `skip_top` that remain
    (`skipped`). Its score is not below the threshold (`margin`) or is above `max_score`. It is nearly the same as a
    positive or as a negative that was taken (`duplicate`). There are enough negatives (`surplus`). The threshold comes
    from the positive with the lowest score: a negative must rank below every known positive.

    Args:
        positives, positive_scores: relevant passages and the teacher's logits.
        candidates, scores: passages in first-stage order, best first, and the teacher's logits.
        selection: the rules.
        known_positives: further relevant passages, which do not affect the threshold.
        draw: identifies the query in a random draw.

    Raises:
        ValueError: there is no positive, or a score is missing.
        ScoreError: a score is NaN or infinite.
    """
    if not positives:
        raise ValueError("there must be at least one positive, whose score limits those of the negatives")
    for name, texts, numbers in (("positives", positives, positive_scores), ("candidates", candidates, scores)):
        if len(texts) != len(numbers):
            raise ValueError(f"each passage needs its score: got {len(texts)} {name} and {len(numbers)} scores")
        for index, number in enumerate(numbers):
            check_score(f"the score of {name}[{index}]", number)
    threshold = selection.threshold(min(positive_scores))
    positive_words = [split_words(text) for text in (*positives, *known_positives)]
    removed = dict.fromkeys(REASONS, 0)
    passed: dict[int, tuple[str, ...]] = {}
    rank = 0
    for index, (text, score) in enumerate(zip(candidates, scores, strict=True)):
        words = split_words(text)
        if not words:
            removed["empty"] += 1
        elif any(words == known or _is_titled(words, known) for known in positive_words):
            removed["positive"] += 1
        elif (rank := rank + 1) <= selection.skip_top:
            removed["skipped"] += 1
        elif score >= threshold:
            removed["margin"] += 1
        elif selection.max_score is not None and score > selection.max_score:
            removed["max_score"] += 1
        else:
            passed[index] = words

    order = sorted(passed, key=lambda index: -scores[index])
    if selection.sampling == "random":
        random.Random(f"{selection.seed} {draw}").shuffle(order)
    taken: list[int] = []
    shingles = [make_shingles(words) for words in positive_words]
    for position, index in enumerate(order):
        if len(taken) == selection.num_negatives:
            removed["surplus"] = len(order) - position
            break
        candidate = make_shingles(passed[index])
        if any(are_near_duplicates(candidate, other) for other in shingles):
            removed["duplicate"] += 1
        else:
            taken.append(index)
            shingles.append(candidate)
    return Selected(sorted(taken, key=lambda index: (-scores[index], index)), removed)


def _is_titled(words: tuple[str, ...], positive: tuple[str, ...]) -> bool:
    """Whether a passage is a positive after a title. A very short positive could be the end of any sentence."""
    return len(positive) >= SHINGLE_WORDS and words[-len(positive) :] == positive

"""Fair shares of work whose costs are known, and samples."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def spread(items: Sequence[T], count: int) -> list[T]:
    """Returns `count` items that are spread evenly over all of them, or all if there are fewer."""
    return [items[index * len(items) // count] for index in range(count)] if count < len(items) else list(items)


def deal(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """
    Deals items to shares of nearly equal cost: in rounds from the most expensive item on, each round in the opposite
    direction of the one before.

    Args:
        costs: one number per item, in any unit.
        num_shares: at least 1.

    Returns:
        the indices of each share, ascending.
    """
    order = sorted(range(len(costs)), key=lambda index: -costs[index])
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    turns = [*shares, *reversed(shares)]
    for turn, index in enumerate(order):
        turns[turn % len(turns)].append(index)
    return [sorted(share) for share in shares]

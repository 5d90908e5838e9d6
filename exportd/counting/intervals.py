"""Sets of byte positions, as sorted, disjoint (start, stop) pairs that do not touch."""

from bisect import bisect_right
from collections.abc import Iterable

Intervals = tuple[tuple[int, int], ...]


def join(*sets: Iterable[tuple[int, int]]) -> Intervals:
    """The positions that are in any of the sets, whose pairs may be in any order and may overlap."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(pair for pairs in sets for pair in pairs):
        if start >= stop:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return tuple(joined)


def subtract(positions: Intervals, removed: Intervals) -> Intervals:
    """The positions that are not in ``removed``."""
    left = []
    for start, stop in positions:
        for removed_start, removed_stop in removed:
            if start < min(removed_start, stop):
                left.append((start, min(removed_start, stop)))
            start = max(start, removed_stop)
        left.append((start, stop))
    return join(left)


def includes(positions: Intervals, start: int, stop: int) -> bool:
    """Whether every position from ``start`` up to ``stop`` (exclusive) is in the set."""
    if start >= stop:
        return True
    # The last pair that starts at or before ``start``.
    number = bisect_right(positions, start, key=lambda pair: pair[0]) - 1
    return number >= 0 and stop <= positions[number][1]


def largest(positions: Intervals, count: int) -> Intervals:
    """The ``count`` longest pairs."""
    if len(positions) <= count:
        return positions
    return tuple(sorted(sorted(positions, key=lambda pair: pair[0] - pair[1])[:count]))

"""Sets of byte positions, against sets of integers."""

import itertools
from collections.abc import Iterable
from random import Random

import pytest

from exportd.counting.intervals import includes, join, largest, subtract


def some_pairs(random: Random) -> list[tuple[int, int]]:
    return [
        (start, start + random.randint(0, 8)) for start in random.choices(range(40), k=random.randint(0, 8))
    ]


def positions(pairs: Iterable[tuple[int, int]]) -> set[int]:
    return {position for start, stop in pairs for position in range(start, stop)}


@pytest.mark.parametrize("seed", range(10))
def test_intervals_are_sets_of_positions(seed: int) -> None:
    random = Random(seed)
    for _ in range(200):
        first, second = some_pairs(random), some_pairs(random)
        both = join(first, second)
        assert positions(both) == positions(first) | positions(second)
        assert all(stop < start for (_, stop), (start, _) in itertools.pairwise(both))
        assert positions(subtract(join(first), join(second))) == positions(first) - positions(second)
        start, stop = random.randint(0, 40), random.randint(0, 48)
        assert includes(both, start, stop) == (set(range(start, stop)) <= positions(both))


def test_the_longest_pairs_stay_in_order() -> None:
    assert largest(((0, 1), (3, 9), (10, 11), (20, 25)), 2) == ((3, 9), (20, 25))

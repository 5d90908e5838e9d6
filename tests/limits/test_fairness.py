"""Max-min fairness, by its definition."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exportd.limits.fairness import share, share_by_group

DEMANDS = st.lists(st.floats(0, 1e9) | st.just(math.inf), min_size=1, max_size=30)


@given(st.floats(1, 1e9), DEMANDS)
def test_the_whole_is_given_and_nobody_who_wants_more_gets_less(total: float, demands: list[float]) -> None:
    rates = share(total, demands)
    assert sum(rates) == pytest.approx(total)
    for rate, demand in zip(rates, demands, strict=True):
        if rate < demand * (1 - 1e-9):
            assert rate >= max(rates) * (1 - 1e-9) - 1e-6


def test_an_unused_share_goes_to_the_others() -> None:
    assert share(100, [math.inf, 10, math.inf]) == [45, 10, 45]
    assert share(100, [10, 20]) == [45, 55]


@given(st.floats(1, 1e9), st.lists(st.tuples(st.sampled_from("abc"), st.just(math.inf)), min_size=1))
def test_groups_share_equally_whatever_their_size(total: float, members: list[tuple[str, float]]) -> None:
    rates = share_by_group(total, members)
    sums = {group: 0.0 for group, _ in members}
    for (group, _), rate in zip(members, rates, strict=True):
        sums[group] += rate
    assert list(sums.values()) == pytest.approx([total / len(sums)] * len(sums))


def test_a_connection_that_stands_still_costs_its_group_nothing() -> None:
    rates = share_by_group(90, [("ann", math.inf), ("ann", 0.0), ("eve", math.inf)])
    assert rates == [45, 0, 45]

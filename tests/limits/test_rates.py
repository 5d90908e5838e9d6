"""Request rates: what is let through, what is remembered, and in how much memory."""

import multiprocessing
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exportd.limits.memory import make_shared_memory
from exportd.limits.rates import Rates


@pytest.fixture
def rates() -> Rates:
    return Rates(make_shared_memory(1))


def test_a_minute_s_worth_may_come_at_once_and_no_more(rates: Rates) -> None:
    assert [rates.take("ann", 10, now=100.0) for _ in range(10)] == [0.0] * 10
    assert rates.take("ann", 10, now=100.0) == pytest.approx(6)
    assert rates.take("ann", 10, now=102.0) == pytest.approx(4)
    assert rates.take("ann", 10, now=106.0) == 0
    assert rates.take("ann", 10, now=106.0) == pytest.approx(6)
    assert rates.take("eve", 10, now=106.0) == 0
    assert [rates.take("ann", 10, now=300.0) for _ in range(11)].count(0.0) == 10


@given(st.integers(1, 1000), st.lists(st.floats(0, 20), max_size=300))
def test_in_no_minute_more_than_twice_the_rate(per_minute: int, gaps: list[float]) -> None:
    rates, now, taken = Rates(make_shared_memory(1)), 0.0, []
    for gap in gaps:
        now += gap
        wait = rates.take("x", per_minute, now)
        assert wait >= 0
        if wait:
            assert rates.take("x", per_minute, now + wait + 1e-3) == 0
            now += wait + 1e-3
        taken.append(now)
    for start in taken:
        assert sum(start <= at < start + 60 for at in taken) <= 2 * per_minute


def test_any_number_of_addresses_takes_no_memory_and_does_not_wash_out_who_is_at_the_limit() -> None:
    shared = make_shared_memory(1)
    rates, noise = Rates(shared), random.Random(1)
    size = len(shared.memory)
    for _ in range(10):
        rates.take("busy", 10, now=0.0)
    for n in range(200_000):
        rates.take(f"{noise.getrandbits(32)}", 600, now=n / 20_000)
        if n % 1_000 == 0:
            assert rates.take("busy", 10, now=0.0) > 0
    assert len(shared.memory) == size


def _take(rates: Rates, count: int) -> None:
    for _ in range(count):
        rates.take("ann", 1000, now=0.0)


def test_processes_count_together() -> None:
    rates = Rates(make_shared_memory(3))
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        process = context.Process(target=_take, args=(rates, 400))
        process.start()
        process.join()
    passed = 0
    while not rates.take("ann", 1000, now=0.0):
        passed += 1
    assert passed == 200

"""Quantiles of durations from a bounded number of counters."""

from __future__ import annotations

import random

import pytest

from teegpu.stats.totals import Latencies


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_a_quantile_is_within_one_percent(fraction: float) -> None:
    chance = random.Random(1)
    values = sorted(chance.lognormvariate(-5, 2) for _ in range(5001))
    counted = Latencies()
    for value in values:
        counted.add(value)
    exact = values[max(0, -(-round(fraction * 1e9) * len(values) // 10**9) - 1)]
    assert counted.quantile(fraction) == pytest.approx(exact, rel=0.0101)
    assert counted.max_seconds == values[-1]
    assert (counted.quantile(1.0) or 0) <= counted.max_seconds


def test_the_order_does_not_matter() -> None:
    values = [0.001 * number for number in range(1, 200)]
    one, other = Latencies(), Latencies()
    for value in values:
        one.add(value)
    for value in reversed(values):
        other.add(value)
    assert one == other


def test_without_any_there_is_none() -> None:
    assert Latencies().quantile(0.5) is None


def test_counters_are_bounded_whatever_comes() -> None:
    counted = Latencies()
    chance = random.Random(2)
    for _ in range(20_000):
        counted.add(10 ** chance.uniform(-12, 9))
    counted.add(0.0)
    counted.add(-5.0)
    assert len(counted.counts) <= 1396
    assert counted.count == 20_002

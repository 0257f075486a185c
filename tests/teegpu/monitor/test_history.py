"""Series in bounded memory, and rates."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teegpu.monitor.history import PassSeries, Rates, Series


@given(st.lists(st.floats(0, 1e5), min_size=1, max_size=300))
def test_nothing_is_lost_or_counted_twice(times: list[float]) -> None:
    series = Series(2, most=16)
    for at in sorted(times):
        series.add(at, (1.0, 2.0))
    rows = series.rows()
    assert len(rows) <= 16
    assert sum(row[0] for _, row in rows) == len(times)
    assert sum(row[1] for _, row in rows) == 2 * len(times)
    assert max(times) < len(rows) * series.seconds


def test_stretches_become_longer() -> None:
    series = Series(1, seconds=1.0, most=4)
    for second in range(9):
        series.add(float(second), (1.0,))
    assert series.seconds == 4.0
    assert [(at, row[0]) for at, row in series.rows()] == [(0.0, 4.0), (4.0, 4.0), (8.0, 1.0)]


@pytest.mark.parametrize("passes", [1, 7, 8, 9, 64, 1000])
def test_passes_keep_their_means(passes: int) -> None:
    series = PassSeries(2, most=8)
    for _ in range(passes):
        series.add((3.0, 5.0))
    rows = series.column(0, 2)
    assert len(rows) <= 8
    assert all(row == pytest.approx((3.0, 5.0)) for row in rows)
    assert 0 <= passes - len(rows) * series.passes < series.passes


def test_rates_of_the_last_seconds() -> None:
    rates = Rates(seconds=2.0)
    for tenth in range(100):
        rates.add(tenth / 10, (float(tenth * tenth), float(tenth)))
    assert rates.at(9.9)[1] == pytest.approx(10.0)
    assert rates.at(9.9)[0] == pytest.approx((99**2 - 79**2) / 2)
    assert rates.at(30.0) == (0.0, 0.0)


def test_no_rate_before_the_second_reading() -> None:
    rates = Rates()
    assert rates.at(1.0) == ()
    rates.add(0.0, (1.0,))
    assert rates.at(1.0) == ()


def test_readings_are_few() -> None:
    rates = Rates(seconds=1.0, spacing_seconds=0.1)
    for reading in range(10_000):
        rates.add(reading / 10_000, (float(reading),))
    assert len(rates._readings) <= 12
    assert rates.at(1.0)[0] == pytest.approx(10_000, rel=0.01)

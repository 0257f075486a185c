from __future__ import annotations

import pytest

from teegpu.gpu.load import Busy

SECOND = 1_000_000_000


def test_the_share_of_the_last_ten_seconds() -> None:
    busy = Busy(0)
    busy.add(0, 5 * SECOND)
    assert busy.share(10 * SECOND) == pytest.approx(0.5, abs=0.03)
    assert busy.share(13 * SECOND) == pytest.approx(0.2, abs=0.03)
    assert busy.share(60 * SECOND) == 0.0


def test_right_after_the_start_the_time_since_then_counts() -> None:
    busy = Busy(100 * SECOND)
    assert busy.share(100 * SECOND) == 0.0
    busy.add(100 * SECOND, 101 * SECOND)
    assert busy.share(102 * SECOND) == pytest.approx(0.5)


def test_a_request_that_took_longer_than_the_window_fills_it() -> None:
    busy = Busy(0)
    busy.add(SECOND, 300 * SECOND)
    assert busy.share(300 * SECOND) == pytest.approx(1.0)
    assert busy.share(305 * SECOND) == pytest.approx(0.5, abs=0.03)


def test_many_small_requests_add_up() -> None:
    busy = Busy(0)
    for number in range(1000):
        busy.add(number * SECOND // 100, number * SECOND // 100 + SECOND // 400)
    assert busy.share(10 * SECOND) == pytest.approx(0.25, abs=0.01)

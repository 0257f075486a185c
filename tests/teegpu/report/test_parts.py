"""The parts of a phase, and that their shares add up as they are printed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teegpu.report.parts import breakdown, rounded, took_place
from tests.teegpu.report.samples import DECODE, PREFILL

SECONDS = st.floats(0, 1e6, allow_nan=False)


def test_the_shares_of_all_parts_add_up() -> None:
    parts = breakdown(PREFILL)
    assert sum(item.tenths for item in parts.items) == 1000
    assert sum(item.exposed for item in parts.items) == pytest.approx(2.0)


def test_operations_of_the_server_share_what_was_waited_for() -> None:
    gpu = {item.name: item for item in breakdown(PREFILL).gpu}
    assert list(gpu) == ["EMBEDDING", "LINEAR", "MATMUL", "LM_HEAD", "ADD"]
    assert gpu["LINEAR"].seconds == 0.75
    assert gpu["LINEAR"].exposed == pytest.approx(0.25)  # 0.75 of 0.9 s busy, of which 0.3 s were waited for
    assert gpu["LINEAR"].average == pytest.approx(0.75 / 210)
    assert sum(item.tenths for item in gpu.values()) == 150
    assert (gpu["MATMUL"].count, gpu["MATMUL"].average, gpu["MATMUL"].tenths) == (0, None, 0)


def test_what_the_operations_leave_out_has_a_row_of_its_own() -> None:
    parts = breakdown(PREFILL)
    tee = {item.name: item for item in parts.tee}
    assert list(tee) == ["RMSNORM", "ROTARY", "ATTENTION", "SILU", "KV_CACHE", "ADD", "others"]
    assert tee["others"].seconds == pytest.approx(0.05)
    assert tee["others"].count is None
    assert "others" not in [item.name for item in breakdown(DECODE).tee]


def test_a_softmax_of_its_own_keeps_its_row() -> None:
    phase = PREFILL | {"ops": {"SOFTMAX": {"where": "tee", "count": 1, "seconds": 0.5}}}
    assert [item.name for item in breakdown(phase).tee] == ["RMSNORM", "ROTARY", "SOFTMAX", "SILU"]


def test_time_that_no_part_has_is_other() -> None:
    parts = breakdown(PREFILL | {"seconds": 2.5})
    assert parts.other.exposed == pytest.approx(0.55)
    assert sum(item.tenths for item in parts.items) == 1000


def test_parts_above_the_wall_are_seen() -> None:
    assert breakdown(PREFILL).excess == pytest.approx(0)
    parts = breakdown(PREFILL | {"seconds": 1.6})
    assert parts.excess == pytest.approx(0.25)
    assert sum(item.tenths for item in parts.items) == 1000


def test_a_phase_that_has_not_ended_has_the_time_of_its_parts() -> None:
    parts = breakdown(PREFILL | {"seconds": 0.0, "passes": 0})
    assert parts.wall == pytest.approx(2.0)
    assert took_place(PREFILL | {"seconds": 0.0, "passes": 0})


@pytest.mark.parametrize("phase", [{}, {"ops": []}, {"seconds": "x", "ops": {"LINEAR": None}, "busy": 3}])
def test_a_phase_without_figures(phase: dict[str, object]) -> None:
    parts = breakdown(phase)
    assert (parts.wall, sum(item.tenths for item in parts.items)) == (0, 0)
    assert not took_place(phase)


@given(st.lists(SECONDS, min_size=1, max_size=40))
def test_rounding_adds_up_and_stays_near(values: list[float]) -> None:
    tenths = rounded(values, 1000)
    total = sum(values)
    if total == 0:
        assert tenths == [0] * len(values)
        return
    assert sum(tenths) == 1000
    assert all(abs(value / total * 1000 - tenth) < 1.000001 for value, tenth in zip(values, tenths, strict=True))


def test_rounding_gives_what_is_left_to_the_largest_remainders() -> None:
    assert rounded([1, 1, 1], 1000) == [334, 333, 333]
    assert rounded([999.6, 0.4], 1000) == [1000, 0]

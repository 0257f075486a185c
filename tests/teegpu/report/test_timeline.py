"""When the time of a phase went where."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teegpu.record import events as ev
from teegpu.report.timeline import STEPS, Timeline, timelines
from tests.teegpu.report.samples import events


def total(timeline: Timeline, part: str) -> float:
    return sum(step.get(part, 0.0) for step in timeline.steps)


def test_parts_as_the_summary_has_them() -> None:
    prefill = timelines(events())[ev.PREFILL]
    assert prefill.seconds == pytest.approx(0.1)
    assert total(prefill, "tee") == pytest.approx(0.035)
    assert total(prefill, "serialization") == pytest.approx(0.02)
    assert total(prefill, "other") == pytest.approx(0.01)
    waits = sum(total(prefill, part) for part in ("network", "server", "gpu"))
    assert waits == pytest.approx(0.035)
    assert total(prefill, "gpu") > 0


def test_each_phase_has_its_own_and_begins_at_0() -> None:
    decode = timelines(events())[ev.DECODE]
    assert decode.seconds == pytest.approx(0.1)
    assert decode.steps[0] == {"tee": pytest.approx(decode.step_seconds)}


def test_phases_of_several_prompts_follow_each_other() -> None:
    assert timelines([*events(), *events()])[ev.PREFILL].seconds == pytest.approx(0.2)


def test_events_outside_of_a_phase_are_left_out() -> None:
    assert timelines([ev.Lap(0, 10**9, ev.TEE, "SILU", 0, 0, 0)]) == {}


@settings(max_examples=50)
@given(st.lists(st.floats(0.0001, 40), min_size=1, max_size=60))
def test_nothing_is_lost_and_steps_stay_few(lengths: list[float]) -> None:
    timeline, at = Timeline(), 0.0
    for place, length in enumerate(lengths):
        timeline.add(at, at + length, ("tee", "network")[place % 2])
        at += length
    assert len(timeline.steps) <= STEPS
    assert total(timeline, "tee") == pytest.approx(sum(lengths[::2]), rel=1e-6)
    assert total(timeline, "network") == pytest.approx(sum(lengths[1::2]), rel=1e-6, abs=1e-12)
    assert all(sum(step.values()) <= timeline.step_seconds * (1 + 1e-6) for step in timeline.steps)

"""How many groups a fleet wants, of what they are busy with."""

from __future__ import annotations

import pytest

from teegpu.fleet.scaling import Load, Scaling
from teegpu.settings import FleetSettings

SETTINGS = FleetSettings(busy_share=0.8, queue_seconds=0.1, grow_seconds=10, shrink_seconds=60)
IDLE, BUSY, QUEUED = Load(0.1), Load(0.9), Load(0.4, 0.2)


def after(scaling: Scaling, begin: float, seconds: float, load: Load, answering: int | None = None) -> list[int]:
    """What it wants in each of the next ``seconds``, where as many answer as it wants, or ``answering``."""
    return [
        scaling.decide(begin + second, [load] * (scaling.wanted if answering is None else answering))
        for second in range(int(seconds))
    ]


@pytest.mark.parametrize("load", [BUSY, QUEUED])
def test_one_more_for_what_lasts(load: Load) -> None:
    scaling = Scaling(1, 3, SETTINGS)
    wanted = after(scaling, 0, 60, load)
    assert wanted[:10] == [1] * 10
    assert wanted[10:21] == [2] * 11
    assert set(wanted[21:]) == {3}, "and never more than the most"


def test_a_peak_is_not_followed() -> None:
    scaling = Scaling(1, 3, SETTINGS)
    for begin in range(0, 100, 10):
        assert set(after(scaling, begin, 9, BUSY) + after(scaling, begin + 9, 1, Load(0.5))) == {1}


def test_one_fewer_where_the_others_can_do_it() -> None:
    scaling = Scaling(1, 3, SETTINGS)
    scaling.wanted = 3
    wanted = after(scaling, 0, 200, IDLE)
    assert (wanted[59], wanted[60], wanted[120], wanted[121]) == (3, 2, 2, 1)
    assert min(wanted) == 1, "and never fewer than the least"


def test_what_one_fewer_would_be_too_busy_with_stays() -> None:
    """Between the two bounds nothing changes: else one would go, and come again, for ever."""
    scaling = Scaling(1, 2, SETTINGS)
    scaling.wanted = 2
    assert set(after(scaling, 0, 500, Load(0.35))) == {2}, "0.7 for one is below what starts another, and too near"
    assert after(scaling, 500, 100, Load(0.25))[-1] == 1


def test_a_line_keeps_a_group_that_is_little_used() -> None:
    scaling = Scaling(1, 2, SETTINGS)
    scaling.wanted = 2
    assert set(after(scaling, 0, 200, Load(0.1, 0.09))) == {2}


def test_one_that_has_no_room_keeps_nobody_who_is_not_needed() -> None:
    scaling = Scaling(1, 4, SETTINGS)
    scaling.wanted = 4
    assert after(scaling, 0, 61, IDLE, answering=3)[-1] == 3
    assert after(scaling, 61, 200, IDLE)[-1] == 1


def test_while_groups_are_missing_no_more_are_wanted() -> None:
    scaling = Scaling(1, 3, SETTINGS)
    scaling.wanted = 2
    assert set(after(scaling, 0, 200, BUSY, answering=1) + after(scaling, 200, 200, IDLE, answering=0)) == {2}
    assert after(scaling, 400, 11, BUSY)[-1] == 3, "and what came before does not count"

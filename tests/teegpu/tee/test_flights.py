"""How many parts of a step are under way at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from teegpu.tee import flights
from teegpu.tee.flights import KEPT_STEPS, TRIALS, WAYS, Flights

TRIED = len(WAYS) * TRIALS


def play(one: Flights, steps: int, seconds: Callable[[int], float], most: int = 8) -> list[int]:
    chosen = []
    for _ in range(steps):
        chosen.append(one.choose(most))
        one.took(chosen[-1], 16, 16 * seconds(chosen[-1]))
    return chosen


@pytest.mark.parametrize("quickest", WAYS)
def test_the_quickest_is_kept(quickest: int) -> None:
    one = Flights()
    tried = play(one, TRIED, lambda ways: 1.0 if ways == quickest else 1.08)
    assert {ways: tried.count(ways) for ways in tried} == dict.fromkeys(WAYS, TRIALS)
    assert play(one, KEPT_STEPS, lambda _: 1.0) == [quickest] * KEPT_STEPS


def test_where_two_cost_much_four_are_not_tried() -> None:
    one = Flights()
    chosen = play(one, 2 * TRIALS + KEPT_STEPS, lambda ways: 1.0 if ways == 1 else 1.2)
    assert chosen == [1] * TRIALS + [2] * TRIALS + [1] * KEPT_STEPS


def test_one_slow_step_decides_nothing() -> None:
    times = iter([9.0, *[1.0] * (TRIED - 1)])
    one = Flights()
    play(one, TRIED, lambda ways: next(times) * (0.5 if ways == one.choose(8) == WAYS[-1] else 1.0))
    assert one.best == WAYS[-1]


def test_what_saves_next_to_nothing_is_not_worth_it() -> None:
    one = Flights()
    play(one, TRIED, lambda ways: 1.0 if ways == 1 else 0.97)
    assert one.best == 1


def test_no_more_than_there_are_parts() -> None:
    assert max(play(Flights(), TRIED + 5, lambda ways: 1 / ways, most=2)) == 2


def test_it_is_tried_again_and_more_rarely_while_the_same_one_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flights, "MOST_KEPT_STEPS", 4 * KEPT_STEPS)
    one = Flights()
    between = []
    for _ in range(4):
        play(one, TRIED, lambda ways: 2.0 - ways / 8)
        kept = 0
        while len(set(play(one, 1, lambda ways: 2.0 - ways / 8))) == 1 and not one._left:
            kept += 1
        between.append(kept + 1)
    assert between == [KEPT_STEPS, 2 * KEPT_STEPS, 4 * KEPT_STEPS, 4 * KEPT_STEPS]
    play(one, TRIED, lambda ways: float(ways))
    assert one.best == 1

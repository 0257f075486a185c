"""Whom a run waits for is told, and no more often than it helps."""

from __future__ import annotations

from teegpu.remote.waiting import NOTHING_WRONG, Waiting

A, B = "tcp://a:1", "tcp://b:1"


class Told:
    """What was told at each tick; the clock is ours."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.why = {A: "refused", B: ""}
        self.waiting = Waiting(self.lines.append, lambda address, _: self.why[address])

    def at(self, seconds: float, *addresses: str) -> list[str]:
        """What is told from now on, up to the end of the look that may be under way."""
        before = len(self.lines)
        self.waiting.tick("waiting for", addresses, int(seconds * 1e9), 10 - seconds)
        if self.waiting._looking is not None:
            self.waiting._looking.join()
        self.waiting.tick("waiting for", addresses, int(seconds * 1e9), 10 - seconds)
        return self.lines[before:]


def test_a_short_wait_is_not_told_of() -> None:
    told = Told()
    assert told.at(0.0, A) == told.at(0.9, A) == []
    told.waiting.over()
    assert told.lines == []


def test_who_is_waited_for_why_and_for_how_long() -> None:
    told = Told()
    told.at(0.0, A, B)
    (line,) = told.at(1.0, A, B)
    assert line == f"waiting for tcp://a:1: refused; tcp://b:1: {NOTHING_WRONG}; trying for another 9 s"
    assert told.at(3.0, A, B) == []
    told.why[A] = "says nothing"
    assert "says nothing" in told.at(4.5, A, B)[-1]
    assert told.at(12.0, B) == [f"waiting for tcp://b:1: {NOTHING_WRONG}"]
    told.waiting.over()
    assert told.lines[-1] == "a server answers: going on"


def test_the_next_wait_is_another() -> None:
    told = Told()
    told.at(0.0, A)
    told.at(1.0, A)
    told.waiting.over()
    assert told.at(20.0, A) == []
    assert len(told.at(21.0, A)) == 1

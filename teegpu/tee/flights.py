"""How many parts of a step are under way at once, found by trying.

Sequences whose rows are one step wait together for every reply. As two steps, each with half of them, the products of
one cross the link and are computed while the other waits: that pays where a reply takes long, and costs where both
sides share the cores, or where a product of many rows takes hardly longer than one of few. So each way is tried for a
few steps, and the one that took least for a row is kept for a while."""

from __future__ import annotations

from typing import Final

WAYS: Final = (1, 2, 4)
TRIALS: Final = 2
"""Steps of each way, of which the quicker one counts: a step now and then has another's work in it."""

HOPELESS: Final = 1.1
"""Times what fewer parts took: with still more of them it would take longer yet."""

KEPT_STEPS: Final = 128
MOST_KEPT_STEPS: Final = 4096
"""Before all are tried again: at first, and once the same one has won again and again."""

WORTH: Final = 0.95
"""Of the time of one step at a time: what saves less is noise."""


class Flights:
    """The choice for steps of one kind. ``took`` is told of each that ``choose`` was asked about."""

    def __init__(self) -> None:
        self.best = 1
        self._left = _trials()
        self._seconds: dict[int, float] = {}
        self._keep = KEPT_STEPS
        self._kept = 0

    def choose(self, most: int) -> int:
        """How many at once, at ``most``."""
        return min(self._left[0] if self._left else self.best, most)

    def took(self, ways: int, rows: int, seconds: float) -> None:
        """A step of ``rows`` rows, of which ``ways`` parts were under way at once, took ``seconds``."""
        if self._left:
            self._seconds[ways] = min(seconds / rows, self._seconds.get(ways, float("inf")))
            tried = self._left.pop(0)
            over = tried not in self._left and self._seconds[ways] > HOPELESS * min(self._seconds.values())
            if over or not self._left:
                self._left.clear()
                self._decide()
            return
        self._kept += 1
        if self._kept >= self._keep:
            self._kept = 0
            self._left = _trials()

    def _decide(self) -> None:
        found, self._seconds = self._seconds, {}
        best = min(found, key=lambda ways: (found[ways], ways))
        if found[best] > WORTH * found.get(1, found[best]):
            best = 1
        self._keep = min(2 * self._keep, MOST_KEPT_STEPS) if best == self.best else KEPT_STEPS
        self.best = best


def _trials() -> list[int]:
    return [ways for ways in WAYS for _ in range(TRIALS)]

"""How many groups a fleet should have. Pure: what they are busy with goes in, a number comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from teegpu.settings import FleetSettings

_SLACK = 0.7
"""One fewer must leave those that stay this far below what would start one more: else they come and go for ever."""


@dataclass(frozen=True, slots=True)
class Load:
    """``busy_share``: the part of the last seconds in which a group computed. ``queue_seconds``: how long a request
    stands in its line."""

    busy_share: float = 0.0
    queue_seconds: float = 0.0


class Scaling:
    """``wanted`` groups, from ``least`` to ``most``."""

    def __init__(self, least: int, most: int, settings: FleetSettings) -> None:
        self.least, self.most, self.wanted = least, most, least
        self._settings = settings
        self._since: tuple[int, float] = (0, 0.0)

    def decide(self, now: float, loads: Sequence[Load]) -> int:
        """``loads``: of the groups that answer. Where these are fewer than wanted, that they are busy tells nothing of
        how many are needed."""
        step = self._step(loads) if loads else 0
        if step != self._since[0]:
            self._since = (step, now)
        patience = self._settings.grow_seconds if step > 0 else self._settings.shrink_seconds
        if step and now - self._since[1] >= patience and self.least <= self.wanted + step <= self.most:
            self.wanted += step
            self._since = (0, now)
        return self.wanted

    def _step(self, loads: Sequence[Load]) -> int:
        busy = sum(load.busy_share for load in loads)
        queue = sum(load.queue_seconds for load in loads) / len(loads)
        highest, longest = self._settings.busy_share, self._settings.queue_seconds
        if busy >= highest * len(loads) or queue >= longest:
            return int(len(loads) >= self.wanted)
        fewer = min(len(loads), self.wanted - 1)
        return -1 if busy <= _SLACK * highest * fewer and queue <= _SLACK * longest else 0

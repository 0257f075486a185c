"""Series over a whole run in bounded memory, and rates over its last moments. Pure: times are given."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence


class Series:
    """Sums of ``width`` values per stretch of time, at most ``most`` stretches.

    When there are more, neighbours are added together and the stretches become twice as long: the whole run is kept,
    however long it gets, and no value is lost or counted twice.
    """

    def __init__(self, width: int, *, seconds: float = 0.25, most: int = 512) -> None:
        self.seconds = seconds
        self._width = width
        self._most = most
        self._rows: list[array[float]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, at_seconds: float, values: Sequence[float]) -> None:
        """Adds ``values`` to the stretch that ``at_seconds`` (from the run's start) falls in."""
        place = max(0, int(at_seconds / self.seconds))
        while place >= self._most:
            self._halve()
            place = int(at_seconds / self.seconds)
        rows = self._rows
        while len(rows) <= place:
            rows.append(array("d", bytes(8 * self._width)))
        row = rows[place]
        for index, value in enumerate(values):
            row[index] += value

    def _halve(self) -> None:
        self._rows = _pairs_added(self._rows)
        self.seconds *= 2

    def rows(self) -> list[tuple[float, array[float]]]:
        """(start in seconds, sums) of each stretch, in order."""
        return [(index * self.seconds, row) for index, row in enumerate(self._rows)]


class PassSeries:
    """Means of ``width`` values over passes, at most ``most`` columns. As ``Series``, but counted in passes."""

    def __init__(self, width: int, *, most: int = 240) -> None:
        self.passes = 1
        self._width = width
        self._most = most
        self._rows: list[array[float]] = []
        self._open = array("d", bytes(8 * width))
        self._held = 0

    def add(self, values: Sequence[float]) -> None:
        row = self._open
        for index, value in enumerate(values):
            row[index] += value
        self._held += 1
        if self._held < self.passes:
            return
        self._rows.append(row)
        self._open = array("d", bytes(8 * self._width))
        self._held = 0
        if len(self._rows) >= self._most:
            self._rows = _pairs_added(self._rows)
            self.passes *= 2

    def column(self, first: int, count: int) -> list[tuple[float, ...]]:
        """Values ``first`` to ``first + count`` of each row: means per pass."""
        by = self.passes
        return [tuple(value / by for value in row[first : first + count]) for row in self._rows]


def _pairs_added(rows: list[array[float]]) -> list[array[float]]:
    added = []
    for index in range(0, len(rows) - 1, 2):
        first, second = rows[index], rows[index + 1]
        added.append(array("d", [a + b for a, b in zip(first, second, strict=True)]))
    if len(rows) % 2:
        added.append(rows[-1])
    return added


class Rates:
    """Per-second rates of counters over the last ``seconds``. Keeps a bounded number of readings."""

    def __init__(self, *, seconds: float = 3.0, spacing_seconds: float = 0.1) -> None:
        self._seconds = seconds
        self._spacing = spacing_seconds
        self._readings: deque[tuple[float, tuple[float, ...]]] = deque()

    def add(self, at_seconds: float, counters: tuple[float, ...]) -> None:
        readings = self._readings
        if len(readings) >= 2 and at_seconds - readings[-2][0] < self._spacing:
            readings[-1] = (at_seconds, counters)
        else:
            readings.append((at_seconds, counters))
        # One reading from before the window stays: what has changed since is what the window saw.
        while len(readings) > 2 and readings[1][0] <= at_seconds - self._seconds:
            readings.popleft()

    def at(self, now_seconds: float) -> tuple[float, ...]:
        """Rates up to ``now_seconds``, each 0 where nothing moved. Empty before the second reading."""
        readings = self._readings
        if len(readings) < 2:
            return ()
        since, latest = now_seconds - self._seconds, readings[-1][1]
        before = readings[0]
        for reading in readings:
            if reading[0] > since:
                break
            before = reading
        elapsed = max(now_seconds - before[0], 1e-9)
        return tuple((new - old) / elapsed for new, old in zip(latest, before[1], strict=True))

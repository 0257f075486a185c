"""What a run's own requests tell about its link: round-trip time, and bandwidth each way. Pure.

A request's time on the network is its round trip less what the server claims for itself. Of a request that was alone on
the link it is ``rtt + bytes_up / up + bytes_down / down``, and whatever else happened (a process that woke late,
another program's traffic) has only added to it. So of requests of like size the quickest counts, and the three figures
are the non-negative least squares through those (``_lower_fit``), errors taken as shares of the time.

Requests that overlap wait for each other on the link, which the quickest of them tell too little of. There the
bandwidth is also the best sustained throughput: bytes between two replies that the runner was waiting for (so it saw
them arrive when they arrived), at least ``WINDOW_SECONDS`` apart. The larger of the two figures counts, as both err to
the low side.

Errors, as the tests have them: the bandwidth of a link that decides is within 5 % (15 % from few requests on a busy
machine), the RTT within 1 ms; it includes what both sides need to hand over a message, 0.1 to 0.8 ms. Where requests
overlap, a direction that was not full may be up to half too low. Several servers are taken for one link.

Memory is bounded: one entry for each size class of requests, and the points of one window.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from teegpu.record.events import Rpc
from teegpu.stats.leastsquares import Row, least_squares

Source = Literal["given", "measured", "unknown"]

MIN_REQUESTS: Final = 8
"""Fewer say nothing: the first ones carry what both sides do only once."""
WINDOW_SECONDS: Final = 0.2
POINT_SECONDS: Final = 0.005
CLASSES_PER_OCTAVE: Final = 8
MAX_CLASSES: Final = 1024
FULL_WEIGHT: Final = 8
"""Requests in a class from which on its quickest is believed fully."""
REFITS: Final = 4
LATE: Final = 0.02
"""Lateness, as a share of the time, from which on a class counts half or less in the next fit."""
MIN_TRANSFER_SHARE: Final = 0.1
MIN_TRANSFER_SECONDS: Final = 0.0001
"""A direction's bandwidth is known where the largest request spent at least so much on it: as a share of its network
time, and in seconds. Less is lost in the noise."""


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """A link. None where the figure is not known; a bandwidth of None with ``given`` is a link without a limit."""

    rtt_seconds: float | None = None
    bandwidth_up_bytes_per_second: float | None = None
    bandwidth_down_bytes_per_second: float | None = None
    source: Source = "unknown"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LinkFigures:
        source = value.get("source")
        return cls(
            _positive(value.get("rtt_seconds"), zero=True),
            _positive(value.get("bandwidth_up_bytes_per_second")),
            _positive(value.get("bandwidth_down_bytes_per_second")),
            source if source in ("given", "measured") else "unknown",
        )


def _positive(value: object, zero: bool = False) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value) if value > 0.0 or (zero and value == 0.0) else None


@dataclass(slots=True)
class _Class:
    """The quickest of the requests of like size."""

    up: int
    down: int
    seconds: float
    count: int = 0


class LinkEstimator:
    """Takes a run's requests as they end. ``waited`` is told of each reply that the runner had been waiting for, after
    ``add`` of its request."""

    def __init__(self) -> None:
        self._requests = 0
        self._alone: dict[tuple[int, int], _Class] = {}
        self._any: dict[tuple[int, int], _Class] = {}
        self._pending: tuple[Rpc, float, bool] | None = None
        self._last_received_ns = -1
        self._bytes_up = 0
        self._bytes_down = 0
        self._points: deque[tuple[int, int, int]] = deque()
        self._sustained_up = 0.0
        self._sustained_down = 0.0

    def add(self, rpc: Rpc, network_seconds: float) -> None:
        """A request and its time on the network: the round trip less what the server took."""
        self._bytes_up += rpc.bytes_up
        self._bytes_down += rpc.bytes_down
        if rpc.attempts > 1 or network_seconds <= 0.0:
            return
        self._requests += 1
        if self._pending is not None:
            before, seconds, began_alone = self._pending
            self._take(before, seconds, began_alone and rpc.sent_ns >= before.received_ns)
        self._pending = (rpc, network_seconds, rpc.sent_ns >= self._last_received_ns)
        self._last_received_ns = max(self._last_received_ns, rpc.received_ns)

    def waited(self, received_ns: int) -> None:
        points = self._points
        if points and received_ns < points[-1][0] + POINT_SECONDS * 1e9:
            return
        points.append((received_ns, self._bytes_up, self._bytes_down))
        while len(points) > 1 and points[1][0] <= received_ns - WINDOW_SECONDS * 1e9:
            points.popleft()
        began_ns, up, down = points[0]
        seconds = (received_ns - began_ns) / 1e9
        if seconds >= WINDOW_SECONDS:
            self._sustained_up = max(self._sustained_up, (self._bytes_up - up) / seconds)
            self._sustained_down = max(self._sustained_down, (self._bytes_down - down) / seconds)

    def _take(self, rpc: Rpc, seconds: float, alone: bool) -> None:
        _keep(self._any, rpc, seconds)
        if alone:
            _keep(self._alone, rpc, seconds)

    def measured(self) -> LinkFigures:
        """What is known so far; may be asked at any time."""
        alone, every = self._alone, self._any
        if self._pending is not None:
            alone, every = _copied(alone), _copied(every)
            rpc, seconds, began_alone = self._pending
            _keep(every, rpc, seconds)
            if began_alone:
                _keep(alone, rpc, seconds)
        if self._requests < MIN_REQUESTS:
            return LinkFigures()
        rtt, up, down = _fit(list(alone.values()))
        if rtt is None:
            return LinkFigures()
        if up is None or down is None:
            least_up, least_down = _envelope(every.values(), rtt)
            up, down = up or least_up, down or least_down
        up = max(up, self._sustained_up) if up is not None else None
        down = max(down, self._sustained_down) if down is not None else None
        return LinkFigures(rtt, up, down, "measured")


def figures(given: Mapping[str, Any] | None, measured: LinkFigures) -> LinkFigures:
    """The link of a run: as it was given (an emulated one; see ``LinkFigures`` for the keys), else as measured. What a
    given link leaves without a limit is as measured, where it was."""
    if not given:
        return measured
    known = LinkFigures.from_json({**given, "source": "given"})
    return LinkFigures(
        known.rtt_seconds if known.rtt_seconds is not None else 0.0,
        known.bandwidth_up_bytes_per_second or measured.bandwidth_up_bytes_per_second,
        known.bandwidth_down_bytes_per_second or measured.bandwidth_down_bytes_per_second,
        "given",
    )


def _keep(classes: dict[tuple[int, int], _Class], rpc: Rpc, seconds: float) -> None:
    key = _size_class(rpc.bytes_up), _size_class(rpc.bytes_down)
    known = classes.get(key)
    if known is None:
        if len(classes) >= MAX_CLASSES:
            return
        known = classes[key] = _Class(rpc.bytes_up, rpc.bytes_down, seconds)
    known.count += 1
    if seconds < known.seconds:
        known.up, known.down, known.seconds = rpc.bytes_up, rpc.bytes_down, seconds


def _size_class(nbytes: int) -> int:
    return int(math.log2(nbytes) * CLASSES_PER_OCTAVE) if nbytes > 0 else -1


def _copied(classes: dict[tuple[int, int], _Class]) -> dict[tuple[int, int], _Class]:
    return {key: _Class(each.up, each.down, each.seconds, each.count) for key, each in classes.items()}


def _fit(classes: Sequence[_Class]) -> tuple[float | None, float | None, float | None]:
    """(rtt seconds, up, down bytes per second) of requests that were alone; None for what they do not tell."""
    if not classes:
        return None, None, None
    rows = [((1.0, float(each.up), float(each.down)), each.seconds, _weight(each)) for each in classes]
    least = min(each.seconds for each in classes)
    enough = sum(each.count for each in classes) >= MIN_REQUESTS
    solved = _lower_fit(rows) if enough else None
    if solved is None or solved[0] <= 0.0:
        # Few, of one size only, or nothing but transfer: the quickest exchange is the best that is known.
        return least, None, None
    rtt, up, down = solved
    # The quickest exchange bounds the RTT from above, whatever the fit says.
    return min(rtt, least), _bandwidth(up, classes, "up"), _bandwidth(down, classes, "down")


def _envelope(classes: Iterable[_Class], rtt: float) -> tuple[float | None, float | None]:
    """(up, down) bytes per second that the quickest requests show at least: no byte of them took longer than all."""
    up = down = 0.0
    for each in classes:
        transfer = each.seconds - rtt
        if transfer >= max(MIN_TRANSFER_SECONDS, 0.25 * each.seconds):
            up, down = max(up, each.up / transfer), max(down, each.down / transfer)
    return up or None, down or None


def _bandwidth(seconds_per_byte: float, classes: Iterable[_Class], direction: Literal["up", "down"]) -> float | None:
    """Bytes per second, or None where no request spent enough time on that direction to tell."""
    if seconds_per_byte <= 0.0:
        return None
    for each in classes:
        spent = (each.up if direction == "up" else each.down) * seconds_per_byte
        if spent >= max(MIN_TRANSFER_SECONDS, MIN_TRANSFER_SHARE * each.seconds):
            return 1.0 / seconds_per_byte
    return None


def _weight(each: _Class) -> float:
    return min(each.count, FULL_WEIGHT) / FULL_WEIGHT / each.seconds**2


def _lower_fit(rows: Sequence[Row]) -> list[float] | None:
    """Least squares that trust what lies low: requests can be late, never early, so those above the fit count less in
    the next one."""
    solved = least_squares(rows)
    for _ in range(REFITS):
        if solved is None:
            break
        weighed = []
        for given, seconds, weight in rows:
            late = max(0.0, 1.0 - sum(x * v for x, v in zip(given, solved, strict=True)) / seconds)
            weighed.append((given, seconds, weight / (1.0 + (late / LATE) ** 2)))
        solved = least_squares(weighed)
    return solved

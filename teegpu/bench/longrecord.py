"""A long run's events out of a short one's: its decode passes again and again, their times moved on. Pure.

Nobody has to generate for an hour in order to see what an hour's record does to who reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from teegpu.errors import TeegpuError
from teegpu.metrics import events as ev

_TIMES: Final[dict[type[Any], tuple[int, ...]]] = {
    ev.PhaseBegan: (0,),
    ev.PhaseEnded: (0,),
    ev.Lap: (0, 1),
    ev.Rpc: (ev.Rpc._fields.index("sent_ns"), ev.Rpc._fields.index("received_ns")),
    ev.Retried: (0,),
    ev.TokensMade: (0,),
    ev.Speculated: (),
    ev.TextMade: (0,),
    ev.Sampled: (0,),
    ev.Noted: (0,),
}
"""Where an event has readings of the clock."""

_OF_REQUESTS: Final = (ev.Lap, ev.Rpc, ev.Retried)
_REQUEST: Final[dict[type[Any], int]] = {kind: kind._fields.index("request_id") for kind in _OF_REQUESTS}

_CLAIMS: Final = tuple(
    ev.Rpc._fields.index(name)
    for name in ("compression_seconds", "queue_seconds", "decode_seconds", "compute_seconds", "encode_seconds")
)
_OPERATIONS: Final = ev.Rpc._fields.index("operations")


@dataclass(frozen=True)
class LongRun:
    """``begin`` is what came before, the first decode pass included. ``passes`` are decode passes, with
    ``passes_tokens`` tokens in ``passes_ns`` from ``began_ns`` on; ids of requests go on by ``requests``
    with each repetition."""

    begin: Sequence[ev.Event]
    passes: Sequence[ev.Event]
    passes_tokens: int
    began_ns: int
    passes_ns: int
    requests: int

    @classmethod
    def of(cls, events: Sequence[ev.Event]) -> LongRun:
        """From the events of a run of one prompt with at least three tokens. Raises ``TeegpuError`` for others."""
        decode = next(
            (at for at, e in enumerate(events) if isinstance(e, ev.PhaseBegan) and e.phase == ev.DECODE), None
        )
        made = [
            at for at, e in enumerate(events) if isinstance(e, ev.TokensMade) and decode is not None and at > decode
        ]
        if len(made) < 2:
            raise TeegpuError("a long record can't be made from a run with fewer than two decode passes")
        first, last = made[0], made[-1]
        passes = events[first + 1 : last + 1]
        began, ended = events[first], events[last]
        assert isinstance(began, ev.TokensMade)
        assert isinstance(ended, ev.TokensMade)
        ids = [number for event in passes if isinstance(event, _OF_REQUESTS) and (number := event.request_id)]
        return cls(
            begin=events[: first + 1],
            passes=passes,
            passes_tokens=sum(event.tokens for event in passes if isinstance(event, ev.TokensMade)),
            began_ns=began.at_ns,
            passes_ns=ended.at_ns - began.at_ns,
            requests=max(ids) - min(ids) + 1 if ids else 0,
        )

    def events(self, tokens: int, seconds: float) -> Iterator[list[ev.Event]]:
        """At least ``tokens`` tokens of decode in about ``seconds``, a list for each repetition: what has happened is
        as it was, and takes as much more time, or less, as it must."""
        yield [
            event._replace(tokens=tokens) if isinstance(event, ev.PhaseBegan) and event.phase == ev.DECODE else event
            for event in self.begin
        ]
        repetitions = -(-tokens // self.passes_tokens)
        factor = seconds / repetitions / (self.passes_ns / 1e9)
        pattern = [(type(event), self._relative(event, factor)) for event in self.passes]
        step_ns = round(self.passes_ns * factor)
        for number in range(repetitions):
            yield _moved(pattern, self.began_ns + number * step_ns, number * self.requests)
        end_ns = self.began_ns + repetitions * step_ns
        first = self.begin[-1]
        assert isinstance(first, ev.TokensMade)  # the pass that the others follow
        made = first.tokens + repetitions * self.passes_tokens
        passes = sum(isinstance(event, ev.TokensMade) for event in self.passes)
        yield [ev.PhaseEnded(end_ns, ev.DECODE, made, 1 + repetitions * passes)]

    def _relative(self, event: ev.Event, factor: float) -> list[Any]:
        """The fields of ``event``, its times counted from the first pass's begin and stretched."""
        values: list[Any] = list(event)
        for place in _TIMES[type(event)]:
            values[place] = round((values[place] - self.began_ns) * factor)
        if isinstance(event, ev.Rpc):
            for place in _CLAIMS:
                values[place] *= factor
            values[_OPERATIONS] = {
                name: (count, seconds * factor) for name, (count, seconds) in event.operations.items()
            }
        return values


def _moved(pattern: Sequence[tuple[type[Any], list[Any]]], at_ns: int, request_id: int) -> list[ev.Event]:
    moved: list[ev.Event] = []
    for kind, relative in pattern:
        values = relative.copy()
        for place in _TIMES[kind]:
            values[place] += at_ns
        place = _REQUEST.get(kind, -1)
        if place >= 0 and values[place]:  # 0: a lap that belongs to no request
            values[place] += request_id
        moved.append(kind._make(values))
    return moved

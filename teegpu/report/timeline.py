"""When the time of a phase went where, in a few hundred steps, however long it took. Streams: its memory is bounded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from teegpu.record import events as ev
from teegpu.report.parts import PARTS
from teegpu.stats.summary import exposed

STEPS = 240
"""Steps of a timeline at most; at least half of them once the phase is longer than that many first steps."""

FIRST_STEP_SECONDS = 0.0005


@dataclass
class Timeline:
    """``steps[i][part]``: seconds of the part within the ``i``-th step of ``step_seconds``, of the time in the phase.
    ``seconds``: the end of the last one."""

    step_seconds: float = FIRST_STEP_SECONDS
    steps: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, start: float, end: float, part: str) -> None:
        """The part took from ``start`` to ``end``, in seconds since the phase began."""
        while end > self.step_seconds * STEPS:
            self._halve()
        self.seconds = max(self.seconds, end)
        place = int(start / self.step_seconds)
        while start < end and place < STEPS:
            until = min(end, (place + 1) * self.step_seconds)
            while len(self.steps) <= place:
                self.steps.append({})
            step = self.steps[place]
            step[part] = step.get(part, 0.0) + max(0.0, until - start)
            start, place = until, place + 1

    def _halve(self) -> None:
        pairs = [self.steps[place : place + 2] for place in range(0, len(self.steps), 2)]
        self.steps = [
            {part: sum(step.get(part, 0.0) for step in pair) for part in PARTS if any(part in step for step in pair)}
            for pair in pairs
        ]
        self.step_seconds *= 2


def timelines(events: Iterable[ev.Event]) -> dict[str, Timeline]:
    """A timeline for each phase that took place. Phases of several prompts follow each other without a gap."""
    found: dict[str, Timeline] = {}
    now: Timeline | None = None
    origin_ns = 0
    before = 0.0
    rpcs: dict[int, ev.Rpc] = {}
    for event in events:
        if isinstance(event, ev.PhaseBegan):
            now = found.setdefault(event.phase, Timeline())
            origin_ns, before = event.at_ns, now.seconds
            rpcs.clear()
        elif now is None:
            continue
        elif isinstance(event, ev.PhaseEnded):
            now = None
        elif isinstance(event, ev.Rpc):
            rpcs[event.request_id] = event
        elif isinstance(event, ev.Lap):
            start = before + max(0, event.start_ns - origin_ns) / 1e9
            end = before + max(0, event.end_ns - origin_ns) / 1e9
            if event.part == ev.WAIT:
                _add_wait(now, start, end, event, rpcs.pop(event.request_id, None))
            else:
                now.add(start, end, event.part if event.part in PARTS else ev.OTHER)
    return found


def _add_wait(timeline: Timeline, start: float, end: float, lap: ev.Lap, rpc: ev.Rpc | None) -> None:
    """A wait is network, server and GPU, in the shares that the summary gives them; their order within it is left out:
    a step is longer than a wait, or nearly so."""
    server, gpu = exposed(lap, rpc) if rpc is not None else (0.0, 0.0)
    network = max(0.0, end - start - server - gpu)
    for part, seconds in (("network", network), ("server", server), ("gpu", gpu)):
        until = min(end, start + seconds)
        if until > start:
            timeline.add(start, until, part)
        start = max(start, until)

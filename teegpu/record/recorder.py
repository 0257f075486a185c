"""Takes the events of a run and hands them on in batches, so that recording costs little where it happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from teegpu.record.events import NO_LAYER, OTHER, Event, Lap, PhaseBegan, PhaseEnded, TokensMade

Sink = Callable[[Sequence[Event]], None]


class Recorder:
    """Keeps the exclusive clock of one runner thread.

    ``lap`` charges everything since the last lap to one thing: no instant is counted twice or left out. What happens
    outside of ``begin`` and ``end`` is not measured. ``sinks`` get the events in order, in batches of at most
    ``batch``, and at the end of each phase; they must not change the lists. ``log`` is a sink that may also read
    along in ``held``, from another thread; a list that an interrupt kept from the other sinks comes to it once more.
    ``processor_seconds``: what all threads of this process used in each phase that has ended.
    """

    def __init__(
        self,
        *sinks: Sink,
        log: Sink | None = None,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
        batch: int = 2048,
    ) -> None:
        self.clock_ns = clock_ns
        self.log = log
        self._sinks = sinks
        self._batch = batch
        self._events: list[Event] = []
        self._last_ns = 0
        self._phase: str | None = None
        self._processor_began = 0.0
        self.processor_seconds: dict[str, float] = {}

    def begin(self, phase: str, tokens: int = 0, chunks: int = 1) -> None:
        """Begins a phase (see ``PhaseBegan``); one that is still open ends here, without tokens."""
        self.end(0, 0)
        self._phase = phase
        self._processor_began = time.process_time()
        self._last_ns = self.clock_ns()
        self.add(PhaseBegan(self._last_ns, phase, tokens, chunks))

    def end(self, tokens: int, passes: int) -> None:
        """Ends the phase, if one is open. Its remaining time is ``other``."""
        if self._phase is None:
            return
        self.lap(OTHER, "OTHER")
        self.add(PhaseEnded(self._last_ns, self._phase, tokens, passes))
        used = time.process_time() - self._processor_began
        self.processor_seconds[self._phase] = self.processor_seconds.get(self._phase, 0.0) + used
        self._phase = None
        self.flush()

    def lap(self, part: str, op: str, layer: int = NO_LAYER, chunk: int = 0, request_id: int = 0) -> None:
        """Charges the time since the last lap to ``op``."""
        # As ``lap_until`` at this moment, in one call: a token takes hundreds of them.
        start_ns, end_ns = self._last_ns, self.clock_ns()
        if end_ns < start_ns:
            end_ns = start_ns
        if self._phase is None:
            self._last_ns = end_ns
            return
        events = self._events
        events.append(Lap(start_ns, end_ns, part, op, layer, chunk, request_id))
        self._last_ns = end_ns
        if len(events) >= self._batch:
            self.flush()

    def lap_until(
        self, end_ns: int, part: str, op: str, layer: int = NO_LAYER, chunk: int = 0, request_id: int = 0
    ) -> None:
        """Charges the time from the last lap to ``end_ns``, a reading of ``clock_ns``, to ``op``.

        A time before the last lap charges nothing: what was charged once stays so.
        """
        end_ns = max(end_ns, self._last_ns)
        self.add(Lap(self._last_ns, end_ns, part, op, layer, chunk, request_id))
        self._last_ns = end_ns

    def tokens(self, count: int = 1) -> None:
        """``count`` tokens reach the user now."""
        self.add(TokensMade(self.clock_ns(), count))

    def add(self, event: Event) -> None:
        """Records ``event``."""
        if self._phase is None:
            return
        self._events.append(event)
        if len(self._events) >= self._batch:
            self.flush()

    def remark(self, event: Event) -> None:
        """Records ``event``, of which nothing is measured, outside of phases too."""
        self._events.append(event)

    @property
    def held(self) -> Sequence[Event]:
        """The events that are not yet handed over: a list that only grows until it is, and then never changes."""
        return self._events

    def flush(self) -> None:
        """Hands over the events that are held."""
        if self._events:
            events = self._events
            # Before there is another list: who reads along in that one then has all that came before it.
            if self.log is not None:
                self.log(events)
            self._events = []
            for sink in self._sinks:
                sink(events)

"""The exclusive clock of a runner's thread: no instant twice, none left out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teegpu.record import events as ev
from teegpu.record.recorder import Recorder


class Clock:
    """A clock that is set by hand, in nanoseconds."""

    def __init__(self) -> None:
        self.now_ns = 1000

    def __call__(self) -> int:
        return self.now_ns


class Sink:
    def __init__(self) -> None:
        self.batches: list[list[ev.Event]] = []

    def __call__(self, events: Sequence[ev.Event]) -> None:
        self.batches.append(list(events))

    @property
    def events(self) -> list[ev.Event]:
        return [event for batch in self.batches for event in batch]

    @property
    def laps(self) -> list[ev.Lap]:
        return [event for event in self.events if isinstance(event, ev.Lap)]


RPC = ev.Rpc(1, "q", 0, 0, 0, 10, 1, 1, 1, 1, 0.0, 0.0, 0.0, 0.0, 0.0, {})


def test_each_lap_covers_the_time_since_the_one_before() -> None:
    clock, sink = Clock(), Sink()
    recorder = Recorder(sink, clock_ns=clock)
    recorder.begin(ev.PREFILL)
    clock.now_ns = 1100
    recorder.lap(ev.TEE, "RMSNORM", layer=3, chunk=2)
    clock.now_ns = 1500
    recorder.lap_until(1400, ev.WAIT, "WAIT", 3, 2, request_id=9)
    recorder.lap(ev.SERIALIZATION, "DECODE")
    clock.now_ns = 1600
    recorder.end(tokens=5, passes=1)
    assert sink.events == [
        ev.PhaseBegan(1000, ev.PREFILL),
        ev.Lap(1000, 1100, ev.TEE, "RMSNORM", 3, 2, 0),
        ev.Lap(1100, 1400, ev.WAIT, "WAIT", 3, 2, 9),
        ev.Lap(1400, 1500, ev.SERIALIZATION, "DECODE", ev.NO_LAYER, 0, 0),
        ev.Lap(1500, 1600, ev.OTHER, "OTHER", ev.NO_LAYER, 0, 0),
        ev.PhaseEnded(1600, ev.PREFILL, 5, 1),
    ]


def test_nothing_outside_of_a_phase_is_recorded() -> None:
    clock, sink = Clock(), Sink()
    recorder = Recorder(sink, clock_ns=clock)

    def everything() -> None:
        clock.now_ns += 100
        recorder.lap(ev.TEE, "SILU")
        recorder.lap_until(clock.now_ns + 1, ev.WAIT, "WAIT")
        recorder.tokens(2)
        recorder.add(RPC)
        recorder.add(ev.Speculated(4, 2))
        recorder.end(1, 1)
        recorder.flush()

    everything()
    assert sink.events == []
    recorder.begin(ev.DECODE)
    began_ns = clock.now_ns
    clock.now_ns += 10
    recorder.end(1, 1)
    before = list(sink.events)
    everything()
    assert sink.events == before
    assert sink.laps == [ev.Lap(began_ns, began_ns + 10, ev.OTHER, "OTHER", ev.NO_LAYER, 0, 0)]


def test_a_phase_that_is_still_open_ends_when_another_begins() -> None:
    clock, sink = Clock(), Sink()
    recorder = Recorder(sink, clock_ns=clock)
    recorder.begin(ev.PREFILL)
    clock.now_ns += 7
    recorder.begin(ev.DECODE)
    recorder.end(0, 0)
    assert [event for event in sink.events if isinstance(event, ev.PhaseBegan | ev.PhaseEnded)] == [
        ev.PhaseBegan(1000, ev.PREFILL),
        ev.PhaseEnded(1007, ev.PREFILL, 0, 0),
        ev.PhaseBegan(1007, ev.DECODE),
        ev.PhaseEnded(1007, ev.DECODE, 0, 0),
    ]


def test_a_time_before_the_last_lap_charges_nothing() -> None:
    clock, sink = Clock(), Sink()
    recorder = Recorder(sink, clock_ns=clock)
    recorder.begin(ev.DECODE)
    clock.now_ns = 1200
    recorder.lap(ev.TEE, "SILU")
    recorder.lap_until(1100, ev.WAIT, "WAIT")
    clock.now_ns = 1150
    recorder.lap(ev.TEE, "SILU")
    clock.now_ns = 1300
    recorder.end(1, 1)
    assert [(lap.start_ns, lap.end_ns) for lap in sink.laps] == [(1000, 1200), (1200, 1200), (1200, 1200), (1200, 1300)]


def test_tokens_are_stamped_with_the_clock() -> None:
    clock, sink = Clock(), Sink()
    recorder = Recorder(sink, clock_ns=clock)
    recorder.begin(ev.DECODE)
    clock.now_ns = 1234
    recorder.tokens(3)
    recorder.flush()
    assert sink.events[-1] == ev.TokensMade(1234, 3)


def test_events_come_in_batches_and_in_order() -> None:
    clock, sink = Clock(), Sink()
    recorder = Recorder(sink, clock_ns=clock, batch=4)
    recorder.begin(ev.PREFILL)
    for number in range(10):
        clock.now_ns += 1
        recorder.lap(ev.TEE, str(number))
        if number == 1:
            assert sink.batches == []
    recorder.end(1, 1)
    assert [len(batch) for batch in sink.batches] == [4, 4, 4, 1]
    assert [lap.op for lap in sink.laps] == [*map(str, range(10)), "OTHER"]
    recorder.flush()
    assert len(sink.batches) == 4, "an empty batch is not handed over"


def test_every_sink_gets_every_event() -> None:
    one, two = Sink(), Sink()
    recorder = Recorder(one, two)
    recorder.begin(ev.PREFILL)
    recorder.lap(ev.TEE, "SILU")
    recorder.end(1, 1)
    assert one.events == two.events
    assert len(one.events) == 4


def test_a_log_can_read_along_in_what_is_not_yet_handed_over() -> None:
    sink = Sink()
    held_when_logged: list[bool] = []
    recorder = Recorder(sink, log=lambda events: held_when_logged.append(recorder.held is events))
    recorder.begin(ev.PREFILL)
    growing = recorder.held
    recorder.lap(ev.TEE, "SILU")
    assert recorder.held is growing
    assert [type(event) for event in growing] == [ev.PhaseBegan, ev.Lap]
    recorder.flush()
    assert held_when_logged == [True], "the log has it before there is another list to read along in"
    assert list(recorder.held) == []
    assert sink.events == list(growing)


def test_an_interrupt_costs_the_sinks_nothing_twice() -> None:
    sink, logged = Sink(), Sink()

    def log(events: Sequence[ev.Event]) -> None:
        logged(events)
        if len(logged.batches) == 1:
            raise KeyboardInterrupt

    recorder = Recorder(sink, log=log)
    recorder.begin(ev.PREFILL)
    with pytest.raises(KeyboardInterrupt):
        recorder.flush()
    recorder.lap(ev.TEE, "SILU")
    recorder.flush()
    assert [len(batch) for batch in logged.batches] == [1, 2], "the same list once more, which has grown"
    assert [len(batch) for batch in sink.batches] == [2]


def test_remarks_are_recorded_outside_of_phases_too() -> None:
    sink = Sink()
    recorder = Recorder(sink)
    recorder.remark(ev.TextMade(1, "a"))
    recorder.add(RPC)
    recorder.flush()
    assert sink.events == [ev.TextMade(1, "a")]


def test_the_real_clock_is_that_of_the_transports() -> None:
    sink = Sink()
    recorder = Recorder(sink)
    before_ns = time.perf_counter_ns()
    recorder.begin(ev.PREFILL)
    recorder.end(1, 1)
    assert before_ns <= sink.laps[0].start_ns <= sink.laps[0].end_ns <= time.perf_counter_ns()


@pytest.mark.parametrize("batch", [1, 3, 2048])
@settings(deadline=None, max_examples=60)
@given(
    moves=st.lists(
        st.tuples(
            st.integers(-50, 1000), st.sampled_from([ev.TEE, ev.WAIT, ev.SERIALIZATION, ev.OTHER]), st.booleans()
        ),
        max_size=30,
    )
)
def test_whatever_happens_laps_are_a_line_without_gaps(batch: int, moves: list[tuple[int, str, bool]]) -> None:
    clock, sink = Clock(), Sink()
    recorder = Recorder(sink, clock_ns=clock, batch=batch)
    recorder.begin(ev.PREFILL)
    for step_ns, part, until in moves:
        if until:
            recorder.lap_until(clock.now_ns + step_ns, part, "OP")
        else:
            clock.now_ns += max(0, step_ns)
            recorder.lap(part, "OP")
    recorder.end(1, 1)
    laps = sink.laps
    began, ended = sink.events[0], sink.events[-1]
    assert isinstance(began, ev.PhaseBegan)
    assert isinstance(ended, ev.PhaseEnded)
    assert laps[0].start_ns == began.at_ns
    assert laps[-1].end_ns == ended.at_ns
    assert all(before.end_ns == after.start_ns for before, after in itertools.pairwise(laps))
    assert sum(lap.end_ns - lap.start_ns for lap in laps) == ended.at_ns - began.at_ns


def test_processor_time_is_kept_by_phase() -> None:
    recorder = Recorder()
    for phase in (ev.PREFILL, ev.DECODE, ev.PREFILL):
        recorder.begin(phase)
        began = time.process_time()
        while time.process_time() < began + 0.002:
            pass
        recorder.end(1, 1)
    used = recorder.processor_seconds
    assert used[ev.PREFILL] >= 0.004
    assert 0.002 <= used[ev.DECODE] < 1.0
    assert used.keys() == {ev.PREFILL, ev.DECODE}

"""The trace for Perfetto: slices of a track are nested or apart, and say what the events said."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teegpu.record import events as ev
from teegpu.report.trace import CODEC, LINK, RUNNER, SERVER, SLOTS, THREAD, trace, trace_events
from tests.teegpu.report.chrometrace import problems
from tests.teegpu.report.samples import HOSTILE, MS, document, events, lap, rpc

Track = tuple[int, int]

EPSILON = 1e-6


def slices(entries: list[dict[str, Any]]) -> dict[Track, list[dict[str, Any]]]:
    """By track, in the order of their ends. A slice that is told by its begin and its end has a ``dur`` here too."""
    found: dict[Track, list[dict[str, Any]]] = defaultdict(list)
    begun: dict[Track, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        track = entry["pid"], entry["tid"]
        if entry["ph"] == "X":
            found[track].append(entry)
        elif entry["ph"] == "B":
            begun[track].append(entry)
        elif entry["ph"] == "E":
            begin = begun[track].pop()
            found[track].append({**begin, "dur": entry["ts"] - begin["ts"], "args": entry["args"]})
    return found


def assert_nested(entries: list[dict[str, Any]]) -> None:
    """No two slices of a track overlap in part, and none is negative."""
    for track, found in slices(entries).items():
        open_until: list[float] = []
        for entry in sorted(found, key=lambda entry: (entry["ts"], -entry["dur"])):
            assert entry["dur"] >= 0
            assert entry["ts"] >= 0
            while open_until and open_until[-1] <= entry["ts"] + EPSILON:
                open_until.pop()
            end = entry["ts"] + entry["dur"]
            assert not open_until or end <= open_until[-1] + EPSILON, (track, entry)
            open_until.append(end)


def names(entries: list[dict[str, Any]]) -> dict[Track, str]:
    return {(entry["pid"], entry["tid"]): entry["args"]["name"] for entry in entries if entry["name"] == "thread_name"}


def made() -> list[dict[str, Any]]:
    return list(trace_events(events()))


def test_it_is_one_json_document() -> None:
    loaded = json.loads("".join(trace(events(), document())))
    assert loaded["traceEvents"] == made()
    assert loaded["otherData"]["run"] == "20260102-030405-abcdef"


def test_without_events_it_is_still_a_trace() -> None:
    loaded = json.loads("".join(trace([], document())))
    assert {entry["ph"] for entry in loaded["traceEvents"]} == {"M"}


def test_it_keeps_the_rules_of_the_format() -> None:
    assert problems("".join(trace(events(), document()))) == []
    assert problems("".join(trace([], document()))) == []


NAMED = [
    {"ph": "M", "pid": 1, "tid": 0, "name": "process_name", "args": {"name": "p"}},
    {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "t"}},
]


def x(ts: float, dur: float, **more: Any) -> dict[str, Any]:
    return {"ph": "X", "pid": 1, "tid": 1, "name": "x", "ts": ts, "dur": dur, **more}


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([x(0, 10), x(0, 4), x(4, 6), x(10, 1)], ""),
        ([x(0, 10), x(5, 5.001)], "overlaps another in part"),
        ([x(0, 4), x(0, 10)], "overlaps another in part"),  # what holds the other comes first
        ([x(5, 1), x(4, 1)], "goes back in time"),
        ([x(0, -1)], "dur is no time"),
        ([x(0, 0.0001)], "no whole number of nanoseconds"),
        ([x(0, 1, tid="1")], "tid is no whole number"),
        ([x(0, 1, tid=2)], "threads without a name"),
        ([x(0, 1, pid=2)], "processes without a name"),
        ([x(0, 1, name="")], "no name"),
        ([x(0, 1, ph="Z")], "unknown ph"),
        ([x(0, 9, ph="B"), x(0, 3), x(3, 0, ph="E")], ""),
        ([x(0, 9, ph="B"), x(1, 3), x(3, 0, ph="E")], "cuts a slice"),
        ([x(0, 9, ph="B")], "never ends"),
        ([x(0, 9, ph="E")], "fits no begin"),
        ([x(0, 9, ph="B"), x(3, 0, ph="E", name="y")], "the end of another slice"),
        ([x(0, 0, ph="b", id=1), x(1, 0, ph="e", id=2)], "the end of what was not begun"),
        ([x(0, 0, ph="b", id=1)], "asynchronous slice that never ends"),
        ([x(0, 0, ph="b")], "no id"),
        ([x(0, 0, ph="C", args={"n": "1"})], "no numbers"),
        ([x(0, 0, ph="i", s="x")], "scope"),
        ([NAMED[0]], "given twice"),
    ],
)
def test_the_rules_are_checked(entries: list[dict[str, Any]], told: str) -> None:
    found = problems(json.dumps({"traceEvents": NAMED + entries}))
    assert (told in found[0]) if told else found == []


def test_what_is_no_json_is_seen() -> None:
    assert "no JSON" in problems('{"traceEvents": [NaN]}')[0]
    assert "stands twice" in problems('{"traceEvents": [], "traceEvents": []}')[0]
    assert problems("[]") == ["no object with a list traceEvents"]


def test_every_track_is_nested_and_named() -> None:
    assert_nested(made())
    assert set(slices(made())) <= set(names(made()))


def test_the_tracks() -> None:
    assert sorted(names(made()).values()) == [
        "GPU server 1", "GPU server 2", "GPU server 3",
        "TEE thread",
        "link down 1", "link down 2",
        "link up",
        "requests in flight 1", "requests in flight 2", "requests in flight 3",
        "serialization",
    ]  # fmt: skip


def test_laps_stand_on_the_thread_or_with_the_serialization() -> None:
    found = slices(made())
    thread = [(entry["name"], entry["ts"] / 1e3, entry["dur"] / 1e3) for entry in found[RUNNER, THREAD]]
    assert thread[0] == ("EMBEDDING", 0, 10)
    assert ("prefill", 0, 100) in thread
    assert ("decode", 200, 100) in thread
    assert {entry["cat"] for entry in found[RUNNER, CODEC]} == {"serialization"}
    laps = sum(entry["dur"] for track in (THREAD, CODEC) for entry in found[RUNNER, track] if entry["cat"] != "phase")
    assert laps == pytest.approx(200_000)


def test_requests_in_flight_together_have_lanes_of_their_own() -> None:
    requests = [entry for entries in slices(made()).values() for entry in entries if entry["cat"] == "request"]
    lanes = {entry["args"]["request"]: entry["tid"] - SLOTS for entry in requests}
    assert lanes == {1: 0, 2: 1, 3: 2, 4: 0, 5: 0}


def test_a_request_holds_its_parts_in_order_without_a_gap() -> None:
    found = [
        (entry["name"], entry["ts"] / 1e3 - 15, entry["dur"] / 1e3)
        for entry in slices(made())[RUNNER, SLOTS]
        if entry["args"]["request"] == 1 and entry["cat"] == "link"
    ]
    # 40 ms, of which 8 are the link's: a quarter of the bytes goes up
    assert [(name, pytest.approx(start), pytest.approx(length)) for name, start, length in found] == [
        ("link up", 0, 2), ("queue", 2, 4), ("decode", 6, 4), ("compute", 10, 20), ("encode", 30, 4),
        ("link down", 34, 6),
    ]  # fmt: skip


def test_the_servers_intervals_stand_inside_the_requests() -> None:
    requests = {entry["args"]["request"]: entry for entries in slices(made()).values() for entry in entries
                if entry["cat"] == "request"}  # fmt: skip
    inner = [entry for (pid, _), entries in slices(made()).items() if pid in (LINK, SERVER) for entry in entries]
    assert len(inner) == 5 * (2 + 5)
    for entry in inner:
        request = requests[entry["args"]["request"]]
        assert entry["ts"] >= request["ts"] - EPSILON
        assert entry["ts"] + entry["dur"] <= request["ts"] + request["dur"] + EPSILON
    computed = [entry for entry in inner if entry["name"] == "compute"]
    assert computed[0]["args"]["operations"]["LINEAR"]["count"] == 3


def test_counters() -> None:
    counters = [entry for entry in made() if entry["ph"] == "C"]
    flying = [entry["args"]["requests"] for entry in counters if entry["name"] == "requests in flight"]
    assert max(flying) == 3
    assert flying[-1] == 0
    assert counters[-1]["args"] == {"up": 500, "down": 1500}
    assert [entry["ts"] for entry in counters] == sorted(entry["ts"] for entry in counters)


def test_moments() -> None:
    moments = [entry["name"] for entry in made() if entry["ph"] == "i"]
    assert moments == ["retry: ConnectionLostError", "token", "token", "the server was slow", "token"]


def test_a_run_that_broke_off_has_its_phase() -> None:
    entries = list(trace_events(events()[:8]))
    assert_nested(entries)
    phases = [entry for entry in slices(entries)[RUNNER, THREAD] if entry["cat"] == "phase"]
    assert [(entry["name"], entry["dur"]) for entry in phases] == [("prefill", 55_000)]


def test_a_clock_that_went_backwards_and_a_gap_in_the_record() -> None:
    broken = [
        ev.PhaseBegan(100 * MS, ev.PREFILL),
        lap(100, 120, ev.TEE, "SILU"),
        lap(110, 130, ev.TEE, "ROTARY"),
        lap(90, 95, ev.WAIT, "WAIT"),
        rpc(1, 120, 110),
        rpc(2, 90, 95),
        ev.PhaseEnded(80 * MS, ev.PREFILL, 1, 1),
        ev.PhaseBegan(70 * MS, ev.DECODE),
        lap(130, 140, ev.TEE, "SILU"),
    ]
    assert problems("".join(trace(broken, document()))) == []
    found = slices(list(trace_events(broken)))[RUNNER, THREAD]
    assert [(entry["name"], entry["dur"]) for entry in found if entry["cat"] == "tee"] == [
        ("SILU", 20_000), ("ROTARY", 10_000), ("SILU", 10_000),
    ]  # fmt: skip


def test_hostile_names_are_text() -> None:
    bad = rpc(1, 0, 10)._replace(label=HOSTILE, operations={HOSTILE: (1, 0.001)})
    text = "".join(trace([ev.PhaseBegan(0, ev.PREFILL), bad, ev.Noted(5 * MS, HOSTILE)], {"id": HOSTILE}))
    assert "\x1b" not in text
    assert "\\u001b" not in text
    json.loads(text)


@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.integers(0, 300), st.floats(0, 0.2), st.floats(0, 0.2), st.integers(0, 50)),
        max_size=30,
    )
)
def test_any_requests_are_nested(requests: list[tuple[int, int, float, float, int]]) -> None:
    given_events: list[ev.Event] = [ev.PhaseBegan(0, ev.PREFILL)]
    for number, (sent, length, queue, compute, up) in enumerate(requests):
        made_up = rpc(number, sent / 10, (sent + length) / 10)
        given_events.append(made_up._replace(queue_seconds=queue, compute_seconds=compute, bytes_up=up))
    assert problems("".join(trace(given_events, document()))) == []

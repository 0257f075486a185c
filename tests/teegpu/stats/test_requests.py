"""Requests of an engine that serves several at once, added up."""

from __future__ import annotations

import pytest

from teegpu.record import events as ev
from teegpu.stats.requests import MAX_OPEN, Requests

MS = 1_000_000


def added(*events: ev.Event) -> Requests:
    requests = Requests()
    for event in events:
        requests.add(event)
    return requests


def stepped(at_ms: int, *rows: tuple[int, int, int], took_ms: int = 10, waiting: int = 0, kv: int = 0) -> ev.Stepped:
    return ev.Stepped(at_ms * MS, (at_ms - took_ms) * MS, rows, len(rows), waiting, kv)


def test_what_a_request_waits_for() -> None:
    requests = added(
        ev.Arrived(0, 1, 100, 3),
        ev.Admitted(20 * MS, 1, 40),
        stepped(40, (1, 60, 1)),
        stepped(60, (1, 1, 1)),
        stepped(90, (1, 1, 1)),
        ev.Left(90 * MS, 1, "length"),
    )
    found = requests.to_json()
    assert found["queue_seconds"]["p50"] == pytest.approx(0.02, rel=0.02)
    assert found["ttft_seconds"]["max"] == 0.04
    assert found["itl_seconds"]["max"] == 0.03
    assert found["itl_seconds"]["p50"] == pytest.approx(0.02, rel=0.02)
    assert found["e2e_seconds"]["max"] == 0.09
    assert (found["prompt_tokens"], found["reused_tokens"], found["made_tokens"]) == (100, 40, 3)
    assert (found["ended"], found["open"]) == ({"length": 1}, 0)


def test_tokens_of_one_step_share_its_time() -> None:
    requests = added(ev.Arrived(0, 1, 1, 9), stepped(10, (1, 1, 1)), stepped(40, (1, 4, 3)))
    assert requests.itl.count == 3
    assert requests.itl.max_seconds == 0.01


def test_steps_by_how_many_they_were_for() -> None:
    """Those in which a prompt was read are no measure of that."""
    three = [(number, 1, 1) for number in (1, 2, 3)]
    requests = added(
        stepped(10, *((number, 5, 1) for number in (1, 2, 3))),
        stepped(20, *three),
        stepped(30, *three, waiting=2, kv=7),
        stepped(40, *three[:1]),
        stepped(60, *three, (4, 9, 0), took_ms=20),
    )
    found = requests.to_json()
    assert found["batches"] == [
        {"upto": 1, "steps": 1, "seconds": 0.01, "tokens": 1},
        {"upto": 4, "steps": 2, "seconds": 0.02, "tokens": 6},
    ]
    assert (found["steps"], found["step_seconds"], found["waited_seconds"]) == (5, pytest.approx(0.06), 0.01)
    assert (found["most_running"], found["most_waiting"], found["most_kv_bytes"]) == (4, 2, 7)


def test_who_gives_way_is_in_line_again() -> None:
    requests = added(ev.Arrived(0, 1, 9, 9), ev.Arrived(0, 2, 9, 9), ev.Admitted(1, 1, 0), ev.Admitted(1, 2, 0))
    assert (requests.running, requests.waiting) == (2, 0)
    requests.add(ev.GaveWay(2, 2))
    assert (requests.running, requests.waiting, requests.gave_way) == (1, 1, 1)
    requests.add(ev.Admitted(3, 2, 0))
    assert (requests.running, requests.prompt_tokens, requests.queue.count) == (2, 18, 2)


def test_what_began_before_the_record_does() -> None:
    requests = added(stepped(10, (7, 1, 1)), ev.Left(11 * MS, 8, "abort"), ev.GaveWay(12 * MS, 9))
    assert set(requests.open) == {7, 9}
    assert requests.ended == {"abort": 1}


def test_a_log_without_ends_takes_no_memory_without_end() -> None:
    requests = added(*(ev.Arrived(0, number, 1, 1) for number in range(MAX_OPEN + 10)))
    assert len(requests.open) == MAX_OPEN
    assert requests.arrived == MAX_OPEN + 10

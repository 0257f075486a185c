"""Runs that go on and runs that are played again, with clocks that the test moves."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest

from teegpu.errors import RecordError
from teegpu.monitor import snapshot as snap
from teegpu.monitor.panels.overview import header
from teegpu.monitor.players import LivePlayer, ReplayPlayer
from tests.teegpu.monitor.madeup import MadeUp, Recorded, Script, meta

SMALL = Script(layers=2, prompt=16, chunks=1, tokens=5, expected=8, text=("a", "b", "c", "d", "e", "f"))


def recorded(**changes: Any) -> Recorded:
    made = MadeUp(SMALL)
    made.prefill()
    made.decode()
    return Recorded(made.events, about=meta(SMALL), **changes)


def drained(player: LivePlayer | ReplayPlayer) -> snap.Snapshot:
    """Until there is nothing more, twice: the end is seen by who finds nothing."""
    idle = 0
    while idle < 2:
        idle = 0 if player.tick() else idle + 1
    return player.look()


def test_a_run_is_starting_until_its_record_is_there() -> None:
    player = LivePlayer()
    assert player.look().status == snap.STARTING
    player.note("loading tiny")
    assert player.look().notes[-1].text == "loading tiny"
    player.attach(recorded())
    assert drained(player).tokens == 6


def test_what_is_written_later_is_read_later() -> None:
    run = recorded()
    later, run.list = run.list[40:], run.list[:40]
    player = LivePlayer(run)
    before = drained(player)
    run.list = run.list + later
    assert drained(player).events == before.events + len(later)


def test_a_late_watcher_has_all_of_it_and_several_do_not_disturb_each_other() -> None:
    run = recorded()
    first, second = LivePlayer(run), LivePlayer(run)
    assert drained(first).decode == drained(second).decode


@pytest.mark.parametrize("status", ["complete", "interrupted", "failed"])
def test_the_end_comes_with_the_document(status: str) -> None:
    run = recorded(result={"status": status, "error": "why", "advice": [{"text": "Speculate."}]})
    player = LivePlayer(run)
    assert drained(player).status == snap.RUNNING
    run.status = status
    end = drained(player)
    assert (end.status, end.error, end.advice) == (status, "why", ("Speculate.",))
    assert end.document is run.result
    assert end.ended


def test_a_record_that_is_not_whole_is_not_shown_as_one() -> None:
    record = {"truncated": False, "failure": "No space left on device", "damage": []}
    run = recorded(result={"status": "complete", "record": record}, status="complete")
    end = drained(LivePlayer(run))
    assert "recording ended early: No space left on device" in [note.text for note in end.notes]
    assert "record cut" in "".join(text for text, _ in header(end, 120))


def test_what_was_written_before_the_end_is_read_before_it() -> None:
    run = recorded(status="complete")
    player = LivePlayer(run)
    player.tick()
    assert player.look().status == snap.RUNNING
    player.tick()
    assert (player.look().status, player.look().tokens) == ("complete", 6)


def test_a_record_without_a_document_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    run = recorded(status="complete")

    def refuse() -> dict[str, Any]:
        raise RecordError("run x: summary.json was written by a newer teegpu")

    monkeypatch.setattr(run, "document", refuse)
    end = drained(LivePlayer(run))
    assert end.document is None
    assert "newer teegpu" in end.error


def test_damage_is_told() -> None:
    run = recorded(status="interrupted")
    player = LivePlayer(run)
    run.readers[0].damage.append("a block is damaged")
    assert "a block is damaged" in [note.text for note in drained(player).notes]


def test_model_and_server_may_be_known_later() -> None:
    run = recorded()
    run.about = {}
    player = LivePlayer(run)
    assert drained(player).facts.device == ""
    run.about = meta(SMALL)
    assert drained(player).facts.device == "cpu"


def test_advice_is_looked_for_now_and_then() -> None:
    now, asked = [0.0], []

    def advise(*_: object) -> list[str]:
        asked.append(now[0])
        return ["use fp16"]

    run = recorded()
    player = LivePlayer(run, advise=advise, clock=lambda: now[0])
    assert drained(player).advice == ("use fp16",)
    now[0] = 1.0
    player.look()
    now[0] = 10.0
    player.look()  # nothing new has happened
    run.list = run.list + run.list[-5:]
    drained(player)
    assert asked == [0.0, 10.0]


def test_a_record_that_can_not_be_read_is_told() -> None:
    class Damaged(Recorded):
        def meta(self) -> dict[str, Any]:
            raise RecordError("run x: its record is damaged")

    player = LivePlayer()
    player.attach(Damaged([]))
    assert drained(player).notes[-1].text == "run x: its record is damaged"
    assert player.look().status == snap.STARTING
    with pytest.raises(RecordError, match="damaged"):
        LivePlayer(Damaged([]))


def test_what_other_threads_tell_is_taken_in_the_next_look() -> None:
    player = LivePlayer(recorded())
    threads = [threading.Thread(target=player.add_text, args=("ha",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shown = player.look()
    assert (shown.text, shown.text_private) == ("ha" * 4, True)


def test_text_of_the_record_is_not_private() -> None:
    shown = drained(LivePlayer(recorded()))
    assert (shown.text, shown.text_private) == ("abcdef", False)


def test_there_is_nothing_to_take_twice_once_it_has_ended() -> None:
    player = LivePlayer(recorded(status="complete"))
    assert drained(player).ended
    assert player.take() is None
    player.focus(1)
    assert player.take() is not None


# Replays


def replay(**changes: Any) -> tuple[ReplayPlayer, list[float]]:
    now = [0.0]
    return ReplayPlayer(recorded(status="complete"), clock=lambda: now[0], **changes), now


def test_a_replay_takes_its_time() -> None:
    player, now = replay()
    player.tick()
    assert player.look().tokens == 0
    total = drained(LivePlayer(recorded(), now_ns=lambda: 0)).seconds
    now[0] = total / 2
    player.tick()
    half = player.look()
    assert 0 < half.events < len(recorded().list)
    assert half.seconds == pytest.approx(total / 2, rel=0.01)
    assert half.replay == "×1"
    now[0] = total * 1.01
    assert drained(player).status == "complete"
    assert player.look().tokens == 6


def test_a_replay_may_be_quicker_or_at_once() -> None:
    slow, now = replay()
    quick, then = replay(speed=4.0)
    now[0] = then[0] = 0.002
    slow.tick()
    quick.tick()
    assert quick.look().events > slow.look().events
    at_once, _ = replay(speed=math.inf)
    assert drained(at_once).status == "complete"


def test_speeds_have_a_least_and_a_most() -> None:
    player, _ = replay()
    for _ in range(20):
        player.faster(1)
    assert player.look().replay == "at once"
    for _ in range(40):
        player.faster(-1)
    assert player.look().replay == "×0.1"


def test_a_paused_replay_stands() -> None:
    player, now = replay()
    player.toggle()
    now[0] = 100.0
    assert drained(player).events == 0
    player.toggle()
    now[0] = 200.0
    assert drained(player).status == "complete"


def test_steps_and_jumps_forwards_and_back() -> None:
    player, _ = replay()
    for token in (1, 2, 3):
        player.step()
        assert drained(player).tokens == token
    player.jump(5)
    assert drained(player).tokens == 5
    player.jump(2)
    back = drained(player)
    assert (back.tokens, back.text) == (2, "ab")
    player.jump(0)
    assert drained(player).tokens == 0
    player.jump(1000)
    assert drained(player).status == "complete"


def test_after_its_end_a_replay_can_go_back() -> None:
    player, _ = replay(speed=math.inf)
    assert drained(player).ended
    player.jump(100)  # there is no such moment
    assert not player.look().behind
    player.jump(1)
    again = drained(player)
    assert (again.status, again.tokens) == ("running", 1)


def test_looking_again_after_the_end_shows_the_end() -> None:
    player = LivePlayer(recorded(status="failed"))
    assert drained(player).status == "failed"
    assert player.look().status == "failed"

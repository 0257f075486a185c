"""The view of a run that serves several at once: who is under way, how full it is, what they wait for."""

from __future__ import annotations

from pathlib import Path

import pytest

from teegpu.monitor.draw import Look, plain
from teegpu.monitor.plain import frame, progress_line
from teegpu.monitor.state import LiveState
from teegpu.monitor.widgets.panel import Panel
from teegpu.record import events as ev
from tests.teegpu.monitor.madeup import MS, MadeUp, Script, meta
from tests.teegpu.monitor.scene import Scene, perform

CAPACITY = {"sequences": 4, "waiting": 256, "kv_bytes": 1 << 30, "prefix_bytes": 0, "step_tokens": 128}


class Serving(MadeUp):
    """Writes the events of an endpoint."""

    def __init__(self) -> None:
        super().__init__(Script(layers=6, expected=64))
        self.about = meta(self.script)
        self.about["settings"] = {**self.about["settings"], "capacity": CAPACITY}

    def arrive(self, request: int, prompt: int = 100, most: int = 64) -> None:
        self.events.append(ev.Arrived(self.clock.at, request, prompt, most))
        self.clock.pass_(20 * MS)

    def admit(self, request: int) -> None:
        self.events.append(ev.Admitted(self.clock.at, request, 0))

    def step(self, *rows: tuple[int, int, int], waiting: int = 0, running: int | None = None) -> None:
        began = self.clock.at
        reads = any(row[1] > 1 for row in rows)
        if reads:
            self.events.append(ev.PhaseBegan(began, ev.PREFILL, sum(row[1] for row in rows)))
            self._phase = ev.PREFILL
        elif self._phase != ev.DECODE:
            self.begin_decode()
        for layer in range(self.script.layers):
            self.layer(layer, 0, len(rows))
        self._tokens(sum(row[2] for row in rows))
        if reads:
            self.end(sum(row[1] for row in rows))
        running = len(rows) if running is None else running
        self.events.append(ev.Stepped(self.clock.at, began, rows, running, waiting, 300 << 20))

    def leave(self, request: int, reason: str = "stop") -> None:
        self.events.append(ev.Left(self.clock.at, request, reason))


def busy() -> Serving:
    made = Serving()
    for request in range(1, 7):
        made.arrive(request)
    for request in range(1, 5):
        made.admit(request)
        made.step((request, 100, 1), *((other, 1, 1) for other in range(1, request)), waiting=2)
    for _ in range(20):
        made.step((1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1), waiting=2)
    made.leave(1)
    made.leave(2, "error")
    made.admit(5)
    made.step((3, 1, 1), (4, 1, 1), (5, 40, 0), waiting=1)
    return made


def state_of(made: Serving) -> LiveState:
    state = LiveState(made.about)
    state.add(made.events)
    return state


def test_who_is_under_way() -> None:
    state = state_of(busy())
    serving = state.snapshot().serving
    assert serving is not None
    assert [(one.number, one.state, one.read, one.made) for one in serving.requests] == [
        (3, "generating", 100, 23),
        (4, "generating", 100, 22),
        (5, "reading", 40, 0),
        (6, "waiting", 0, 0),
    ]
    assert (serving.running, serving.reading, serving.waiting) == (3, 1, 1)
    assert (serving.arrived, serving.ended, serving.failed) == (6, 2, 1)
    assert serving.kv_bytes == 300 << 20
    first = serving.requests[0]
    assert first.ttft_seconds is not None
    assert 0 < first.ttft_seconds < first.seconds
    # A step takes as long for each in it: 23 tokens in the 22 steps since the first.
    step = (made_steps := [e for e in busy().events if isinstance(e, ev.Stepped)])[10]
    assert first.rate == pytest.approx(1e9 / (step.at_ns - step.began_ns), rel=0.1)
    assert max(running for running, _ in serving.load) <= 4
    assert len(made_steps) == 25


def test_waiting_and_running_over_time_are_weighted_by_time() -> None:
    made = Serving()
    for request in (1, 2, 3):
        made.arrive(request)
    for request in (1, 2):
        made.admit(request)
    at = made.clock.at
    made.events.append(ev.Stepped(at + 200 * MS, at, ((1, 1, 1), (2, 1, 1)), 2, 1, 0))
    made.events.append(ev.Stepped(at + 1050 * MS, at + 1000 * MS, ((1, 1, 1), (2, 1, 1)), 2, 0, 0))
    serving = state_of(made).snapshot().serving
    assert serving is not None
    # A busy stretch, some of nothing, and one of 0.25 s of which a fifth was worked.
    assert [load for load in serving.load if any(load)] == [pytest.approx((2.0, 1.0)), pytest.approx((0.4, 0.0))]


@pytest.mark.parametrize(
    ("size", "replay"), [((80, 24), None), ((120, 40), None), ((200, 60), None), ((120, 40), float("inf"))]
)
def test_the_screen_of_an_endpoint(size: tuple[int, int], replay: float | None, tmp_path: Path) -> None:
    async def play(scene: Scene) -> None:
        await scene.press("1")
        assert ("serving" if replay is None else "replay") in scene.header
        rows = scene.text("#p-tail")
        assert "generating" in rows
        assert "3 of 4 · 1 reading · 1 in line · 2 ended · 1 failed" in scene.text("#p-progress")
        assert "300.0 MiB of 1.00 GiB" in scene.text("#p-progress")
        if size[1] >= 32:
            assert "sequences" in scene.text("#tiles")
            assert "p95" in scene.text("#tiles")
        assert "5 requests" in scene.text("#views")
        await scene.press("5")
        assert "between" in scene.text("#p-text")
        for panel in scene.app.screen.query("#text Panel").results(Panel):
            assert panel.region.right <= size[0]
            assert panel.region.bottom <= size[1]
        if replay is None:
            made.arrive(7)
            await scene.update()
            assert "7" in scene.text("#p-text").splitlines()[-1]
        await scene.press("e")
        assert any("generating" in path.read_text() for path in tmp_path.glob("*.svg"))

    made = busy()
    perform(play, made, size=size, replay=replay, folder=tmp_path)


def test_an_endpoint_that_nobody_has_asked() -> None:
    state = LiveState(Serving().about).snapshot(status="running")
    assert "no request is under way" in "\n".join(map(plain, frame(state, 100, Look())))
    assert progress_line(state).startswith("0.0 s 0 sequences · 0 in line · 0 ended")


def test_lines_where_there_is_no_screen() -> None:
    state = state_of(busy()).snapshot()
    line = progress_line(state)
    assert "3 sequences · 1 in line · 2 ended" in line
    assert "TTFT" in line
    assert "ITL" in line
    text = "\n".join(map(plain, frame(state, 100, Look(letters=True))))
    assert "first token" in text
    assert "40/100" in text

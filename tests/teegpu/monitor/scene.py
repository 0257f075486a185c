"""The monitor's screen in a test: a made-up run behind it, a clock that stands, and keys."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from teegpu.monitor.app import Monitor
from teegpu.monitor.draw import plain
from teegpu.monitor.players import LivePlayer, Player, ReplayPlayer
from teegpu.monitor.widgets.panel import Panel
from teegpu.report.advice import advise
from teegpu.report.tables import tables
from teegpu.stats.document import rebuild
from tests.teegpu.monitor.madeup import MadeUp, Recorded, Script, meta

TEXT = (
    "A trusted process keeps the prompt, the cache and all that is not linear; the server multiplies matrices. What "
    "the link between them takes decides how quick it is."
)
WORDS = tuple(piece for word in TEXT.split(" ") for piece in (word + " ",))


@dataclass
class Scene:
    """What a test has in its hands: the run that goes on, the player, the app and its pilot."""

    made: MadeUp
    run: Recorded
    player: Player
    app: Monitor
    pilot: Pilot[str]

    async def update(self) -> None:
        """Reads what is new, and shows it."""
        while self.player.tick():
            pass
        self.app.pull()
        await self.settle()

    async def settle(self) -> None:
        await self.pilot.pause()
        await self.pilot.pause()

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.settle()

    async def end(self, status: str, **changes: Any) -> None:
        summary = self.player.state.summary
        while self.player.tick():
            pass
        document = rebuild(self.run.about, summary, status) | changes
        self.run.result = document | {"advice": advise(document)}
        self.run.status = status
        self.player.tick()
        await self.update()

    def text(self, panel: str) -> str:
        """What a panel says."""
        return "\n".join(plain(line) for line in self.app.screen_stack[0].query_one(panel, Panel).lines)

    @property
    def header(self) -> str:
        return self.text("#header")


Play = Callable[[Scene], Awaitable[None]]


def perform(
    play: Play,
    made: MadeUp | None = None,
    *,
    size: tuple[int, int] = (120, 40),
    ours: bool = False,
    theme: str = "teegpu-dark",
    replay: float | None = None,
    folder: Path | None = None,
    clock: Callable[[], float] | None = None,
) -> Monitor:
    """Plays ``play`` on the screen of ``size``, with the run in ``made`` behind it."""
    made = made if made is not None else decoding()
    run = Recorded(made.events, about=getattr(made, "about", None) or meta(made.script))
    player: Player
    if replay is None:
        player = LivePlayer(run, now_ns=lambda: made.clock.at)
    else:
        run.status = "complete"
        player = ReplayPlayer(run, speed=replay, clock=clock or (lambda: 0.0))
    app = Monitor(
        player,
        ours=ours,
        theme=theme,
        hertz=0.01,  # the test says when
        conclude=lambda document: tables(dict(document)),
        build=lambda about, summary: rebuild(about, summary, "running"),
        folder=folder,
    )

    async def scene() -> None:
        async with app.run_test(size=size) as pilot:
            here = Scene(made, run, player, app, pilot)
            await here.update()
            await play(here)

    asyncio.run(scene())
    return app


def decoding(tokens: int = 12, **script: Any) -> MadeUp:
    """A run in the middle of decode, in the middle of a pass."""
    made = MadeUp(Script(**({"text": WORDS, "layers": 18, "chunks": 4} | script)))
    made.prefill()
    made.note("no endpoint given: embedded GPU server (threads: runner 1, server 1)")
    made.decode(tokens, ends=False)
    for layer in range(made.script.layers // 2):
        made.layer(layer, 0, 1)
    return made


def prefilling(**script: Any) -> MadeUp:
    """A run in the middle of an overlapped prefill."""
    made = MadeUp(Script(**({"layers": 18} | script)))
    made.prefill(upto=made.script.layers * 2 // 3)
    return made

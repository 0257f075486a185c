"""The first lines of the screen: what is run and how it goes, and the views to choose from."""

from __future__ import annotations

from collections.abc import Sequence

from textual import events
from textual.message import Message

from teegpu.monitor.draw import Line, Look, Span, fit
from teegpu.monitor.panels import overview
from teegpu.monitor.snapshot import Snapshot
from teegpu.monitor.widgets.panel import Panel


class Header(Panel):
    """What is run, and how it goes."""

    def __init__(self) -> None:
        super().__init__("", self._head, id="header")
        self.paused = False

    def _head(self, state: Snapshot, width: int, height: int, look: Look) -> list[Line]:  # noqa: ARG002
        return [overview.header(state, width, self.paused)]


class ViewBar(Panel):
    """The views, by number and name; a click chooses one."""

    class Chosen(Message):
        def __init__(self, view: str) -> None:
            super().__init__()
            self.view = view

    def __init__(self, views: Sequence[str]) -> None:
        super().__init__("", self._names, id="views")
        self.views = views
        self.current = views[0]
        self._edges: list[tuple[int, str]] = []

    def _names(self, state: Snapshot, width: int, height: int, look: Look) -> list[Line]:  # noqa: ARG002
        spans: list[Span] = []
        self._edges = []
        at = 0
        for number, view in enumerate(self.views, 1):
            chosen = view == self.current
            name = "requests" if view == "text" and state.serving is not None else view
            text = f" {number} {name} " if not (look.letters and chosen) else f"[{number} {name}]"
            spans += [(text, "bold accent on cursor" if chosen else "dim"), (" ", "")]
            at += len(text) + 1
            self._edges.append((at, view))
        return [fit(tuple(spans), width)]

    def on_click(self, event: events.Click) -> None:
        for edge, view in self._edges:
            if event.x < edge:
                self.post_message(self.Chosen(view))
                return


class Tiles(Panel):
    """The big figures side by side."""

    def __init__(self) -> None:
        super().__init__("", self._tiles, id="tiles")

    def _tiles(self, state: Snapshot, width: int, height: int, look: Look) -> list[Line]:  # noqa: ARG002
        figures = overview.tiles(state)
        each = width // len(figures)
        drawn = [overview.tile(figure, each) for figure in figures]
        return [tuple(span for tile in drawn for span in tile[row]) for row in range(3)]

"""The screen with the views, and which panel is where."""

from __future__ import annotations

from typing import ClassVar, Final

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical, VerticalScroll
from textual.screen import Screen
from textual.widgets import ContentSwitcher, Footer, Static

from teegpu.monitor.panels import communication, layers, overview, text
from teegpu.monitor.widgets.bars import Header, Tiles, ViewBar
from teegpu.monitor.widgets.panel import Panel
from teegpu.monitor.widgets.tables import LayerTable, OpTable

VIEWS: Final = ("overview", "layers", "ops", "network", "text", "report")
"""Each has the key of its number."""


class Main(Screen[None]):
    """Tab is for views here: there is one thing at most that can have the focus."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("tab", "app.next_view(1)", "Next view", show=False),
        Binding("shift+tab", "app.next_view(-1)", "View before", show=False),
    ]

    def compose(self) -> ComposeResult:
        yield Header()
        yield ViewBar(VIEWS)
        with ContentSwitcher(initial=VIEWS[0], id="body"):
            with Container(id="overview"):
                yield Tiles()
                yield Panel("progress", overview.progress, id="p-progress")
                yield Panel("where the time goes", overview.time, id="p-time")
                with Vertical(id="p-left"):
                    yield Panel("layers", layers.profile, id="p-profile")
                    yield Panel("text", text.tail, id="p-tail")
                    yield Panel("chunks (link and GPU: estimated)", layers.chunks, id="p-chunks")
                with Vertical(id="p-right"):
                    yield Panel("communication", communication.communication, id="p-communication")
                    yield Panel("both sides", overview.both_sides, id="p-sides")
                    yield Panel("advice and notes", overview.said, id="p-said")
            with Vertical(id="layers"):
                yield LayerTable("layers", id="t-layers")
                yield Panel("layer", layers.detail, id="p-detail")
            with Container(id="ops"):
                yield OpTable("operations", id="t-ops")
            with Container(id="network"):
                yield Panel("the run's time", communication.over_time, id="p-over-time")
                yield Panel("rates", communication.rates, id="p-rates")
                yield Panel("latency of the calls", communication.latencies, id="p-latencies")
                yield Panel("servers", communication.endpoints, id="p-endpoints")
                yield Panel("notes", overview.said, id="p-notes")
            with Container(id="text"):
                yield Panel("text", text.shown, id="p-text", follow=True, scrolls=True)
            with VerticalScroll(id="report") as report:
                report.border_title = "report"
                yield Static("The report is here when the run has ended.", id="p-report", markup=False)
        yield Footer()

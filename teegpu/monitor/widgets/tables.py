"""Tables with a cursor: the layers and the operations."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region
from textual.message import Message

from teegpu.monitor.draw import Line, Look, fit
from teegpu.monitor.panels import layers, ops
from teegpu.monitor.snapshot import Snapshot
from teegpu.monitor.widgets.panel import Panel


class Table(Panel, can_focus=True):
    """A panel whose lines, the first (headings) left out, can be walked through. ``s`` goes through ``sorts``."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "move(-10)", "Page up", show=False),
        Binding("pagedown", "move(10)", "Page down", show=False),
        Binding("home", "move(-100000)", "First", show=False),
        Binding("end", "move(100000)", "Last", show=False),
    ]
    sorts: ClassVar[tuple[str, ...]] = ()

    class Moved(Message):
        """The cursor is on another line."""

        def __init__(self, table: Table) -> None:
            super().__init__()
            self.table = table

        @property
        def control(self) -> Table:
            return self.table

    def __init__(self, title: str, *, id: str) -> None:
        super().__init__(title, self._rows, id=id, scrolls=True)
        self._title = title
        self.cursor = 0
        self.order = self.sorts[0]
        self._entitle()

    def _entitle(self) -> None:
        self.border_subtitle = f"sorted by {self.order}"

    def _rows(self, state: Snapshot, width: int, height: int, look: Look) -> list[Line]:
        raise NotImplementedError

    def action_move(self, by: int) -> None:
        last = max(0, len(self.lines) - 2)
        self._go(min(last, max(0, self.cursor + by)))

    def _go(self, row: int) -> None:
        if row != self.cursor:
            self.cursor = row
            self.refresh()
            self.post_message(self.Moved(self))
        # Headings stay in view above the first line.
        self.scroll_to_region(Region(0, row + (1 if row else 0), 1, 1), animate=False)

    def next_sort(self) -> None:
        """Sorts by the next thing."""
        self.order = self.sorts[(self.sorts.index(self.order) + 1) % len(self.sorts)]
        self._entitle()
        self.redraw()
        self.post_message(self.Moved(self))

    def on_click(self, event: events.Click) -> None:
        spot = event.get_content_offset(self)
        if spot is None:
            return
        place = self.scroll_offset.y + spot.y - 1
        if spot.y == 0 and self.scroll_offset.y == 0:
            self.next_sort()
        elif 0 <= place < len(self.lines) - 1:
            self._go(place)

    def line_at(self, place: int) -> Line:
        line = super().line_at(place)
        if place != self.cursor + 1 or not self.has_focus:
            return line
        width = self.scrollable_content_region.width
        return tuple((text, role if "on " in role else f"{role} on cursor".strip()) for text, role in fit(line, width))


class LayerTable(Table):
    """One row per layer. ``Chosen`` says that Enter was pressed on one."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "choose", "One layer over time")]
    sorts = layers.SORTS

    class Chosen(Message):
        def __init__(self, layer: int) -> None:
            super().__init__()
            self.layer = layer

    def _rows(self, state: Snapshot, width: int, height: int, look: Look) -> list[Line]:  # noqa: ARG002
        return layers.rows(state, layers.sorted_layers(state, self.order), width, look)

    @property
    def chosen(self) -> int:
        """The one that the cursor is on."""
        if self._state is None or not self._state.layers:
            return 0
        views = layers.sorted_layers(self._state, self.order)
        return views[min(self.cursor, len(views) - 1)].layer

    def action_choose(self) -> None:
        self.post_message(self.Chosen(self.chosen))


class OpTable(Table):
    """One row per operation."""

    sorts = ops.SORTS

    def __init__(self, title: str, *, id: str) -> None:
        self.phase = ops.PHASES[0]
        super().__init__(title, id=id)

    def _entitle(self) -> None:
        phase = "both phases" if self.phase == "both" else self.phase
        self.border_subtitle = f"{phase}, sorted by {self.order}"

    def _rows(self, state: Snapshot, width: int, height: int, look: Look) -> list[Line]:  # noqa: ARG002
        return ops.rows(state, self.order, self.phase, width, look)

    def next_phase(self) -> None:
        self.phase = ops.PHASES[(ops.PHASES.index(self.phase) + 1) % len(ops.PHASES)]
        self._entitle()
        self.redraw()

"""A panel: draws lines from the latest snapshot, and only those again that have changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.binding import BindingType
from textual.geometry import Region, Size
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget

from teegpu.monitor import themes
from teegpu.monitor.draw import Line, Look, length
from teegpu.monitor.snapshot import Snapshot

Draw = Callable[[Snapshot, int, int, Look], list[Line]]


class Panel(ScrollView, can_focus=False):
    """Shows what ``draw`` (snapshot, width, height, look) gives. What is longer than the panel can be scrolled.

    ``show`` takes a snapshot; a panel that is not displayed only keeps it. ``follow`` keeps the end in view.
    """

    BINDINGS: ClassVar[list[BindingType]] = []

    def __init__(self, title: str, draw: Draw, *, id: str, follow: bool = False, scrolls: bool = False) -> None:
        super().__init__(id=id, classes="scrolls" if scrolls else None)
        if title:
            self.border_title = title
        self._draw = draw
        self._follow = follow
        self._scrolls = scrolls
        self._state: Snapshot | None = None
        self._lines: list[Line] = []
        self._base: tuple[str, Style] | None = None
        self.drawn_lines = 0

    @property
    def lines(self) -> list[Line]:
        return self._lines

    @property
    def look(self) -> Look:
        return getattr(self.app, "look", None) or Look()

    def show(self, state: Snapshot) -> None:
        self._state = state
        self.redraw()

    def redraw(self) -> None:
        """Draws anew; lines that stay as they are cost nothing further."""
        size = self._room
        if self._state is None or not self.is_attached or size.width <= 0 or size.height <= 0:
            return
        if not self._visible():
            return
        new = self._draw(self._state, size.width, size.height, self.look)
        old, self._lines = self._lines, new
        self._extend(len(new))
        top = self.scroll_offset.y
        for row in range(size.height):
            place = top + row
            before = old[place] if place < len(old) else None
            after = new[place] if place < len(new) else None
            if before != after:
                self.drawn_lines += 1
                self.refresh(Region(0, row, size.width, 1))

    @property
    def _room(self) -> Size:
        return self.scrollable_content_region.size

    def _visible(self) -> bool:
        return all(node.display for node in self.ancestors_with_self if isinstance(node, Widget))

    def _extend(self, count: int) -> None:
        size = self._room
        virtual = Size(size.width, max(count, 1) if self._scrolls else size.height)
        if virtual != self.virtual_size:
            at_end = self.scroll_offset.y >= self.max_scroll_y
            self.virtual_size = virtual
            if self._follow and at_end:
                self.scroll_end(animate=False)

    def on_resize(self) -> None:
        self._lines = []
        self.redraw()
        self.refresh()

    def on_show(self) -> None:
        self._lines = []
        self.redraw()
        self.refresh()

    def line_at(self, place: int) -> Line:
        """What line ``place`` of all lines shows."""
        return self._lines[place] if place < len(self._lines) else ()

    def render_line(self, y: int) -> Strip:
        return self.strip(self.line_at(self.scroll_offset.y + y), self.scrollable_content_region.width)

    def strip(self, line: Line, width: int) -> Strip:
        """``line`` in this theme's colours."""
        theme = themes.DARK if self.app.current_theme.dark else themes.LIGHT
        if self._base is None or self._base[0] != self.app.theme:
            self._base = (self.app.theme, self.rich_style)  # asking for it costs more than all the rest here
        segments = [Segment(text, themes.style(role, theme)) for text, role in line]
        size = length(line)
        if size < width:
            segments.append(Segment(" " * (width - size)))
        return Strip(segments, max(size, width)).crop(0, width).apply_style(self._base[1])

"""The monitor's screen: takes snapshots from a ``Player`` and hands them to the panels of the view that is shown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

from rich.console import Group, RenderableType
from textual import events
from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import ContentSwitcher, Static

from teegpu import files
from teegpu.formats import as_json
from teegpu.monitor import themes
from teegpu.monitor.draw import Look
from teegpu.monitor.players import Player
from teegpu.monitor.snapshot import FAILED, Snapshot
from teegpu.monitor.widgets.bars import Header, ViewBar
from teegpu.monitor.widgets.dialogs import GO_ON, STOP, Help, Jump, Quit
from teegpu.monitor.widgets.main import VIEWS, Main
from teegpu.monitor.widgets.panel import Panel
from teegpu.monitor.widgets.tables import LayerTable, OpTable, Table
from teegpu.stats.summary import Summary

DONE: Final = "done"
"""The app's result where there is nothing to decide: the run has ended, or is not ours. Else ``stop`` or ``go-on``."""

Conclude = Callable[[Mapping[str, Any]], list[RenderableType]]
"""A finished run's document → what its report shows."""

BuildDocument = Callable[[Mapping[str, Any], Summary], dict[str, Any]]


_TITLES: Final = {"p-tail": "requests", "p-progress": "how full it is"}
"""Of panels that show something else where a run serves several at once."""


class Monitor(App[str]):
    """Shows what ``player`` gives, until the user quits.

    ``ours``: the run was started for this view, so that quitting may stop it. ``conclude`` makes the report of a
    finished run's document, ``build`` a document of a run that goes on (for exports), ``folder`` is where exports are
    written. The result is ``stop``, ``go-on`` or ``done``.
    """

    CSS_PATH = "styles.tcss"
    TITLE = "teegpu"
    ENABLE_COMMAND_PALETTE = True
    AUTO_FOCUS = None
    HORIZONTAL_BREAKPOINTS = [  # noqa: RUF012 (Textual declares it so)
        (0, "-narrow"),
        (100, "-middle"),
        (170, "-wide"),
    ]
    VERTICAL_BREAKPOINTS = [  # noqa: RUF012
        (0, "-short"),
        (32, "-tall"),
        (50, "-high"),
    ]
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "leave", "Quit"),
        Binding("ctrl+c,ctrl+q", "leave", "Quit", show=False, priority=True),
        Binding("question_mark,f1", "help", "Help", key_display="?"),
        Binding("space", "pause", "Pause"),
        *(Binding(str(number), f"view('{view}')", view, show=False) for number, view in enumerate(VIEWS, 1)),
        Binding("s", "sort", "Sort"),
        Binding("p", "phase", "Phase"),
        Binding("e", "export", "Export"),
        Binding("t", "theme", "Theme"),
        Binding("l", "letters", "Letters", show=False),
        Binding("plus,equals_sign", "faster(1)", "Quicker", key_display="+"),
        Binding("minus", "faster(-1)", "Slower", key_display="-"),
        Binding("full_stop", "step", "Step", key_display="."),
        Binding("j", "jump", "Jump"),
    ]

    def __init__(
        self,
        player: Player,
        *,
        ours: bool = False,
        theme: str = themes.DARK,
        hertz: float = 5.0,
        conclude: Conclude | None = None,
        build: BuildDocument | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__()
        self.player = player
        self._ours = ours
        self._hertz = hertz
        self._conclude = conclude
        self._build = build
        self._folder = folder if folder is not None else Path()
        self._state: Snapshot | None = None
        self._held = False
        self._concluded = False
        self._reading = False
        self._panels: dict[str, list[Panel]] = {}
        self.look = Look(letters=bool(self.no_color))
        for name in themes.COLOURS:
            self.register_theme(themes.theme(name))
        self.theme = theme if theme in self.available_themes else themes.DARK

    def get_theme_variable_defaults(self) -> dict[str, str]:
        return themes.variables(themes.DARK)

    def get_default_screen(self) -> Screen[None]:
        return Main(id="_default")

    def on_ready(self) -> None:
        self.set_interval(1.0 / self._hertz, self.pull)
        self.pull()

    # Snapshots

    @property
    def state(self) -> Snapshot | None:
        """What is shown."""
        return self._state

    def pull(self) -> None:
        """Reads what is new, and shows it."""
        if self.player.left:
            self.exit(DONE)
            return
        if not self._reading:
            self._read()
        state = self.player.take()
        if state is None or (self._held and not state.ended):
            return
        self._state = state
        self._arrange(state)
        self._show_state()
        if state.ended and not self._concluded:
            self._end(state)
        elif not state.ended:
            self._concluded = False

    def _read(self) -> None:
        self._reading = self.player.tick()
        if self._reading:
            self.call_later(self._read)  # keys and timers have their turn before it

    @property
    def _main(self) -> Screen[Any]:
        return self.screen_stack[0]

    def _show_state(self) -> None:
        """Hands the snapshot to the panels that can be seen; the others get it when their view is chosen."""
        state = self._state
        if state is None:
            return
        for panel in self._panels_of("") + self._panels_of(self.view):
            panel.show(state)

    def _panels_of(self, view: str) -> list[Panel]:
        """Those of a view, or (of no view) those above all of them. They never change, and looking for them costs."""
        if not self._panels:
            self._panels = {name: [] for name in (*VIEWS, "")}
            for panel in self._main.query(Panel):
                place = next((node.id for node in panel.ancestors if node.id in VIEWS), "")
                self._panels[place or ""].append(panel)
        return self._panels[view]

    def _arrange(self, state: Snapshot) -> None:
        """What takes the place of what: chunks of a prompt where there will be text."""
        chunked, short = bool(state.chunks), self._main.has_class("-short")
        # Where rows are few there is no pane for text, and chunks take the place of the layers' profile.
        wanted = {"p-chunks": chunked, "p-tail": not chunked and not short, "p-profile": not (chunked and short)}
        serves = state.serving is not None
        if serves:
            wanted = {"p-chunks": False, "p-tail": True, "p-profile": not short}
        for panel in self._panels_of("overview"):
            shown = wanted.get(panel.id or "")
            if shown is not None and panel.display != shown:
                panel.display = shown
            if panel.id in _TITLES and serves:
                panel.border_title = _TITLES[panel.id]
        if serves:
            self._main.query_one("#p-text", Panel).border_title = _TITLES["p-tail"]
        for panel in self._panels_of("layers"):
            if panel.id == "p-detail":
                panel.border_title = f"layer {state.focus} over time"

    def _end(self, state: Snapshot) -> None:
        self._concluded = True
        if self._ours and state.status == FAILED and not state.phase:
            self.exit(DONE)  # it did not come to anything: what it says of that is for the terminal
            return
        place = self._main.query_one("#p-report", Static)
        if state.document is not None and self._conclude is not None:
            place.update(Group(*self._conclude(state.document)))
            self._show_view("report")
        else:
            place.update(state.error or "There is no report of this run.")
        self._main.query_one("#report").border_subtitle = f"{state.status}: q closes"

    # What the keys do

    def action_view(self, view: str) -> None:
        self._show_view(view)

    def action_next_view(self, by: int) -> None:
        self._show_view(VIEWS[(VIEWS.index(self.view) + by) % len(VIEWS)])

    @property
    def view(self) -> str:
        return self._main.query_one("#body", ContentSwitcher).current or VIEWS[0]

    def _show_view(self, view: str) -> None:
        self._main.query_one("#body", ContentSwitcher).current = view
        bar = self._main.query_one(ViewBar)
        bar.current = view
        bar.redraw()
        self._show_state()
        target = {"layers": "#t-layers", "ops": "#t-ops", "text": "#p-text", "report": "#report"}.get(view)
        if target is not None and self.screen is self._main:
            self._main.query_one(target).focus()
        elif self.screen is self._main:
            self._main.set_focus(None)
        self.refresh_bindings()

    def on_view_bar_chosen(self, message: ViewBar.Chosen) -> None:
        self._show_view(message.view)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002
        if action in ("faster", "step", "jump"):
            return self.player.replays
        if action == "sort":
            return self.is_running and self.view in ("layers", "ops")
        if action == "phase":
            return self.is_running and self.view == "ops"
        return True

    def action_leave(self) -> None:
        if isinstance(self.screen, Quit):
            self.screen.dismiss(STOP)  # Ctrl-C twice, as an impatient user presses it
        elif not self._ours or (self._state is not None and self._state.ended):
            self.exit(DONE)
        else:
            self.push_screen(Quit(), self._quit)

    def _quit(self, answer: str | None) -> None:
        if answer in (STOP, GO_ON):
            self.exit(answer)

    def action_help(self) -> None:
        self.push_screen(Help())

    def action_pause(self) -> None:
        if self.player.replays:
            self.player.toggle()
            return
        self._held = not self._held
        header = self._main.query_one(Header)
        header.paused = self._held
        header.redraw()
        if not self._held:
            self.pull()

    def action_sort(self) -> None:
        for table in self._main.query(Table):
            if table.id == {"layers": "t-layers", "ops": "t-ops"}.get(self.view):
                table.next_sort()

    def action_phase(self) -> None:
        self._main.query_one(OpTable).next_phase()

    def action_theme(self) -> None:
        self.theme = themes.LIGHT if self.theme == themes.DARK else themes.DARK

    def watch_theme(self) -> None:
        if self.is_running:
            for panel in self._main.query(Panel):
                panel.refresh()

    def action_letters(self) -> None:
        self.look = Look(letters=not self.look.letters)
        self._show_state()

    def action_faster(self, steps: int) -> None:
        self.player.faster(steps)

    def action_step(self) -> None:
        self.player.step()

    def action_jump(self) -> None:
        self.push_screen(Jump(), self._jump)

    def _jump(self, token: int | None) -> None:
        if token is not None and token >= 0:
            self.player.jump(token)

    def on_layer_table_chosen(self, message: LayerTable.Chosen) -> None:
        view = self._main.query_one("#layers")
        same = self._state is not None and self._state.focus == message.layer
        view.set_class(not (view.has_class("-detail") and same), "-detail")
        self._focus(message.layer)

    def on_table_moved(self, message: Table.Moved) -> None:
        if isinstance(message.table, LayerTable):
            self._focus(message.table.chosen)

    def _focus(self, layer: int) -> None:
        self.player.focus(layer)
        held, self._held = self._held, False
        self.pull()
        self._held = held

    def on_resize(self, event: events.Resize) -> None:  # noqa: ARG002 (panels see their own; the arrangement depends on it)
        if self._state is not None:
            self.call_after_refresh(self._arrange, self._state)

    # Exports

    def action_export(self) -> None:
        """Writes the screen as SVG, and the run's document as JSON, into the folder that the command runs in. Both are
        readable by the user alone; text that the record does not have is left out."""
        state = self._state
        name = re.sub(r"[^A-Za-z0-9._-]", "-", state.facts.run_id if state else "") or "run"
        written = {f"teegpu-{name}-{self.view}.svg": self._picture(f"teegpu: {name}")}
        document = self._document()
        if document is not None:
            written[f"teegpu-{name}.json"] = as_json(document)
        for file, content in written.items():
            try:
                files.replace(self._folder / file, content)
            except OSError as error:
                self.notify(f"can't write {self._folder / file}: {error.strerror}", severity="error")
                return
        first, *more = written
        told = " and ".join([f"written: {self._folder / first}", *more])
        if state is not None and state.text_known and not state.text_private:
            told += ", which may hold the text: only you may read them"
        self.notify(told)

    def _picture(self, title: str) -> str:
        state = self._state
        try:
            if state is not None and state.text_private:
                self._state = replace(state, text="", text_known=False)
                self._show_state()
            # librsvg drops spaces at the beginning of a text otherwise
            svg = self.export_screenshot(title=title, simplify=True)
            return svg.replace("<svg ", '<svg xml:space="preserve" ', 1)
        finally:
            self._state = state
            self._show_state()

    def _document(self) -> dict[str, Any] | None:
        if self._state is not None and self._state.document is not None:
            return self._state.document
        if self._build is None or self._state is None or not self._state.events:
            return None
        return self._build(self.player.state.meta, self.player.state.summary)

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:  # noqa: ARG002
        for number, view in enumerate(VIEWS, 1):
            yield SystemCommand(f"View: {view}", f"Key {number}", lambda view=view: self._show_view(view))
        yield SystemCommand("Theme", "The other theme (t)", self.action_theme)
        yield SystemCommand("Letters", "Letters in place of colours, and back (l)", self.action_letters)
        yield SystemCommand("Pause", "Pause the view (space)", self.action_pause)
        yield SystemCommand("Export", "The screen as SVG, the run as JSON (e)", self.action_export)
        yield SystemCommand("Keys", "What the keys do (?)", self.action_help)
        yield SystemCommand("Quit", "Leave the monitor (q)", self.action_leave)

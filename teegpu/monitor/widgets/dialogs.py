"""Questions and help on top of the view."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Static

STOP, GO_ON, STAY = "stop", "go-on", "stay"

HELP = (
    ("1 … 6, tab", "views: overview, layers, ops, network, text, and at the end report"),
    ("space", "pause the view (of a replay: pause it); the run goes on"),
    ("s", "sort by the next thing; p: operations of one phase or both"),
    ("↑ ↓ Enter", "go through the layers; one layer over time"),
    ("l", "letters in place of colours, and back"),
    ("t", "the other theme; Ctrl+P: all commands"),
    ("e", "export: an SVG of the screen and the JSON of the run"),
    ("+ − . j", "in a replay: quicker, slower, one token on, jump to a token"),
    ("q", "quit; where the run is ours and goes on, asks what becomes of it"),
)
MEANING = (
    "T TEE: the trusted runner computes · S serialization: tensors become frames and back · N network: waiting for the "
    "link · Q server: its queue and serialization · G GPU: waiting for its computation. Communication is S and N. The "
    "parts of a phase add up to its wall time. Bars 'now' show the last second."
)


class Help(ModalScreen[None]):
    """The keys, and what the letters mean."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark,enter,space", "dismiss", "Close")]

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as box:
            box.border_title = "teegpu: keys"
            box.border_subtitle = "Esc closes"
            width = max(len(key) for key, _ in HELP) + 2
            yield Static("\n".join(f"{key:<{width}}{text}" for key, text in HELP), markup=False)
            yield Static("\n" + MEANING, markup=False, classes="meaning")


class Quit(ModalScreen[str]):
    """Asks what becomes of a run that goes on: ``stop``, ``go-on`` or ``stay``."""

    AUTO_FOCUS = "Button"

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "answer('stop')", "Stop the run"),
        Binding("g", "answer('go-on')", "Let it go on"),
        Binding("escape,n", "answer('stay')", "Stay"),
        Binding("left,up", "app.focus_previous", show=False),
        Binding("right,down", "app.focus_next", show=False),
    ]

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as box:
            box.border_title = "The run is not finished"
            yield Static(
                "Let it go on, and its text comes to this terminal; or stop it, and what there is so far is printed.",
                markup=False,
            )
            with Horizontal(classes="buttons"):
                yield Button("Go on (g)", id=GO_ON, variant="primary")
                yield Button("Stop it (s)", id=STOP, variant="error")
                yield Button("Stay (Esc)", id=STAY)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id or STAY)

    def action_answer(self, answer: str) -> None:
        self.dismiss(answer)


class Jump(ModalScreen[int]):
    """Asks for the token to jump to; -1: none."""

    AUTO_FOCUS = "Input"

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Stay")]

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as box:
            box.border_title = "Jump to token"
            yield Input(placeholder="number of the token; 0 is the begin", type="integer")

    def on_input_submitted(self, event: Input.Submitted) -> None:
        text = event.value.strip()
        self.dismiss(int(text) if text.isdigit() else -1)

    def action_leave(self) -> None:
        self.dismiss(-1)

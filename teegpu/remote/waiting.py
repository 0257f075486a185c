"""What a run waits for while a server does not answer, in words: nobody should look at a screen that says nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from transports.reach import why_silent

FIRST_SECONDS = 1.0
"""So long a wait is nothing to be told of."""
AGAIN_SECONDS = 5.0
"""Between two lines that differ in the time that is left alone."""
LOOK_SECONDS = 1.0
"""How long a look at an address may take."""


NOTHING_WRONG = "it is there and has not answered yet"


class Waiting:
    """Tells ``say``, from ``tick`` and in the thread that calls it, whom a run waits for, why, and for how long yet."""

    def __init__(self, say: Callable[[str], None], look: Callable[[str, float], str] = why_silent) -> None:
        self._say = say
        self._look = look
        self._forget()

    def _forget(self) -> None:
        self._began_ns: int | None = None
        self._line = ""
        self._told_ns = self._looked_ns = 0
        self._looking: threading.Thread | None = None
        self._why: dict[str, str] = {}

    def tick(self, what: str, addresses: Sequence[str], now_ns: int, left_seconds: float) -> None:
        """Called again and again while nothing else can be done. ``what``: how the line begins."""
        if self._began_ns is None:
            self._began_ns = now_ns
        if now_ns - self._began_ns < FIRST_SECONDS * 1e9 or not addresses:
            return
        busy = self._looking is not None and self._looking.is_alive()
        if not busy and (self._looking is None or now_ns - self._looked_ns >= LOOK_SECONDS * 1e9):
            self._looked_ns = now_ns
            self._looking = threading.Thread(target=self._find_out, args=(tuple(addresses), self._why), daemon=True)
            self._looking.start()
        if not all(address in self._why for address in addresses):
            return
        line = f"{what} {'; '.join(f'{each}: {self._why[each] or NOTHING_WRONG}' for each in addresses)}"
        if line != self._line or now_ns - self._told_ns >= AGAIN_SECONDS * 1e9:
            self._line, self._told_ns = line, now_ns
            # A server that is there may take longer than connecting to it may: it makes int8 weights, say.
            self._say(f"{line}; trying for another {left_seconds:.0f} s" if left_seconds > 0 else line)

    def over(self) -> None:
        """Somebody answers."""
        if self._line:
            self._say("a server answers: going on")
        self._forget()

    def _find_out(self, addresses: Sequence[str], why: dict[str, str]) -> None:
        for address in addresses:
            why[address] = self._look(address, LOOK_SECONDS)

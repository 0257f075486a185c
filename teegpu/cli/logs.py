"""The server's log on stderr: lines for people, or one JSON object each.

A line has an event (``client-came``, ``refused``, …) and fields, which the code that logs gives as ``extra``. Neither
tensors nor token ids nor text are among them: what a client sends is not logged, and of an error that nobody expected
only its type and place, since its message may quote values (``--log-level debug`` gives the message too).

What clients cause is bounded, so that none of them fills a disk: of each event some lines at once, then one now and
then, which says how many were left out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from teegpu.units import printable

if TYPE_CHECKING:
    from rich.console import Console

BURST_LINES = 20
REFILL_SECONDS = 5.0
"""Of one event: at most 17,300 lines a day, whatever clients do."""

MAX_MESSAGE = 500
LOGGERS = ("teegpu", "transports")

_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | {"message", "asctime", "taskName"}
_STYLES = {logging.DEBUG: "dim", logging.WARNING: "yellow", logging.ERROR: "bold red"}


def event_of(record: logging.LogRecord) -> str:
    """The record's event; where the code gave none, the part of the program that it comes from."""
    given: str = vars(record).get("event", "")
    return given or record.name.rpartition(".")[2]


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What the code that logs gave. Names that begin with ``_`` are those of libraries (Ray) which mark all lines."""
    known = _STANDARD | {"event"}
    return {name: value for name, value in vars(record).items() if name not in known and not name.startswith("_")}


class Bounded(logging.Filter):
    """Lets of each event ``BURST_LINES`` through, and one more every ``REFILL_SECONDS``; that one has the number of
    those left out before it as its field ``left_out``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._buckets: dict[str, tuple[float, float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        event, now = event_of(record), self._clock()
        tokens, then, left_out = self._buckets.get(event, (float(BURST_LINES), now, 0))
        tokens = min(float(BURST_LINES), tokens + (now - then) / REFILL_SECONDS)
        if tokens < 1.0:
            self._buckets[event] = (tokens, now, left_out + 1)
            return False
        self._buckets[event] = (tokens - 1.0, now, 0)
        if left_out:
            record.left_out = left_out
        return True


class JsonLines(logging.Formatter):
    """``{"ts": …, "level": …, "event": …, "message": …, "fields": {…}}`` on one line; times are UTC."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "ts": at,
            "level": record.levelname.lower(),
            "event": event_of(record),
            "message": printable(record.getMessage(), MAX_MESSAGE),
            "fields": fields_of(record),
        }
        if (error := _error(record)) is not None:
            line["error"] = error
        return json.dumps(line, ensure_ascii=False, default=str)


class PlainLines(logging.Formatter):
    """``10:32:05 warning  refused a request: …``; times are local."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        line = f"{at} {record.levelname.lower():<7}  {printable(record.getMessage(), MAX_MESSAGE)}"
        left_out = vars(record).get("left_out", 0)
        if left_out:
            line += f" ({left_out:,} more like it were not logged)"
        if (error := _error(record)) is not None:
            line += f" [{error['type']} at {' < '.join(error['stack'])}]"
        return line


def _error(record: logging.LogRecord) -> dict[str, Any] | None:
    if record.exc_info is None or record.exc_info[1] is None:
        return None
    error = record.exc_info[1]
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    stack = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in reversed(frames)]
    told: dict[str, Any] = {"type": type(error).__name__, "stack": stack}
    if logging.getLogger(record.name).isEnabledFor(logging.DEBUG):
        told["message"] = printable(str(error), MAX_MESSAGE)
    return told


class _ToConsole(logging.Handler):
    """Writes lines; where they can't be written (a full disk, a reader that went away) the server goes on without."""

    def __init__(self, console: Console, formatter: logging.Formatter) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(formatter)
        self.addFilter(Bounded())

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        with contextlib.suppress(OSError, ValueError):
            if isinstance(self.formatter, JsonLines):
                self._console.file.write(line + "\n")
                self._console.file.flush()
            else:
                self._console.print(line, style=_STYLES.get(record.levelno, ""), soft_wrap=True)


@contextlib.contextmanager
def shown(form: str, level: str, console: Console) -> Iterator[None]:
    """Within it, what the program logs from ``level`` on goes to ``console`` in ``form``, ``rich`` or ``json``."""
    handler = _ToConsole(console, JsonLines() if form == "json" else PlainLines())
    before = []
    for name in LOGGERS:
        logger = logging.getLogger(name)
        before.append((logger, logger.level))
        logger.setLevel(level.upper())
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger, old in before:
            logger.removeHandler(handler)
            logger.setLevel(old)

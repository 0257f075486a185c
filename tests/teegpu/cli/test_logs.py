"""The server's log."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable

import pytest
from rich.console import Console

from teegpu.cli import logs

log = logging.getLogger("teegpu.gpu.test")


def lines(form: str, level: str, write: Callable[[], None]) -> list[str]:
    out = io.StringIO()
    with logs.shown(form, level, Console(file=out, markup=False, highlight=False, width=40)):
        write()
    log.info("after the end")
    return out.getvalue().splitlines()


def test_json_lines_have_event_and_fields() -> None:
    about = {"event": "client-came", "connection": 3, "peer": "127.0.0.1:5", "_ray_timestamp_ns": 1}
    line, other = (
        json.loads(line)
        for line in lines(
            "json", "info", lambda: (log.info("client %d came", 3, extra=about), log.warning("something else"))
        )
    )
    assert line.pop("ts").endswith("+00:00")
    assert line == {
        "level": "info",
        "event": "client-came",
        "message": "client 3 came",
        "fields": {"connection": 3, "peer": "127.0.0.1:5"},
    }
    assert (other["level"], other["event"], other["fields"]) == ("warning", "test", {})


def test_lines_for_people_stay_whole() -> None:
    (line,) = lines("rich", "info", lambda: log.warning("refused a request: %s", "because " * 20))
    assert line[8:].startswith(" warning  refused a request: because because")


def test_the_level() -> None:
    def write() -> None:
        log.debug("one")
        log.info("two")
        log.error("three")

    assert len(lines("json", "debug", write)) == 3
    assert len(lines("json", "info", write)) == 2
    assert len(lines("rich", "error", write)) == 1


@pytest.mark.parametrize("form", ["json", "rich"])
def test_a_peers_text_forges_no_line(form: str) -> None:
    def write() -> None:
        log.warning("refused: %s", 'x\n12:00:00 error  forged\x1b[31m", "level": "error', extra={"reason": "a\nb"})

    (line,) = lines(form, "info", write)
    assert "\x1b" not in line
    assert form == "rich" or json.loads(line)["level"] == "warning"


def test_what_clients_cause_is_bounded() -> None:
    now = [0.0]
    bounded = logs.Bounded(lambda: now[0])

    def record(event: str) -> logging.LogRecord:
        made = logging.LogRecord("transports.router", logging.WARNING, "", 0, "x", None, None)
        made.event = event
        return made

    assert sum(bounded.filter(record("refused")) for _ in range(10_000)) == logs.BURST_LINES
    assert bounded.filter(record("client-came")), "other events have lines of their own"
    now[0] = logs.REFILL_SECONDS
    again = record("refused")
    assert bounded.filter(again)
    assert vars(again)["left_out"] == 10_000 - logs.BURST_LINES
    assert not bounded.filter(record("refused"))
    now[0] += 1e6
    first = record("refused")
    assert bounded.filter(first)
    assert vars(first)["left_out"] == 1
    assert sum(bounded.filter(record("refused")) for _ in range(100)) == logs.BURST_LINES - 1


def test_those_left_out_are_told_to_people_too() -> None:
    record = logging.LogRecord("transports.router", logging.WARNING, "", 0, "refused", None, None)
    record.left_out = 1234
    assert logs.PlainLines().format(record).endswith("refused (1,234 more like it were not logged)")


@pytest.mark.parametrize("form", ["json", "rich"])
def test_an_error_is_told_without_what_it_quotes(form: str) -> None:
    def write() -> None:
        try:
            raise IndexError("token id 4711 is out of range")
        except IndexError:
            log.exception("request %d failed", 7)

    (line,) = lines(form, "info", write)
    assert "IndexError" in line
    assert "test_logs.py" in line
    assert "4711" not in line
    assert "4711" in lines("json", "debug", write)[0]


def test_a_log_that_can_not_be_written_stops_nobody() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    for form in ("json", "rich"):
        with logs.shown(form, "info", Console(file=Full())):
            log.info("nobody reads this")

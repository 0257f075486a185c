"""The name that was meant."""

from __future__ import annotations

import pytest

from teegpu.cli.main import COMMANDS
from teegpu.errors import nearest
from teegpu.settings import SECTIONS, SETTINGS


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("run.transprot", "run.transport"),
        ("run.thread", "run.threads"),
        ("run.endpont", "run.endpoints"),
        ("run.maxtokens", "run.max_tokens"),
        ("run.prefil_plan", "run.prefill_plan"),
        ("run.wire_dtpye", "run.wire_dtype"),
        ("Run.Threads", "run.threads"),
        ("server.dtyp", "server.dtype"),
        ("link.serverkey", "link.server_key"),
        # A word of it, and a setting of another section.
        ("run.chunk", "run.chunk_tokens"),
        ("sampling.temp", "sampling.temperature"),
        ("run.temperature", "sampling.temperature"),
        ("monitor.thme", "monitor.theme"),
        # One that is two.
        ("run.plan", "run.decode_plan' or 'run.prefill_plan"),
        ("run.plann", "run.decode_plan' or 'run.prefill_plan"),
        ("link.key", "link.server_key' or 'link.client_key' or 'api.keys"),
    ],
)
def test_a_setting(typed: str, meant: str) -> None:
    assert nearest(typed, list(SETTINGS)) == f", did you mean '{meant}'?"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("rn", "run"), ("rnu", "run"), ("reprot", "report"), ("serv", "serve"), ("key", "keys"), ("dotcor", "doctor")],
)
def test_a_command(typed: str, meant: str) -> None:
    assert nearest(typed, list(COMMANDS)) == f", did you mean '{meant}'?"


@pytest.mark.parametrize("typed", ["run.qqqqqqqqqq", "run.x", "run.", "", "x", "-z", "--nonsense", "chat", "\ufffd[2J"])
def test_none_is_near(typed: str) -> None:
    assert nearest(typed, [*SETTINGS, *SECTIONS, *COMMANDS, "-q", "--note", "--json"]) == ""

"""The name that was meant."""

from __future__ import annotations

import pytest

from teegpu.cli.main import COMMANDS
from teegpu.errors import nearest
from teegpu.model.shapes import SHAPES
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
        ("link.key", "link.server_key' or 'link.client_key"),
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


@pytest.mark.parametrize(
    ("typed", "meant"), [("tinyllama", "tinyllama-1.1b"), ("smolm2-135m", "smollm2-135m"), ("phi-4", "phi-4-mini")]
)
def test_a_model(typed: str, meant: str) -> None:
    assert nearest(typed, list(SHAPES)) == f", did you mean '{meant}'?"


@pytest.mark.parametrize("typed", ["run.qqqqqqqqqq", "run.x", "", "x", "-z", "--nonsense", "chat", "\ufffd[2J"])
def test_none_is_near(typed: str) -> None:
    assert nearest(typed, [*SETTINGS, *SECTIONS, *COMMANDS, "-q", "--note", "--json"]) == ""

"""What settings come to where they leave something open."""

from __future__ import annotations

import pytest

from teegpu import options
from teegpu.config import load
from teegpu.endpoints import Endpoint
from teegpu.options import client_options, local_dtype


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({}, "auto"),
        ({"server.dtype": "bf16"}, "auto"),
        ({"server.dtype": "fp32"}, "fp32"),
        ({"run.wire_dtype": "fp32"}, "fp32"),
        ({"run.wire_dtype": "fp32", "run.local_dtype": "bf16"}, "bf16"),
        ({"run.local_dtype": "fp32"}, "fp32"),
    ],
)
def test_who_asks_for_fp32_gets_it_from_local_too(flags: dict[str, str], told: str) -> None:
    assert local_dtype(load(flags)) == told


@pytest.mark.parametrize(
    ("address", "shared", "cores", "polls"),
    [
        ("ipc:///run/gpu", True, 2, False),
        ("tcp://127.0.0.1:5555", True, 2, False),
        ("tcp://gpu.example:5555", True, 2, True),
        ("ipc:///run/gpu", False, 8, True),
        ("tcp://gpu.example:5555", False, 1, False),
    ],
)
def test_nobody_polls_on_a_core_that_the_answer_needs(
    address: str, shared: bool, cores: int, polls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "available_cores", lambda: cores)
    monkeypatch.setattr(options, "shares_cores", lambda: shared)
    assert bool(client_options(load({}), Endpoint(address)).spin_seconds) is polls

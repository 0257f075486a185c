"""What is told while a server and its link are measured."""

from __future__ import annotations

import socket

import pytest

from teegpu import config
from teegpu.bench.measure import Progress
from teegpu.bench.tuning import Tuning, Wanted
from tests.conftest import TinyModel
from transports.errors import ConnectError


def test_whom_it_waits_for_is_told_meanwhile(tiny_model: TinyModel) -> None:
    told: list[Progress] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        settings = config.load({"run.endpoints": (address,), "link.connect_timeout_seconds": 3.0})
        with pytest.raises(ConnectError):
            Tuning(tiny_model("llama"), settings, Wanted(8, 1, allow_lossy=False)).run(told.append)
    assert told[0].stage == "pipelined"
    assert any(step.stage.startswith(f"waiting for the server at {address}: ") for step in told)

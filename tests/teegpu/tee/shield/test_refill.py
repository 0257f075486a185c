from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from teegpu.config import Config
from teegpu.tee.shield.refill import Refill
from tests.conftest import TinyModel


def config(tokens: int) -> Config:
    return Config(shield=replace(Config().shield, refill_tokens=tokens))


def test_it_ends_with_the_run(tiny_model: TinyModel) -> None:
    notes: list[str] = []
    with Refill(tiny_model("llama"), config(64), notes.append) as refill:
        deadline = time.monotonic() + 30
        arguments: list[bytes] = []
        while b"--tokens" not in arguments and time.monotonic() < deadline:  # until then it is a copy of ourselves
            arguments = Path(f"/proc/{refill.pid}/cmdline").read_bytes().split(b"\0")
        assert arguments[arguments.index(b"--tokens") + 1] == b"64"
        assert b"--up-to" in arguments  # so it is bounded
    assert not os.path.exists(f"/proc/{refill.pid}")
    refill.close()
    assert notes == []


def test_a_failure_is_told_and_does_no_harm(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    notes: list[str] = []
    with Refill(tiny_model("llama"), config(64), notes.append):
        pass
    assert notes == ["no pads were made beside this run: exit code 1"]

"""``teegpu bench serve`` against an endpoint: every client's requests are measured, errors are told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from teegpu.cli.main import run
from tests.teegpu.api.conftest import Endpoint, StartEndpoint


def test_figures_of_a_load(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "serve", "--url", endpoint.url, "--prompt-tokens", "20", "--max-tokens", "8", "-q"]
    assert run([*arguments, "--clients", "1,3", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    one, three = document["results"]
    assert document["model"] == "tiny-llama"
    assert (one["completed"], three["completed"], three["failed"]) == (2, 6, 0)
    assert three["total_output_tokens"] == 48
    assert three["output_throughput"] == pytest.approx(48 / three["duration"])
    assert 0 < one["p50_ttft_ms"] <= one["p99_ttft_ms"]
    assert run([*arguments, "--clients", "2"]) == 0
    assert "tokens/s" in capsys.readouterr().out


def test_what_goes_wrong_is_told(start: StartEndpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tmp_path / "keys"
    keys.write_text(hashlib.sha256(b"one").hexdigest())
    endpoint = start(api__keys=str(keys))
    assert run(["bench", "serve", "--url", endpoint.url, "-q"]) == 2
    assert "is the key right?" in capsys.readouterr().err
    given = ["bench", "serve", "--url", endpoint.url, "-q", "--key", "one", "--clients", "1", "--requests", "1"]
    assert run([*given, "--prompt-tokens", "5000", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["results"][0]["failed"] == 1
    assert "the model's context ends" in captured.err
    endpoint.end()
    assert run(["bench", "serve", "--url", endpoint.url, "-q"]) == 4
    assert run(["bench", "serve", "--clients", "0"]) == 2

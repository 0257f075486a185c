"""What watching costs: a pair on a tiny model with a real monitor, and the figures made of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from teegpu.bench import render
from teegpu.bench.cases import from_values
from teegpu.bench.watching import WatchBenchmark, WatchPair, WatchSample
from teegpu.errors import PromptError, UsageError
from tests.conftest import TinyModel

LOCAL = {"run.prefill_plan": "local", "run.decode_plan": "local", "run.threads": 1}


def test_a_pair_is_compared_with_itself() -> None:
    pair = WatchPair(WatchSample(1.0, 2.0, 4.0), WatchSample(1.5, 2.0, 3.0))
    assert [pair.overhead(key) for key in ("prefill", "decode", "run")] == [0.5, 0.0, -0.25]


def test_a_tiny_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = from_values(LOCAL | {"record.dir": str(tmp_path / "runs")})
    bench = WatchBenchmark(tiny_model("llama"), base, prompt_tokens=16, decode_tokens=4, pairs=1)
    assert bench.document("interrupted")["results"] == []
    bench.run()
    assert os.listdir(tmp_path / "runs") == [], "its records are gone"
    document = bench.document("complete")
    assert [entry["part"] for entry in document["results"]] == ["prefill", "decode", "run"]
    (pair,) = document["pairs"]
    assert pair["off"]["monitor_bytes"] == 0
    assert pair["on"]["monitor_bytes"] > 10 * 2**20
    assert document["monitor"]["cpu_share"]["median"] >= 0.0
    for form in render.FORMATS:
        assert "overhead" in render.render(document, form)
    assert "of a core" in render.render(document, "table")


def test_what_can_not_be_measured(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    with pytest.raises(UsageError, match="--pairs 0 is below the least, 1"):
        WatchBenchmark(folder, from_values({}), prompt_tokens=1, decode_tokens=1, pairs=0)
    with pytest.raises(PromptError, match="which ends at 256: give less"):
        WatchBenchmark(folder, from_values({}), prompt_tokens=200, decode_tokens=57, pairs=1)

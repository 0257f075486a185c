"""What a record costs: pairs on a tiny model, and the figures made of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from teegpu.bench import render
from teegpu.bench.cases import from_values
from teegpu.bench.measure import Progress
from teegpu.bench.recording import Pair, RecordingBenchmark, RecordingSample
from teegpu.errors import PromptError, RecordError, UsageError
from tests.conftest import TinyModel

LOCAL = {"run.prefill_plan": "local", "run.decode_plan": "local", "run.threads": 1}


def test_a_pair_is_compared_with_itself() -> None:
    pair = Pair(RecordingSample(1.0, 2.0, 4.0), RecordingSample(1.5, 2.0, 3.0))
    assert [pair.overhead(key) for key in ("prefill", "decode", "run")] == [0.5, 0.0, -0.25]
    assert Pair(RecordingSample(0, 0, 0), RecordingSample(1, 1, 1)).overhead("run") == 0.0


def test_a_tiny_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    base = from_values(LOCAL | {"record.dir": str(tmp_path / "runs")})
    bench = RecordingBenchmark(tiny_model("llama"), base, prompt_tokens=16, decode_tokens=4, pairs=3)
    assert bench.document("interrupted")["results"] == []
    steps: list[Progress] = []
    bench.run(steps.append)
    assert torch.get_num_threads() == threads
    assert [step.done for step in steps] == [0, 1, 2, 3]
    assert steps[-1].outcome.startswith("overhead ")
    assert os.listdir(tmp_path / "runs") == [], "its records are gone"
    document = bench.document("complete")
    assert [entry["part"] for entry in document["results"]] == ["prefill", "decode", "run"]
    for entry in document["results"]:
        assert entry["pairs"] == 3
        assert 0 <= entry["slower_pairs"] <= 3
        assert entry["off_seconds"]["median"] > 0 < entry["on_seconds"]["median"]
        assert entry["overhead"]["min"] <= entry["overhead"]["median"] <= entry["overhead"]["max"]
    for pair in document["pairs"]:
        assert pair["off"]["events"] == pair["off"]["plain_bytes"] == 0
        assert pair["on"]["events"] > 50
        assert pair["on"]["plain_bytes"] > pair["on"]["compressed_bytes"] > 500
        assert pair["on"]["prefill"] + pair["on"]["decode"] <= pair["on"]["run"]
    for form in render.FORMATS:
        text = render.render(document, form)
        assert "overhead" in text
    assert "3 pairs" in render.render(document, "table")


def test_what_can_not_be_measured(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    with pytest.raises(UsageError, match="--pairs 0 is below the least, 1"):
        RecordingBenchmark(folder, from_values({}), prompt_tokens=1, decode_tokens=1, pairs=0)
    with pytest.raises(PromptError, match="which ends at 256: give less"):
        RecordingBenchmark(folder, from_values({}), prompt_tokens=250, decode_tokens=7, pairs=1)
    (tmp_path / "file").write_text("")
    nowhere = from_values(LOCAL | {"record.dir": str(tmp_path / "file" / "runs")})
    with pytest.raises(RecordError, match=r"no record can be kept in .*/file/runs: Not a directory \(record.dir\)"):
        RecordingBenchmark(folder, nowhere, prompt_tokens=1, decode_tokens=1, pairs=1).run()

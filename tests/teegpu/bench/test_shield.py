from __future__ import annotations

from dataclasses import replace

import pytest

from teegpu.bench import render
from teegpu.bench.measure import Progress
from teegpu.bench.shield import MODES, ShieldBenchmark
from teegpu.config import Config
from teegpu.errors import UsageError
from tests.conftest import TinyModel


def test_every_mode_and_operation_is_measured(tiny_model: TinyModel) -> None:
    base = Config(run=replace(Config().run, threads=1))
    bench = ShieldBenchmark(tiny_model("llama"), base, rows=12, batch=3, repeats=2, layers=1)
    told: list[Progress] = []
    bench.run(told.append)
    document = bench.document("complete")
    entries = {entry["label"]: entry for entry in document["results"]}
    masks = {"MASK", "UNMASK"}
    work = {"two-server": masks, "pads": masks | {"offline"}, "none": set[str]()}
    common = {"FIXED_POINT", "VERIFY", "all of it"}
    assert set(entries) == {f"{mode}: {name}" for mode in MODES for name in common | work[mode]} | {"local: all of it"}
    for mode in MODES:
        for phase in ("chunk", "batch", "step"):
            parts = [entries[f"{mode}: {name}"] for name in common | work[mode] - {"offline"} if name != "all of it"]
            least = sum(part[f"{phase}_seconds_per_token"]["min"] for part in parts)
            most = sum(part[f"{phase}_seconds_per_token"]["max"] for part in parts)
            total = entries[f"{mode}: all of it"][f"{phase}_seconds_per_token"]
            assert least <= total["median"] * 1.001
            assert total["median"] <= most * 1.001
            local, ours = (
                entries[f"{each}: all of it"][f"{phase}_processor_seconds_per_token"]["median"]
                for each in ("local", mode)
            )
            assert entries[f"{mode}: all of it"][f"{phase}_leverage"] == pytest.approx(local / ours)
    assert entries["pads: offline"]["chunk_seconds_per_token"]["median"] > 0
    assert document["settings"]["layers_measured"] == 1
    recommended = document["notes"][3]
    for number, mode in enumerate(MODES):
        worth = [each for each in ("chunk", "batch", "step") if entries[f"{mode}: all of it"][f"{each}_leverage"] > 1]
        said = recommended.partition("more than 1: ")[2].split("; ")[number]
        assert said == (f"{mode} in a {', '.join(worth)}" if worth else f"{mode} nowhere")
    for form in ("table", "md", "csv", "json"):
        assert "VERIFY" in render.render(document, form)
    assert [step.done for step in told] == sorted(step.done for step in told)


def test_what_can_not_be_measured_is_told(tiny_model: TinyModel) -> None:
    with pytest.raises(UsageError, match="--rows"):
        ShieldBenchmark(tiny_model("llama"), Config(), rows=0, batch=1, repeats=1, layers=1)
    with pytest.raises(UsageError, match="--mode lwe is none of two-server"):
        ShieldBenchmark(tiny_model("llama"), Config(), rows=1, batch=1, repeats=1, layers=1, modes=["lwe"])

"""Predictions ranked, worlds on paper, and predictions held against measurements."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from teegpu.bench import assumptions, tuned, tunetables
from teegpu.bench.against import against, packed_costs
from teegpu.bench.predictions import Wanted
from teegpu.errors import ConfigError, UsageError
from teegpu.metrics import profile as profiles
from teegpu.metrics.cost_model import CostModel, Settings
from tests.teegpu.metrics.tuning import SHAPE, profile, rates
from transports.errors import LinkSpecError

DEFAULTS = {"model": "llama-3-8b", "gpu": "h100", "tee": "32-core-avx512"}


def wanted(**changes: Any) -> Wanted:
    base = Settings("fused", "fp16", "pipelined", 0)
    return Wanted(**{"prompt_tokens": 1024, "decode_tokens": 64, "base": base, "own_wire": "fp16"} | changes)


def of_profile(made: Any = None, **changes: Any) -> dict[str, Any]:
    slow = rates(rtt=0.005, bandwidth=2.5e7, tee_flop=4e-10, server_flop=2e-12)
    return tuned.of_profile(made or profile(rates=slow), wanted(**changes), {})


def test_all_ways_are_ranked_and_nothing_lossy_is_chosen() -> None:
    made = of_profile()
    for phase in ("prefill", "decode"):
        seconds = [entry["seconds"] for entry in made[phase]]
        assert seconds == sorted(seconds)
        assert {entry["plan"] for entry in made[phase]} == {"local", "per-op", "batched", "attention", "fused"}
        assert sum(entry["plan"] == "local" for entry in made[phase]) == 1
    assert made["prefill"][0]["wire_dtype"] == "int8"
    assert made["prefill"][0]["lossy"]
    assert not made["choice"]["prefill"]["lossy"]
    assert "run.wire_dtype" not in made["choice"]["settings"]
    lossy = of_profile(allow_lossy=True)["choice"]["settings"]
    assert lossy["run.wire_dtype"] == "int8"


def test_a_tie_keeps_the_default_transport() -> None:
    assert of_profile(profile(rates=rates()))["choice"]["settings"].get("run.transport", "pipelined") == "pipelined"


def test_the_embedded_server_is_told_what_it_is() -> None:
    made = of_profile(profile(rates=rates(server_flop=1e-9), endpoints=()), plans=("fused", "attention"))
    assert made["choice"]["settings"]["run.prefill_plan"] == "fused"
    assert any(note.startswith("all in the TEE would take") for note in made["notes"])
    crowded = of_profile(local_fits=False)
    assert crowded["choice"]["prefill"]["plan"] != "local"
    assert any("memory" in note for note in crowded["notes"])


@pytest.mark.parametrize("form", tunetables.FORMATS)
def test_every_format(form: str) -> None:
    made = of_profile()
    text = tunetables.render(made, form)
    assert text.endswith("\n")
    if form == "json":
        assert json.loads(text)["schema"] == "teegpu.tune/1"
    elif form == "csv":
        rows = list(csv.DictReader(io.StringIO(text)))
        assert len(rows) == len(made["prefill"]) + len(made["decode"])
        assert float(rows[0]["seconds"]) == made["prefill"][0]["seconds"]
    else:
        assert "chosen" in text
        assert "predictions from profile of 2026-01-02" in text
        assert 'run.prefill_plan = "fused"' in text


# Worlds on paper


def world(spec: str, **changes: Any) -> dict[str, Any]:
    return tuned.of_world(assumptions.parse(spec, DEFAULTS), wanted(**changes))


def test_a_world_says_that_it_is_one() -> None:
    made = world("rtt=1ms,bandwidth=100gbit,model=llama-3-8b,gpu=h200,tee=8-core-avx512")
    assert made["notes"][0].startswith("all figures are predictions")
    assert {"GPU h200", "TEE 8-core-avx512", "link", "model"} <= {each["what"] for each in made["assumptions"]}
    assert all(each["source"] for each in made["assumptions"])
    text = tunetables.render(made, "md")
    assert "every figure is a prediction" in text
    assert "| GPU h200 |" in text


def test_offloading_pays_from_its_break_even_on() -> None:
    spec = "rtt=0.1ms,{}model=llama-3-8b,gpu=h100,tee=8-core-avx512"
    least = world(spec.format(""))["break_even"]["prefill_bytes_per_second"]
    for share, pays in ((0.95, False), (1.05, True)):
        link = f"bandwidth={share * least / 1e6:.3f}MB,"
        assert (world(spec.format(link))["choice"]["prefill"]["plan"] != "local") is pays or not pays
        made = world(spec.format(link))
        offloaded = min(e["seconds"] for e in made["prefill"] if e["plan"] == "fused" and e["wire_dtype"] == "fp16")
        assert (offloaded <= made["local"]["prefill_seconds"]) is pays
    assert world("rtt=50ms,gpu=h100,tee=64-core-amx")["break_even"]["decode_bytes_per_second"] is None


def test_worlds_side_by_side() -> None:
    parsed = [assumptions.parse(spec, DEFAULTS) for spec in ("rtt=0.1ms,model=tinyllama-1.1b", "rtt=50ms,servers=2")]
    made = tuned.of_worlds([(each, wanted(own_wire="bf16")) for each in parsed])
    assert [each["servers"] for each in made["results"]] == [1, 2]
    assert made["results"][1]["choice"] == {"prefill": "fused", "decode": "local"}
    text = tunetables.render(made, "md")
    assert text.count("| tinyllama-1.1b |") == 1
    assert "never" in text
    rows = list(csv.DictReader(io.StringIO(tunetables.render(made, "csv"))))
    assert float(rows[0]["local_prefill_seconds"]) == made["results"][0]["local"]["prefill_seconds"]


def test_own_speeds_and_more_servers() -> None:
    made = assumptions.parse("gpu=400tflops,tee=2tflops,servers=2", DEFAULTS)
    assert (made.gpu.flops, made.tee.flops, made.servers) == (4e14, 2e12, 2)
    assert "given" in made.gpu.source


@pytest.mark.parametrize(
    ("spec", "kind", "message"),
    [
        ("gpu=h10", UsageError, "unknown gpu 'h10', did you mean 'h100'"),
        ("tee=abacus", UsageError, "unknown tee 'abacus'"),
        ("model=llama-3-7b", UsageError, "unknown model 'llama-3-7b', did you mean"),
        ("gpus=h100", UsageError, "unknown key 'gpus', did you mean 'gpu'"),
        ("gpu=", UsageError, "'gpu' has no value"),
        ("gpu=h100,gpu=h200", UsageError, "given twice"),
        ("gpu=0tflops", UsageError, "above 0"),
        ("servers=0", UsageError, "from 1 to"),
        ("rtt=5parsecs", LinkSpecError, "rtt"),
        ("bandwidth=1bit", LinkSpecError, "at least 1kbit"),
    ],
)
def test_worlds_that_can_not_be(spec: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        assumptions.parse(spec, DEFAULTS)


# Against measurements


def measured(tmp_path: Path, factor: float = 1.0, link: str = "", **changes: Any) -> Path:
    """A ladder of three rungs that took ``factor`` times what is predicted."""
    model = CostModel(SHAPE, profile().rates)
    entries = []
    for plan, wire in (("local", None), ("fused", "fp16"), ("attention", "fp32")):
        settings = Settings(plan, wire or "fp32", "pipelined", 128)
        entries.append({
            "label": plan,
            "case": {"kind": "teegpu", "prefill_plan": plan, "decode_plan": plan, "wire_dtype": wire,
                     "transport": "pipelined"},
            "chunk_tokens": 128,
            "prefill": {"seconds": {"median": factor * model.prefill(settings, 256).seconds}},
            "decode": {"seconds": {"median": 4 * factor * model.decode(settings, 258).seconds}, "steps": 4},
            "samples": [],
        })  # fmt: skip
    entries.append({"label": "no cache", "case": {"kind": "teegpu", "kv_cache": False}})
    made = {
        "schema": "teegpu.bench/1", "benchmark": "ladder", "model": {"name": "smollm2-135m", "digest": "d" * 64},
        "settings": {"prompt_tokens": 256, "link": link, "endpoint": "tcp://10.0.0.1:5555"}, "results": entries,
    }  # fmt: skip
    path = tmp_path / f"ladder{factor}{link[:3]}.json"
    path.write_text(json.dumps(made | changes))
    return path


def test_predictions_are_held_against_what_was_measured(tmp_path: Path) -> None:
    profiles.write(profile())
    made = against([measured(tmp_path), measured(tmp_path, 1.25)], (0.0, 0.0))
    errors = sorted(each["error_share"] for each in made["results"])
    assert errors == [pytest.approx(-0.2)] * 6 + [pytest.approx(0.0)] * 6
    assert made["median_error"] == pytest.approx(0.1)
    # Where the best is not taken, it is within what counts as equal.
    assert [each["ratio"] for each in made["verdicts"]] == [pytest.approx(1.0, abs=0.03)] * 4
    assert "not predicted: no cache" in made["notes"]
    text = tunetables.render(made, "table")
    assert "median error 10% of 12 predictions: within the goal of 20%" in text
    assert "in 4 of 4" in text


def test_a_profile_without_the_link_has_it_put_in(tmp_path: Path) -> None:
    profiles.write(profile())
    (first, *_) = against([measured(tmp_path, link="rtt=20ms,bandwidth=200mbit")], (0.0, 0.0))["results"][2:]
    assert first["predicted_seconds"] > 5 * first["measured_seconds"]


def test_the_packed_codec_is_added_where_a_rung_has_it(tmp_path: Path) -> None:
    profiles.write(profile())
    path = measured(tmp_path)
    document = json.loads(path.read_text())
    document["results"][1]["case"]["codec"] = "packed"
    path.write_text(json.dumps(document))
    plain, packed = (against([path], costs)["results"] for costs in ((0.0, 0.0), (1e-3, 0.0)))
    calls = 2 * 61 - 1  # two chunks, the first without the last layer's end
    assert packed[2]["predicted_seconds"] - plain[2]["predicted_seconds"] == pytest.approx(1e-3 * calls, rel=0.03)
    assert packed[0] == plain[0]
    each, byte = packed_costs()
    assert 0.0 <= each < 1e-2
    assert 0.0 < byte < 1e-7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benchmark": "curve"}, "no document of"),
        ({"schema": "x"}, "no document of"),
        ({"results": [{"case": {"kind": "teegpu"}}]}, "damaged"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    profiles.write(profile())
    with pytest.raises(UsageError, match=message):
        against([measured(tmp_path, **change)], (0.0, 0.0))


def test_a_profile_that_is_not_there_or_foreign(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'teegpu tune --model smollm2-135m --endpoint tcp://10\.0\.0\.1:5555'"):
        against([measured(tmp_path)], (0.0, 0.0))
    profiles.write(profile(machine={"cpu": "Z80", "cores": 1}))
    with pytest.raises(ConfigError, match=r"another machine \(Z80, 1 cores\): 'teegpu tune"):
        against([measured(tmp_path)], (0.0, 0.0))
    with pytest.raises(UsageError, match="can't be read"):
        against([tmp_path / "none.json"], (0.0, 0.0))

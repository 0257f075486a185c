"""Prices read off passes: the counts are those of the decoder, and known costs are found again."""

from __future__ import annotations

import pytest
import torch

from teegpu.metrics import demand
from teegpu.metrics.events import OTHER, TEE, Lap
from teegpu.metrics.recorder import Recorder
from teegpu.metrics.traffic import Want
from teegpu.tee.calibrate import Calibration, Observed, Step, shape_of
from teegpu.tee.decoder import Pass
from teegpu.tee.gpu_client import GpuClient
from teegpu.tee.kv_cache import KVCache
from teegpu.tee.products import drive
from teegpu.wire.limits import Limits
from tests.conftest import TinyModel
from tests.teegpu.tee.conftest import Harness, MakeHarness


def calibration(made: Harness, layers: int = 3) -> Calibration:
    def open_client(wire: str, recorder: Recorder) -> GpuClient:
        return GpuClient(made.client, made.spec, wire_dtype=wire, recorder=recorder, limits=Limits())

    return Calibration(made.spec, made.weights, made.rotary, open_client, layers=layers)


@pytest.mark.parametrize("plan", ["local", "per-op", "batched", "attention", "fused"])
@pytest.mark.parametrize("wire", ["fp32", "fp16"])
@pytest.mark.parametrize("want", ["none", "last"])
def test_operations_are_counted_as_the_decoder_does_them(
    harness: MakeHarness, tiny_model: TinyModel, plan: str, wire: str, want: Want
) -> None:
    made = harness(tiny_model("llama", num_hidden_layers=3), wire_dtype=wire)
    laps: list[Lap] = []
    made.recorder._sinks = (lambda events: laps.extend(event for event in events if isinstance(event, Lap)),)
    decoder, cache = made.decoder(plan), KVCache(made.spec, 16)
    made.rotary.prepare(5)
    made.recorder.begin("decode")
    with torch.inference_mode():
        drive(decoder.forward(Pass(torch.arange(5), 0, cache, want)))
    made.recorder.end(5, 1)
    done: dict[str, int] = {}
    for lap in laps:
        if lap.part == TEE and lap.op != "OTHER":
            done[f"tee/{lap.op}"] = done.get(f"tee/{lap.op}", 0) + 1
    asked = demand.forward(shape_of(made.spec), plan, wire, tokens=5, start=0, want=want)
    counted = {place: int(units[0]) for place, units in asked.items() if place.startswith("tee/") and units[0]}
    counted.pop("tee/OTHER")
    counted.pop("tee/SAMPLING", None)  # the session's
    if plan == "local":
        done["tee/LINEAR"] = done.get("tee/LINEAR", 0) + done.pop("tee/LM_HEAD", 0)
    if plan != "fused" and plan != "local" and wire == "fp16":
        # Rows that crowd fp16's range would be scaled twice; here none does.
        assert done["tee/SCALE"] >= counted["tee/SCALE"]
        done["tee/SCALE"] = counted["tee/SCALE"]
    assert done == counted
    assert any(lap.part == OTHER for lap in laps)


def test_a_calibration_prices_what_the_plans_need(harness: MakeHarness, tiny_model: TinyModel) -> None:
    made = harness(tiny_model("llama", num_hidden_layers=4))
    found = calibration(made)
    steps = [Step(plan, wire, tokens, start, 2)
             for plan in ("fused", "attention", "batched", "local") for wire in ("fp32", "int8")
             for tokens, start in ((1, 8), (16, 0))]  # fmt: skip
    assert found.run(steps) == len(steps) * 3
    prices = found.observed.prices()
    assert {"tee/LINEAR", "tee/ATTENTION", "tee/SOFTMAX", "tee/RMSNORM"} <= prices.keys()
    assert {"server/LINEAR", "server/MATMUL", "server/SUM"} <= prices.keys()
    assert {"runner/encode.fp32", "runner/decode.int8", "server/encode.fp32", "server/decode.int8"} <= prices.keys()
    assert all(min(price) >= 0.0 and max(price) > 0.0 for place, price in prices.items() if place != "tee/OTHER")
    link = found.observed.link()
    assert 0.0 <= link.rtt_seconds < 0.1
    up, down = found.tensors(list(range(8)))
    assert [tuple(each.shape) for each in up] == [(8, 32), (8, 32), (8, 64), (8, 32)]
    assert [tuple(each.shape) for each in down][:3] == [(8, 32), (8, 64), (8, 64)]


def test_layers_of_several_servers(harness: MakeHarness, tiny_model: TinyModel) -> None:
    made = harness(tiny_model("llama", num_hidden_layers=3), groups=((0, 0), (1, 2)))

    def open_client(wire: str, recorder: Recorder) -> GpuClient:
        return GpuClient(made.client, made.spec, wire_dtype=wire, recorder=recorder, limits=Limits())

    found = Calibration(made.spec, made.weights, made.rotary, open_client, layers=2, borders=(1,))
    assert found.run([Step("fused", "fp16", 2, 0, 1), Step("attention", "fp32", 2, 0, 1)]) == 4
    assert len(found.tensors([1, 2, 3])[0]) == 5  # n, then a and x, then h and z


def test_past_its_time_only_what_is_new_is_measured(harness: MakeHarness, tiny_model: TinyModel) -> None:
    found = calibration(harness(tiny_model("llama")))
    assert found.run([Step("fused", "fp32", 1, 0, 5), Step("fused", "fp32", 4, 0, 5)], until=0.0) == 4


def test_known_prices_are_found_again() -> None:
    observed = Observed()
    for requests, tensors, values in ((1, 1, 100), (1, 2, 100), (1, 3, 50_000), (1, 1, 400_000)):
        seconds = 1e-4 * requests + 2e-5 * tensors + 3e-10 * values
        for late in (0.0, 0.0, 5e-3):  # a median does not see one that was late
            observed.add("runner/encode.fp16", (requests, tensors, values), seconds + late)
    assert observed.prices()["runner/encode.fp16"] == (
        pytest.approx(1e-4),
        pytest.approx(2e-5),
        pytest.approx(3e-10),
    )


def test_the_link_is_what_requests_took_longer() -> None:
    observed = Observed()
    for up, down in ((1000, 2000), (500_000, 1000), (1000, 700_000), (300_000, 300_000)):
        for extra in (0.0, 0.001, 0.001):
            observed.network.append((up, down, 0.005 + up / 1e8 + down / 2e8 + extra))
    link = observed.link()
    assert link.rtt_seconds + link.overhead_seconds == pytest.approx(0.006, rel=0.02)
    assert link.up_bytes_per_second == pytest.approx(1e8, rel=0.02)
    assert link.down_bytes_per_second == pytest.approx(2e8, rel=0.02)
    with pytest.raises(ValueError, match="no request"):
        Observed().link()


def test_what_two_have_seen_counts_together() -> None:
    observed, other = Observed(), Observed()
    observed.add("tee/LINEAR", (1, 0, 0), 1.0)
    for seconds in (3.0, 2.0):
        other.add("tee/LINEAR", (1, 0, 0), seconds)
    other.add("tee/SILU", (1, 0, 0), 0.5)
    other.network.append((10, 20, 0.1))
    observed.merge(other)

    assert observed.prices() == {"tee/LINEAR": (2.0, 0.0, 0.0), "tee/SILU": (0.5, 0.0, 0.0)}
    assert observed.network == [(10, 20, 0.1)]

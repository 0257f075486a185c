"""The accounting: which cases there are, and that parts which do not add up would be seen."""

from __future__ import annotations

import pytest

from teegpu.bench import render
from teegpu.bench.accounting import LINKED_TRANSPORTS, AccountingBenchmark, PhaseWalls, accounted, cases
from teegpu.bench.cases import from_values
from teegpu.errors import PromptError, UsageError
from teegpu.metrics import events as ev
from teegpu.metrics.summary import LayerTotal, PhaseTotal
from teegpu.settings import PLANS
from tests.conftest import TinyModel


def test_every_plan_over_every_transport() -> None:
    made = cases(PLANS, LINKED_TRANSPORTS, 1024, 128)
    assert len(made) == len({case.label for case in made}) == 1 + 4 * (4 + 2)
    assert "fused pipelined, 8 chunks" in [case.label for case in made]
    assert [case.label for case in cases(["fused", "local"], ["pipelined"], 16, 16)] == ["local", "fused pipelined"]


def test_parts_that_do_not_add_up_are_seen() -> None:
    total = PhaseTotal(seconds=1.0, tee_seconds=0.5, wait_seconds=0.25, network_seconds=0.125, gpu_seconds=0.125)
    total.layers[0] = LayerTotal(tee_seconds=0.5)
    total.outside.network_seconds = 0.125
    found = accounted(total, 1.0)
    assert found["sum_over_wall"] == 0.75
    assert found["layers_over_wall"] == 0.625
    assert accounted(PhaseTotal(), 0.0)["sum_over_wall"] is None


def test_walls_are_those_of_the_phases() -> None:
    walls = PhaseWalls()
    walls([ev.PhaseBegan(10**9, ev.PREFILL), ev.PhaseEnded(3 * 10**9, ev.PREFILL, 1, 1)])
    walls([ev.PhaseBegan(5 * 10**9, ev.PREFILL), ev.Lap(0, 10**12, ev.TEE, "SILU", 0, 0, 0)])
    walls([ev.PhaseEnded(6 * 10**9, ev.PREFILL, 1, 1)])
    assert walls.seconds == {ev.PREFILL: 3.0}


def test_a_plan_without_a_server(tiny_model: TinyModel) -> None:
    bench = AccountingBenchmark(
        tiny_model("llama"),
        from_values({"run.threads": 1}),
        prompt_tokens=16,
        decode_tokens=2,
        chunk_tokens=8,
        plans=["local"],
    )
    assert bench.document("interrupted")["results"] == []
    outcomes: list[str] = []
    bench.run(lambda step: outcomes.append(step.outcome))
    assert bench.failures == []
    assert outcomes[-1].startswith("sum ")
    document = bench.document("complete")
    (entry,) = document["results"]
    assert entry["prefill"]["sum_over_wall"] == pytest.approx(1, abs=0.01)
    assert entry["prefill"]["requests"] == 0
    for form in render.FORMATS:
        assert "local" in render.render(document, form)


def test_what_can_not_be_measured(tiny_model: TinyModel) -> None:
    folder, base = tiny_model("llama"), from_values({})
    numbers = {"prompt_tokens": 8, "decode_tokens": 2, "chunk_tokens": 4}
    with pytest.raises(UsageError, match="--chunk-tokens 0 is below the least, 1"):
        AccountingBenchmark(folder, base, **numbers | {"chunk_tokens": 0})
    with pytest.raises(UsageError, match="--plan fusd is not one of local, per-op, batched, attention, fused"):
        AccountingBenchmark(folder, base, **numbers, plans=["fusd"])
    with pytest.raises(UsageError, match="--transport inprocess is not one of zmq"):
        AccountingBenchmark(folder, base, **numbers, transports=["inprocess"])
    with pytest.raises(PromptError, match="which ends at 256: give less"):
        AccountingBenchmark(folder, base, **numbers | {"prompt_tokens": 255})

"""The monitor's memory over a long run: how its record is made, and what is concluded from what was read."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest

from teegpu.bench import render
from teegpu.bench.cases import from_values
from teegpu.bench.longrecord import LongRun
from teegpu.bench.replay import FLAT_BYTES, PARTS, Reading, ReplayBenchmark
from teegpu.errors import TeegpuError, UsageError
from teegpu.metrics import events as ev
from teegpu.metrics.summary import Summary
from teegpu.model.folder import ModelFolder
from teegpu.options import MIB
from tests.conftest import TinyModel

MS = 1_000_000
HOUR = {"hours": 1.0, "tokens": 1000, "speed": 0.0}


@pytest.fixture
def model(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama")


def a_pass(at: int, request: int) -> list[ev.Event]:
    """10 ms from ``at`` on: 4 of attention, a request of 6 that ends the pass."""
    rpc = ev.Rpc(request, "z", 0, 0, (at + 4) * MS, (at + 10) * MS, 10, 20, 10, 20, 0.0, 0.0, 0.0, 0.002, 0.0,
                 {"LINEAR": (2, 0.002)})  # fmt: skip
    return [
        ev.Lap(at * MS, (at + 4) * MS, ev.TEE, "ATTENTION", 0, 0, 0),
        rpc,
        ev.Lap((at + 4) * MS, (at + 10) * MS, ev.WAIT, "WAIT", 0, 0, request),
        ev.TokensMade((at + 10) * MS, 1),
    ]


SHORT: list[ev.Event] = [
    ev.PhaseBegan(0, ev.PREFILL, 5, 1),
    ev.Lap(0, 50 * MS, ev.TEE, "EMBEDDING", -1, 0, 0),
    ev.TokensMade(50 * MS, 1),
    ev.PhaseEnded(50 * MS, ev.PREFILL, 5, 1),
    ev.PhaseBegan(50 * MS, ev.DECODE, 4, 1),
    *a_pass(50, 7),
    *a_pass(60, 8),
    *a_pass(70, 9),
    ev.PhaseEnded(80 * MS, ev.DECODE, 3, 3),
]


def test_passes_are_repeated_and_stretched_until_there_are_enough() -> None:
    long = LongRun.of(SHORT)
    assert (long.passes_tokens, long.passes_ns, long.requests) == (2, 20 * MS, 2)
    events = [event for part in long.events(tokens=10, seconds=5.0) for event in part]
    laps = [event for event in events if isinstance(event, ev.Lap)]
    assert all(before.end_ns == after.start_ns for before, after in pairwise(laps)), "no gap, no overlap"
    requests = [event.request_id for event in events if isinstance(event, ev.Rpc)]
    assert requests == [7, *range(8, 18)]
    assert {event.request_id for event in laps if event.part == ev.WAIT} == set(requests)
    summary = Summary()
    summary.add(events)
    decode = summary.phases[ev.DECODE]
    assert (decode.tokens, decode.passes, decode.rpc_calls) == (11, 11, 11)
    assert decode.seconds == pytest.approx(5.0 + 0.01)
    assert decode.gpu_seconds == pytest.approx(0.2 * 5.0 + 0.002)
    assert decode.tee_seconds == pytest.approx(0.4 * 5.0 + 0.004)
    assert events[4] == ev.PhaseBegan(50 * MS, ev.DECODE, 10, 1)


def test_a_run_that_is_too_short_is_told() -> None:
    with pytest.raises(TeegpuError, match="fewer than two decode passes"):
        LongRun.of(SHORT[:9])


def readings(most: list[float]) -> list[Reading]:
    """One in the middle of each part, of so many MiB."""
    found = [Reading(number, (2 * number + 1) * 50, int(mib * MIB)) for number, mib in enumerate(most)]
    return [*found, Reading(PARTS, PARTS * 100, int(most[-1] * MIB))]


def test_growth_is_what_comes_after_the_first_part(model: ModelFolder) -> None:
    bench = ReplayBenchmark(model, from_values({}), **HOUR)  # type: ignore[arg-type]
    assert bench.document("interrupted")["results"] == []
    bench._readings = readings([60, 61, 64, 62, 62, 62, 62, 62, 62, 63])
    bench._at_end_bytes = 63 * MIB
    document = bench.document("complete")
    assert [entry["grown_bytes"] for entry in document["results"][:3]] == [None, 1 * MIB, 4 * MIB]
    assert bench.breaches == []
    bench._readings = readings([60, 61, 64, 66, 68, 70, 72, 74, 76, 78])
    (told,) = bench.breaches
    assert told == "the monitor's memory grew by 18.0 MiB after the first tenth of the replay"
    assert told in bench.document("complete")["notes"]
    assert FLAT_BYTES == 8 * MIB


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"hours": 0.0}, "--hours 0 is not above 0"), ({"tokens": 79}, "--tokens 79 is below the least, 80"),
     ({"speed": -1.0}, "--speed -1 is not from 0")],
)  # fmt: skip
def test_what_can_not_be_measured(model: ModelFolder, changed: dict[str, float], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        ReplayBenchmark(model, from_values({}), **(HOUR | changed))  # type: ignore[arg-type]


@pytest.mark.extra
def test_a_tiny_model_s_long_run(model: ModelFolder, tmp_path: Path) -> None:
    """The real monitor over 20,000 tokens of a model of two layers, as quickly as it can."""
    base = from_values({"record.dir": str(tmp_path / "runs"), "run.threads": 1, "server.threads": 1})
    bench = ReplayBenchmark(model, base, hours=0.5, tokens=20_000, speed=0)
    bench.run()
    assert os.listdir(tmp_path / "runs") == [], "its records are gone"
    document = bench.document("complete")
    assert document["record"]["events"] > 20_000 * 20
    assert len(document["results"]) > 2
    assert bench.breaches == []
    for form in render.FORMATS:
        assert render.render(document, form)

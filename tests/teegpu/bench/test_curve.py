"""What keys cost: the real thing with few rounds, and what its document says."""

from __future__ import annotations

import json

import pytest

from teegpu.bench.cases import from_values, parse
from teegpu.bench.curve import CurveBenchmark
from teegpu.bench.measure import Progress
from teegpu.bench.render import FORMATS, render
from teegpu.errors import UsageError


@pytest.fixture(scope="module")
def measured() -> CurveBenchmark:
    benchmark = CurveBenchmark(from_values({"run.link": "rtt=1ms"}), rounds=2, sizes=(1000, 100_000))
    steps: list[Progress] = []
    benchmark.run(steps.append)
    assert [step.done for step in steps] == [0, 1, 2]
    return benchmark


def test_each_size_is_measured_with_keys_and_without(measured: CurveBenchmark) -> None:
    document = json.loads(render(measured.document("complete"), "json"))
    assert [(entry["bytes"], entry["encrypted"]) for entry in document["results"]] == [
        (1000, False), (1000, True), (100_000, False), (100_000, True),
    ]  # fmt: skip
    for entry in document["results"]:
        trips, batches = entry["samples"]["round_trip_seconds"], entry["samples"]["batch_seconds"]
        assert len(trips) == len(batches) == 2
        assert min(trips) == entry["round_trip"]["min"] > 0.0005  # most of the link's own delay
        moved = entry["bytes"] * entry["requests_in_flight"]
        assert entry["bytes_per_second"]["max"] == pytest.approx(moved / min(batches))


def test_the_cost_is_the_difference_to_the_same_without(measured: CurveBenchmark) -> None:
    plain, keys = measured.document("complete")["results"][2:]
    assert "cost" not in plain
    assert keys["cost"]["round_trip_seconds"] == pytest.approx(
        keys["round_trip"]["median"] - plain["round_trip"]["median"]
    )
    assert keys["cost"]["throughput_ratio"] > 0


@pytest.mark.parametrize("form", FORMATS)
def test_it_is_shown_in_every_format(measured: CurveBenchmark, form: str) -> None:
    document = measured.document("complete")
    assert document["model"] is None
    assert "keys" in render(document, form) or form == "csv"


def test_what_can_not_be_measured() -> None:
    with pytest.raises(UsageError, match="--rounds 0 is below"):
        CurveBenchmark(from_values({}), rounds=0)
    for size in (0, 10**9):
        with pytest.raises(UsageError, match=f"--size {size} is not between"):
            CurveBenchmark(from_values({}), rounds=1, sizes=(size,))


def test_a_case_may_have_an_endpoint_and_its_key() -> None:
    """How a server with keys and one without are measured in turn."""
    base = from_values({"link.client_key": "me"})
    case = parse("fused,endpoint=tcp://127.0.0.1:1#key=gpu,wire=fp32", base)
    assert case.config(base, 1).run.endpoints == ("tcp://127.0.0.1:1#key=gpu",)
    assert case.config(base, 1).link.client_key == "me"
    assert "endpoint tcp://127.0.0.1:1#key=gpu" in case.label
    with pytest.raises(UsageError, match="'dtype' is for servers that the benchmark starts itself"):
        parse("fused,endpoint=tcp://127.0.0.1:1,dtype=fp32", base)

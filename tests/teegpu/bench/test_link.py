"""``bench link``: an embedded server behind an emulated link, and what can't be measured."""

from __future__ import annotations

import json

import pytest

from teegpu.bench.cases import from_values
from teegpu.bench.link import LinkBenchmark
from teegpu.bench.linkprobe import Crossing
from teegpu.bench.measure import Progress
from teegpu.bench.render import FORMATS, render
from teegpu.errors import UsageError
from teegpu.model.folder import ModelFolder
from tests.conftest import TinyModel
from transports.netem.spec import LinkSpec


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> ModelFolder:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def measured(model: ModelFolder) -> LinkBenchmark:
    base = from_values({"run.link": "rtt=10ms,up=50mbit,down=100mbit"})
    benchmark = LinkBenchmark(base, model, rounds=10, transfers=2, seconds=30)
    steps: list[Progress] = []
    benchmark.run(steps.append)
    assert steps[0].stage == "connecting"
    assert [step.stage for step in steps if step.outcome] == ["10 of 10", "2 of 2"]
    assert steps[-1].done == steps[-1].total == 14
    return benchmark


def test_the_link_is_found(measured: LinkBenchmark) -> None:
    """Never better than it is; what is late only makes a link look worse."""
    document = json.loads(render(measured.document("complete"), "json"))
    trip, up, down = document["results"]
    assert trip["rtt_seconds"]["min"] > 0.0099
    assert 0 < up["bytes_per_second"]["max"] * 8 < 55e6
    assert 0 < down["bytes_per_second"]["max"] * 8 < 110e6
    assert len(trip["samples"]["network_seconds"]) == 10
    assert len(up["samples"]["network_seconds"]) == len(down["samples"]["server_seconds"]) == 2
    found, spec = document["measured_link"], LinkSpec.parse(document["measured_link"]["spec"])
    assert spec.rtt_seconds == pytest.approx(found["rtt_seconds"])
    assert spec.up_bytes_per_second == pytest.approx(found["bandwidth_up_bytes_per_second"])
    assert spec.down_bytes_per_second == pytest.approx(found["bandwidth_down_bytes_per_second"])
    assert document["server"]["digest"] == document["model"]["digest"]
    assert document["settings"]["encrypted"] is False


@pytest.mark.alone
def test_the_link_is_found_as_quick_as_it_is(measured: LinkBenchmark) -> None:
    trip, up, down = measured.document("complete")["results"]
    assert trip["rtt_seconds"]["min"] < 0.05
    assert up["bytes_per_second"]["max"] * 8 > 30e6
    assert down["bytes_per_second"]["max"] * 8 > 60e6


@pytest.mark.parametrize("form", FORMATS)
def test_it_is_shown_in_every_format(measured: LinkBenchmark, form: str) -> None:
    document = measured.document("complete")
    text = render(document, form)
    assert document["measured_link"]["spec"] in text or form == "csv"
    assert "round trip" in text or form == "csv"


def test_nothing_measured_is_an_empty_document(model: ModelFolder) -> None:
    document = LinkBenchmark(from_values({}), model, rounds=1, transfers=1, seconds=1).document("interrupted")
    assert document["results"] == []
    assert document["measured_link"] is None


def test_what_was_measured_before_an_interrupt_is_told(model: ModelFolder) -> None:
    benchmark = LinkBenchmark(from_values({}), model, rounds=9, transfers=1, seconds=1)
    benchmark._samples.small += [Crossing(100, 100, seconds, 0.001) for seconds in (0.002, 0.004, 0.009)]
    document = benchmark.document("interrupted")
    (trip,) = document["results"]
    assert trip["rtt_seconds"] == {"median": 0.004, "p95": pytest.approx(0.0085), "min": 0.002}
    assert document["measured_link"] is None
    assert "interrupted" in render(document, "table")


@pytest.mark.parametrize(
    ("given", "told"),
    [({"rounds": 0}, "--rounds 0 is below"), ({"transfers": 0}, "--transfers 0 is below"),
     ({"seconds": 0.0}, "--seconds 0 is not above 0"), ({"seconds": float("nan")}, "--seconds nan is not above 0")],
)  # fmt: skip
def test_what_can_not_be_measured(model: ModelFolder, given: dict[str, float], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        LinkBenchmark(from_values({}), model, **({"rounds": 1, "transfers": 1, "seconds": 1.0} | given))  # type: ignore[arg-type]


def test_a_link_leads_to_one_server(model: ModelFolder) -> None:
    base = from_values({"run.endpoints": ("tcp://127.0.0.1:1", "tcp://127.0.0.1:2")})
    with pytest.raises(UsageError, match="names 2 servers"):
        LinkBenchmark(base, model, rounds=1, transfers=1, seconds=1)

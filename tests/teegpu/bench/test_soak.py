"""The soak: its figures, and one of a second on a tiny model with a real server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from teegpu.bench import render, soak
from teegpu.bench.cases import from_values
from teegpu.bench.soak import SoakBenchmark, growth, unfairness
from teegpu.bench.soakclient import GREEDY, STEADY, SoakClient, Tally
from teegpu.bench.soakserver import ServedModel
from teegpu.errors import TeegpuError, UsageError
from teegpu.model.folder import ModelFolder
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Result, ServerTimes
from tests.conftest import TinyModel


def test_growth_is_taken_after_the_warm_up() -> None:
    assert growth([1, 50, 100, 100, 100, 100, 100, 100, 110, 110]) == pytest.approx(0.1)
    assert growth([100] * 9) is None
    assert growth([200, 200, *[100] * 8]) == pytest.approx(0.0)


def test_unfairness() -> None:
    assert unfairness([10.0, 20.0, 15.0]) == 2.0
    assert unfairness([0.0, 1.0]) == float("inf")
    assert unfairness([1.0]) is None


def test_a_tally_keeps_a_bounded_number_of_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teegpu.bench.soakclient._KEPT", 10)
    tally = Tally()
    for number in range(25):
        tally.add(Result(1, {}, {}, ServerTimes(queue_seconds=float(number), compute_seconds=2.0)))
    assert len(tally.queue_seconds) == 10
    figures = tally.to_json(5.0)
    assert (figures["programs"], figures["programs_per_second"], figures["server_seconds"]) == (25, 5.0, 50.0)
    assert figures["queue_seconds"]["p95"] > 15.0


@pytest.fixture
def bench(tiny_model: TinyModel) -> Callable[..., SoakBenchmark]:
    def make(clients: int = 4, seconds: float = 1.0, greedy: int = 1, **settings: object) -> SoakBenchmark:
        values = {"server.dtype": "fp32", "server.threads": 1, "server.device": "cpu", **settings}
        return SoakBenchmark(tiny_model("llama"), from_values(values), clients=clients, seconds=seconds, greedy=greedy)

    return make


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"clients": 0, "greedy": 0}, "--clients 0 is below the least, 1"),
        ({"greedy": 5}, "--greedy 5 is not between 0 and the 4 clients"),
        ({"seconds": 0.0}, "--minutes 0 is not above 0"),
        ({"clients": 300}, "--clients 300 is more than limits.clients allows, 256"),
    ],
)
def test_what_can_not_be(bench: Callable[..., SoakBenchmark], given: dict[str, float], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        bench(**given)


def test_a_second_of_it(bench: Callable[..., SoakBenchmark], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "_STEADY_SECONDS", 0.1)
    run = bench(**{"limits.client_requests": 8})
    steps: list[str] = []
    run.run(lambda step: steps.append(step.outcome))
    document = run.document("complete")
    assert json.loads(json.dumps(document))["benchmark"] == "soak"
    assert run.failures == []
    results = document["results"]
    assert [entry["kind"] for entry in results] == [GREEDY, STEADY, STEADY, STEADY]
    assert all(entry["programs"] > 0 and entry["server_seconds"] > 0 for entry in results)
    assert results[0]["refusals"] > 0, "the greedy one asks for more than it may"
    assert [entry["refusals"] for entry in results[1:]] == [0, 0, 0]
    server = document["server"]
    assert server["exit_code"] == 0
    assert server["descriptors"]["after"] == server["descriptors"]["before"]
    assert len(server["rss_bytes"]) == 120
    assert min(server["rss_bytes"]) > 2**20
    assert server["log_lines"]["ready"] == server["log_lines"]["end"] == 1
    assert len([step for step in steps if "programs, server" in step]) == 20
    table = render.render(document, "table")
    assert "steady client 2" in table
    assert "fairness among steady clients" in table


def test_bounds_that_do_not_hold_are_named(bench: Callable[..., SoakBenchmark]) -> None:
    run = bench(greedy=0)
    assert run.breaches == []
    run._rss = [100] * 8 + [120] * 4
    run._descriptors = {"before": 10, "after": 13}
    run._exit_code = -9
    for programs in (10, 25):
        client = SoakClient(STEADY, programs, "", [], Limits(), threading.Event(), at_once=1)
        client.tally.programs = programs
        run._clients.append(client)
    grew, unfair, left, ended = run.breaches
    assert grew == "the server's memory grew by 20.0%, over the bound of 5%"
    assert unfair == "a steady client got on 2.50 times as fast as another, over 2"
    assert left == "3 descriptors of the server were still open when all clients had left"
    assert ended == "the server ended with exit code -9, told to end by SIGTERM"
    assert run.document("complete")["breaches"] == run.breaches


def test_a_server_that_can_not_start_says_why(tmp_path: Path) -> None:
    folder = ModelFolder("none", tmp_path)
    with ServedModel(folder, from_values({}), threads=1) as server, pytest.raises(TeegpuError, match=r"config\.json"):
        server.wait()

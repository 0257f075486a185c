"""What a run's requests tell about the link, from runs whose link is known."""

from __future__ import annotations

import pytest

from teegpu import config
from teegpu.record import events as ev
from teegpu.remote.embedded import EmbeddedServer
from teegpu.runner import Runner
from teegpu.stats import linkestimate
from teegpu.stats.linkestimate import LinkEstimator, LinkFigures, figures
from teegpu.stats.summary import Summary
from teegpu.tee.sampling import Sampler, SamplingOptions
from teegpu.tee.sequence import Generation
from tests.conftest import TinyModel
from tests.teegpu.stats.simulated import SMOLLM2, Speeds, simulate
from transports.netem.link import EmulatedLink, LinkSpec

GIGABIT = 125e6


def measured(speeds: Speeds, **run: object) -> LinkFigures:
    summary = Summary()
    summary.add(simulate(speeds=speeds, **run))  # type: ignore[arg-type]
    return summary.link.measured()


@pytest.mark.parametrize("late", [0.0, 3e-4])
@pytest.mark.parametrize(
    ("rtt", "up", "down"), [(0.005, GIGABIT, GIGABIT), (0.02, 25e6, 25e6), (0.01, 12.5e6, GIGABIT), (2e-4, 1e9, 1e9)]
)
def test_requests_one_after_the_other_tell_both_directions(rtt: float, up: float, down: float, late: float) -> None:
    speeds = Speeds(rtt=rtt, up=up, down=down, late=late)
    found = measured(speeds, transport="zmq", chunk_tokens=2048, prompt=600, made=3)
    assert found.source == "measured"
    assert found.rtt_seconds == pytest.approx(rtt, abs=1e-5 + late)
    # 0.3 ms late is nothing beside 20 ms, and much beside the 2 ms that a request takes at 1 GB/s
    error = 0.05 if up < 1e9 or not late else 0.35
    assert found.bandwidth_up_bytes_per_second == pytest.approx(up, rel=error)
    assert found.bandwidth_down_bytes_per_second == pytest.approx(down, rel=error)


def test_a_single_request_that_was_held_up_is_not_believed() -> None:
    estimator, held_up = LinkEstimator(), 0
    for event in simulate(speeds=Speeds(late=1e-4), transport="zmq", chunk_tokens=2048, prompt=300, made=3):
        if isinstance(event, ev.Rpc):
            late = 0.07 if event.bytes_up > 200_000 and not held_up else 0.0
            held_up += late > 0
            claimed = event.queue_seconds + event.decode_seconds + event.compute_seconds + event.encode_seconds
            estimator.add(event, (event.received_ns - event.sent_ns) / 1e9 - claimed + late)
    found = estimator.measured()
    assert held_up == 1
    assert found.bandwidth_up_bytes_per_second == pytest.approx(GIGABIT, rel=0.05)
    assert found.bandwidth_down_bytes_per_second == pytest.approx(GIGABIT, rel=0.05)


@pytest.mark.parametrize("late", [0.0, 3e-4])
@pytest.mark.parametrize("made", [0, 4])
def test_overlapped_requests_tell_the_direction_that_was_full(made: int, late: float) -> None:
    speeds = Speeds(rtt=0.005, up=GIGABIT, down=GIGABIT, late=late)
    found = measured(speeds, shape=SMOLLM2, prompt=512, chunk_tokens=64, made=made)
    assert found.bandwidth_down_bytes_per_second == pytest.approx(GIGABIT, rel=0.05)
    assert found.rtt_seconds == pytest.approx(0.005, abs=5e-4 + late)
    # the other one is not full: a lower bound
    assert 0.5 * GIGABIT <= (found.bandwidth_up_bytes_per_second or 0) <= 1.05 * GIGABIT


def test_a_link_that_waits_for_the_server_is_not_taken_for_a_slow_one() -> None:
    speeds = Speeds(rtt=2e-4, up=1e9, down=1e9, gpu=1e-4)
    found = measured(speeds, shape=SMOLLM2, prompt=512, chunk_tokens=64)
    assert (found.bandwidth_down_bytes_per_second or 0) > 0.5e9


def test_small_requests_tell_the_round_trip_only() -> None:
    found = measured(Speeds(rtt=0.005, up=1e10, down=1e10), prompt=2, made=8)
    assert found.rtt_seconds == pytest.approx(0.005, rel=0.01)
    assert found.bandwidth_up_bytes_per_second is None
    assert found.bandwidth_down_bytes_per_second is None


def test_few_requests_tell_nothing() -> None:
    events = [event for event in simulate(prompt=64) if isinstance(event, ev.Rpc)]
    link = LinkEstimator()
    for number, rpc in enumerate(events[:8]):
        assert link.measured() == LinkFigures(), number
        link.add(rpc, 0.01)
    assert link.measured().source == "measured"


def test_requests_that_were_sent_again_do_not_count() -> None:
    link = LinkEstimator()
    for event in simulate(prompt=64):
        if isinstance(event, ev.Rpc):
            link.add(event._replace(attempts=2), 0.01)
    assert link.measured() == LinkFigures()


def test_asking_changes_nothing() -> None:
    events = simulate(prompt=256, made=3, chunk_tokens=64)
    asked, left = Summary(), Summary()
    left.add(events)
    for event in events:
        asked.add([event])
        asked.link.measured()
    assert asked.link.measured() == left.link.measured()


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linkestimate, "MAX_CLASSES", 20)
    link = LinkEstimator()
    rpc = next(event for event in simulate(prompt=64) if isinstance(event, ev.Rpc))
    for number in range(2000):
        at_ns = number * 10**6
        link.add(rpc._replace(bytes_up=number**2, sent_ns=at_ns, received_ns=at_ns + 10**5), 1e-4)
        link.waited(at_ns + 10**5)
    assert len(link._any) <= 20
    assert len(link._points) < 60
    assert link.measured().source == "measured"


def test_a_given_link_goes_before_what_was_measured() -> None:
    seen = LinkFigures(0.006, 1e8, 2e8, "measured")
    given = {"rtt_seconds": 0.005, "bandwidth_up_bytes_per_second": 1e6, "bandwidth_down_bytes_per_second": None}
    assert figures(given, seen) == LinkFigures(0.005, 1e6, 2e8, "given")
    assert figures(None, seen) == seen
    assert figures({}, LinkFigures()) == LinkFigures()


@pytest.mark.parametrize(
    "nonsense", [{}, {"rtt_seconds": "x", "source": 3}, {"rtt_seconds": -1.0}, {"source": "made up"}]
)
def test_figures_that_are_none_are_not_known(nonsense: dict[str, object]) -> None:
    assert LinkFigures.from_json(nonsense) == LinkFigures()


@pytest.mark.alone
def test_a_real_run_over_an_emulated_link_measures_it(tiny_model: TinyModel) -> None:
    """Frames of some 100 KiB over 10 ms and 100 Mbit/s, in lock step."""
    folder = tiny_model("llama", hidden_size=256, intermediate_size=512, head_dim=64, max_position_embeddings=1024)
    shared = {"server.dtype": "fp32", "run.wire_dtype": "fp32", "run.transport": "zmq", "run.max_tokens": 4}
    shared |= {"run.prefix_cache_mib": 0}
    with (
        EmbeddedServer(folder, config.load(shared), threads=1) as server,
        EmulatedLink(LinkSpec.parse("rtt=10ms,bandwidth=100mbit"), server.wait()["address"]) as link,
    ):
        settings = config.load(shared | {"run.endpoints": (link.endpoint,), "run.threads": 1})
        with Runner(settings, folder) as runner:
            sampler = Sampler(SamplingOptions())
            for length in (300, 400, 300, 400):
                ids = [number % 250 for number in range(length)]
                runner.generate(ids, sampler=sampler, on_token=lambda _: False, result=Generation(), ignore_end=True)
            found = runner.report("complete")["link"]
    assert found["source"] == "measured"
    assert 0.0095 < found["rtt_seconds"] < 0.013
    assert found["bandwidth_up_bytes_per_second"] == pytest.approx(12.5e6, rel=0.15)
    assert found["bandwidth_down_bytes_per_second"] == pytest.approx(12.5e6, rel=0.15)

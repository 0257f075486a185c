"""Predicted times against runs that were simulated event by event, and against figures that were measured."""

from __future__ import annotations

import math
from typing import Any

import pytest

from teegpu.stats import predict, traffic
from teegpu.stats.linkestimate import LinkFigures
from teegpu.stats.predict import Link, Work
from teegpu.stats.traffic import Traffic
from tests.teegpu.stats.simulated import SMALL, SMOLLM2, Speeds, run

MIB = 2**20


def work_of(phase: dict[str, Any]) -> Work:
    busy = phase["busy"]
    return Work(
        phase["tee_seconds"], phase["serialization_seconds"], phase["other_seconds"], busy["gpu_seconds"],
        busy["server_serialization_seconds"],
    )  # fmt: skip


@pytest.mark.parametrize("plan", ["batched", "attention", "fused"])
@pytest.mark.parametrize("wire", ["fp32", "fp16", "int8"])
def test_lock_step_is_the_sum_of_its_parts(plan: str, wire: str) -> None:
    speeds = Speeds(rtt=0.01, up=50e6, down=100e6)
    got = run(plan=plan, wire=wire, transport="zmq", chunk_tokens=128, prompt=300, made=5, speeds=speeds)
    link = Link(0.01, 50e6, 100e6)
    prefill = traffic.prefill(SMALL, plan, wire, tokens=300, chunk_tokens=128, overlaps=False)
    decode = traffic.decode(SMALL, plan, wire, passes=5, start=300, overlaps=False)
    for name, sent in (("prefill", prefill), ("decode", decode)):
        phase = got["phases"][name]
        assert predict.lock_step(sent, link, work_of(phase)).seconds == pytest.approx(phase["seconds"], rel=1e-3)


@pytest.mark.parametrize(
    ("speeds", "bound_by"),
    [
        (Speeds(), "down"),
        (Speeds(up=12.5e6), "up"),
        (Speeds(up=1e10, down=1e10, gpu=5e-5), "server"),
        (Speeds(up=1e10, down=1e10, tee=5e-5), "runner"),
        (Speeds(rtt=0.1, up=1e9, down=1e9), "rounds"),
    ],
)
@pytest.mark.parametrize("chunk", [64, 128])
def test_overlap_is_the_largest_part_and_the_fill(speeds: Speeds, bound_by: str, chunk: int) -> None:
    got = run(shape=SMOLLM2, prompt=512, chunk_tokens=chunk, speeds=speeds)["phases"]["prefill"]
    sent = traffic.prefill(SMOLLM2, "fused", "fp16", tokens=512, chunk_tokens=chunk, overlaps=True)
    link = Link(speeds.rtt, speeds.up, speeds.down)
    made = predict.overlapped(sent, link, work_of(got), got["chunks"])
    assert made.bound_by == bound_by
    # few chunks leave gaps that the formula does not see
    assert made.seconds == pytest.approx(got["seconds"], rel=0.05 if chunk == 64 else 0.1)


def test_overlap_where_all_places_are_equally_busy_is_too_hopeful_by_a_tenth_at_most() -> None:
    speeds = Speeds(rtt=1e-3, up=125e6, down=200e6, tee=1.8e-5, gpu=2.2e-5)
    got = run(shape=SMOLLM2, prompt=1024, chunk_tokens=128, speeds=speeds)["phases"]["prefill"]
    sent = traffic.prefill(SMOLLM2, "fused", "fp16", tokens=1024, chunk_tokens=128, overlaps=True)
    made = predict.overlapped(sent, Link(1e-3, 125e6, 200e6), work_of(got), 8)
    assert 0.9 < made.seconds / got["seconds"] <= 1.01


def test_the_table_in_the_docs() -> None:
    """docs/benchmarks.md, 1 Gbit/s and 5 ms: bytes and calls to the last digit, and the time where the link is it."""
    sent = traffic.prefill(SMOLLM2, "fused", "fp16", tokens=1024, chunk_tokens=128, overlaps=True)
    assert (sent.rpc_calls, sent.rounds) == (474, 61)
    assert sent.bytes_up_with_headers / MIB == pytest.approx(186.1, rel=1e-3)
    assert sent.bytes_down_with_headers / MIB == pytest.approx(295.7, rel=1e-3)
    # computation takes about 1.2 s on either side there (loopback), so that the link decides
    work = Work(tee=0.5, serialization=0.4, gpu=0.8, server_serialization=0.2)
    assert predict.overlapped(sent, Link(0.005, 125e6, 125e6), work, 8).seconds == pytest.approx(2.507, rel=0.01)
    narrow = traffic.prefill(SMOLLM2, "fused", "int8", tokens=1024, chunk_tokens=128, overlaps=True)
    assert narrow.bytes_down_with_headers / MIB == pytest.approx(184.2, rel=1e-3)
    assert predict.overlapped(narrow, Link(0.02, 25e6, 25e6), work, 8).seconds == pytest.approx(7.808, rel=0.01)
    single = traffic.prefill(SMOLLM2, "per-op", "fp32", tokens=1024, chunk_tokens=2048, overlaps=False)
    assert single.rpc_calls == 272
    assert single.bytes_up_with_headers / MIB == pytest.approx(1726.6, rel=1e-3)
    assert single.bytes_down_with_headers / MIB == pytest.approx(1702.8, rel=1e-3)


def test_shared_cores_add_up() -> None:
    sent, link = Traffic(10, 10, 0, 0), Link(0.0, math.inf, math.inf)
    work = Work(tee=1.0, gpu=2.0)
    assert predict.overlapped(sent, link, work, 8).seconds == pytest.approx(2.0, rel=0.05)
    shared = Work(tee=1.0, gpu=2.0, runner_share=1.0, server_share=1.0)
    assert predict.overlapped(sent, link, shared, 8).seconds == pytest.approx(3.0, rel=0.05)


def test_more_requests_cost_both_sides() -> None:
    work = Work(serialization=0.1, server_serialization=0.1).with_rpc_calls(100)
    assert (work.serialization, work.server_serialization) == (pytest.approx(0.11), pytest.approx(0.11))
    assert Work(serialization=0.001).with_rpc_calls(-1000).serialization == 0.0


def test_a_link_without_figures_is_none() -> None:
    assert Link.of(LinkFigures()) is None
    open_ended = Link.of(LinkFigures(0.0, None, 5.0, "given"))
    assert open_ended == Link(0.0, math.inf, 5.0)
    assert open_ended is not None
    assert open_ended.carrying_seconds(10**9, 10) == 2.0

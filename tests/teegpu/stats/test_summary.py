"""Events to numbers: what the parts of a phase are, and that they add up to its wall time."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teegpu.record import events as ev
from teegpu.record.recorder import Recorder
from teegpu.stats import summary as summing
from teegpu.stats.summary import Summary, exposed, server_parts
from teegpu.stats.totals import EndpointTotal, LayerTotal, OpTotal, PhaseTotal

MS = 1_000_000


def rpc(request_id: int = 1, sent_ms: float = 0, received_ms: float = 100, **more: Any) -> ev.Rpc:
    fields: dict[str, Any] = {
        "label": "q+k+v",
        "layer": 0,
        "chunk": 0,
        "bytes_up": 100,
        "bytes_down": 300,
        "raw_bytes_up": 200,
        "raw_bytes_down": 400,
        "compression_seconds": 0.0,
        "queue_seconds": 0.0,
        "decode_seconds": 0.0,
        "compute_seconds": 0.0,
        "encode_seconds": 0.0,
        "operations": {},
    }
    fields |= more
    return ev.Rpc(request_id, sent_ns=round(sent_ms * MS), received_ns=round(received_ms * MS), **fields)


def lap(start_ms: float, end_ms: float, part: str, op: str = "OP", layer: int = 0, request_id: int = 0) -> ev.Lap:
    return ev.Lap(round(start_ms * MS), round(end_ms * MS), part, op, layer, 0, request_id)


def summed(*events: ev.Event, phase: str = ev.PREFILL, until_ms: float = 1000, tokens: int = 4) -> Summary:
    summary = Summary()
    summary.add([ev.PhaseBegan(0, phase), *events, ev.PhaseEnded(round(until_ms * MS), phase, tokens, 1)])
    return summary


def parts(total: PhaseTotal) -> float:
    return total.tee_seconds + total.serialization_seconds + total.wait_seconds + total.other_seconds


def near(value: float) -> Any:
    return pytest.approx(value, abs=1e-9)


# Sums


def test_each_part_of_a_phase_is_the_sum_of_its_laps() -> None:
    total = summed(
        lap(0, 100, ev.TEE, "RMSNORM"),
        lap(100, 150, ev.SERIALIZATION, "ENCODE"),
        lap(150, 400, ev.WAIT, "WAIT"),
        lap(400, 460, ev.SERIALIZATION, "DECODE"),
        lap(460, 900, ev.TEE, "SILU"),
        lap(900, 1000, ev.OTHER, "OTHER"),
    ).phases[ev.PREFILL]
    assert total.tee_seconds == near(0.54)
    assert total.serialization_seconds == near(0.11)
    assert total.wait_seconds == near(0.25)
    assert total.other_seconds == near(0.1)
    assert total.seconds == near(1.0) == near(parts(total))
    assert (total.tokens, total.passes) == (4, 1)
    assert total.tokens_per_second == near(4.0)


def test_operations_of_the_tee_are_counted_by_name() -> None:
    total = summed(
        lap(0, 10, ev.TEE, "SILU"), lap(10, 30, ev.TEE, "SILU"), lap(30, 35, ev.TEE, "ROTARY"), lap(35, 36, ev.OTHER)
    ).phases[ev.PREFILL]
    assert set(total.ops) == {"SILU", "ROTARY"}
    assert total.ops["SILU"].where == "tee"
    assert (total.ops["SILU"].count, total.ops["SILU"].seconds) == (2, near(0.03))


def test_requests_are_counted_with_their_bytes_and_operations() -> None:
    operations = {"LINEAR": (3, 0.02), "LM_HEAD": (1, 0.01)}
    total = summed(
        rpc(1, compute_seconds=0.03, operations=operations, compression_seconds=0.5),
        rpc(2, compute_seconds=0.03, operations=operations),
    ).phases[ev.PREFILL]
    assert total.rpc_calls == 2
    assert (total.bytes_up, total.bytes_down, total.raw_bytes_up, total.raw_bytes_down) == (200, 600, 400, 800)
    assert total.ops == {"LINEAR": OpTotal("gpu", 6, near(0.04)), "LM_HEAD": OpTotal("gpu", 2, near(0.02))}
    assert total.busy.compression_seconds == near(0.5)


def test_what_happens_in_no_layer_is_in_none() -> None:
    total = summed(
        lap(0, 10, ev.TEE, "EMBEDDING", layer=ev.NO_LAYER),
        lap(10, 20, ev.TEE, "SILU", layer=2),
        lap(20, 25, ev.SERIALIZATION, "ENCODE", layer=2),
        rpc(7, 25, 125, compute_seconds=0.04, queue_seconds=0.01),
        lap(25, 125, ev.WAIT, "WAIT", layer=2, request_id=7),
        lap(125, 200, ev.OTHER, "OTHER", layer=1),
    ).phases[ev.PREFILL]
    layer = total.layers[2]
    assert (layer.tee_seconds, layer.serialization_seconds) == (near(0.01), near(0.005))
    assert (layer.gpu_seconds, layer.server_seconds, layer.network_seconds) == (near(0.04), near(0.01), near(0.05))
    assert sorted(total.layers) == [1, 2]


def test_phases_of_several_prompts_add_up_by_name() -> None:
    summary = Summary()
    for start_ms, tokens in ((0, 10), (5000, 30)):
        start = start_ms * MS
        summary.add(
            [
                ev.PhaseBegan(start, ev.PREFILL),
                lap(start_ms, start_ms + 100, ev.TEE),
                ev.PhaseEnded(start + 100 * MS, ev.PREFILL, tokens, 1),
                ev.PhaseBegan(start + 200 * MS, ev.DECODE),
                lap(start_ms + 200, start_ms + 500, ev.TEE),
                ev.PhaseEnded(start + 500 * MS, ev.DECODE, 3, 3),
            ]
        )
    prefill, decode = summary.phases[ev.PREFILL], summary.phases[ev.DECODE]
    assert (prefill.tokens, prefill.passes, prefill.seconds) == (40, 2, near(0.2))
    assert (decode.tokens, decode.passes, decode.seconds) == (6, 6, near(0.6))
    assert parts(prefill) == near(prefill.seconds)
    assert parts(decode) == near(decode.seconds)


def test_nothing_outside_of_a_phase_counts() -> None:
    summary = Summary()
    outside = [
        lap(0, 10, ev.TEE),
        rpc(),
        ev.Speculated(3, 2),
        ev.PhaseEnded(10 * MS, ev.PREFILL, 5, 1),
    ]
    summary.add(outside)
    assert summary.phases == {}
    summary.add([ev.PhaseBegan(20 * MS, ev.DECODE), ev.PhaseEnded(30 * MS, ev.DECODE, 1, 1)])
    summary.add(outside)
    empty = PhaseTotal(tokens=1, passes=1, chunks=1, seconds=near(0.01), other_seconds=near(0.01))
    empty.outside.other_seconds = near(0.01)
    assert summary.phases == {ev.DECODE: empty}


def test_an_empty_phase_divides_by_nothing() -> None:
    total = PhaseTotal()
    assert (total.tokens_per_second, total.communication_share) == (0.0, 0.0)


def test_communication_is_serialization_and_network() -> None:
    total = summed(
        lap(0, 200, ev.SERIALIZATION),
        rpc(1, 200, 800, compute_seconds=0.3),
        lap(200, 800, ev.WAIT, request_id=1),
        lap(800, 1000, ev.TEE),
    ).phases[ev.PREFILL]
    assert total.network_seconds == near(0.3)
    assert total.communication_share == near(0.5)


def test_speculation_is_counted() -> None:
    total = summed(ev.Speculated(4, 2), ev.Speculated(3, 0), phase=ev.DECODE).phases[ev.DECODE]
    assert (total.drafted_tokens, total.accepted_tokens) == (7, 2)


# Waits


SERVER = {"queue_seconds": 0.01, "decode_seconds": 0.02, "compute_seconds": 0.03, "encode_seconds": 0.01}


def test_a_lock_step_wait_exposes_all_that_the_server_did() -> None:
    assert exposed(lap(0, 100, ev.WAIT), rpc(**SERVER)) == (near(0.04), near(0.03))
    total = summed(rpc(5, **SERVER), lap(0, 100, ev.WAIT, request_id=5)).phases[ev.PREFILL]
    assert (total.server_seconds, total.gpu_seconds, total.network_seconds) == (near(0.04), near(0.03), near(0.03))
    assert total.wait_seconds == near(0.1)


@pytest.mark.parametrize(
    ("start_ms", "server_ms", "gpu_ms"),
    [
        # Link up 7.5 ms (a quarter of the bytes), queue and decode 30 ms, compute 30 ms, encode 10 ms, link down.
        (7.5, 40, 30),
        (17.5, 30, 30),
        (37.5, 10, 30),
        (52.5, 10, 15),
        (67.5, 10, 0),
        (75, 2.5, 0),
        (80, 0, 0),
        (100, 0, 0),
    ],
)
def test_an_overlapped_wait_exposes_the_end_of_the_request_only(
    start_ms: float, server_ms: float, gpu_ms: float
) -> None:
    server, gpu = exposed(lap(start_ms, 100, ev.WAIT), rpc(**SERVER))
    assert (server, gpu) == (near(server_ms / 1e3), near(gpu_ms / 1e3))


def test_a_wait_that_ended_before_the_reply_came_exposes_its_beginning() -> None:
    assert exposed(lap(0, 52.5, ev.WAIT), rpc(**SERVER)) == (near(0.03), near(0.015))


def test_a_wait_longer_than_the_request_has_the_rest_as_network() -> None:
    total = summed(rpc(5, 50, 150, **SERVER), lap(0, 200, ev.WAIT, request_id=5)).phases[ev.PREFILL]
    assert (total.server_seconds, total.gpu_seconds, total.network_seconds) == (near(0.04), near(0.03), near(0.13))


def test_without_bytes_the_link_is_halved() -> None:
    server, gpu = exposed(lap(0, 50, ev.WAIT), rpc(bytes_up=0, bytes_down=0, compute_seconds=0.04))
    assert (server, gpu) == (0.0, near(0.02))


@pytest.mark.parametrize("request_id", [0, 99])
def test_a_wait_for_an_unknown_request_is_all_network(request_id: int) -> None:
    total = summed(rpc(5, **SERVER), lap(0, 100, ev.WAIT, request_id=request_id)).phases[ev.PREFILL]
    assert (total.server_seconds, total.gpu_seconds, total.network_seconds) == (0.0, 0.0, near(0.1))


def test_a_request_is_exposed_by_one_wait_only() -> None:
    waits = lap(0, 100, ev.WAIT, request_id=5), lap(100, 200, ev.WAIT, request_id=5)
    total = summed(rpc(5, **SERVER), *waits).phases[ev.PREFILL]
    assert total.gpu_seconds == near(0.03)
    assert total.wait_seconds == near(0.2)


def test_overlapped_requests_are_busy_longer_than_they_are_exposed() -> None:
    total = summed(
        rpc(1, 0, 100, compute_seconds=0.05),
        lap(0, 100, ev.WAIT, request_id=1),
        rpc(2, 0, 110, compute_seconds=0.05),
        lap(100, 110, ev.WAIT, request_id=2),
    ).phases[ev.PREFILL]
    assert total.busy.round_trip_seconds == near(0.21)
    assert total.busy.gpu_seconds == near(0.1)
    assert total.gpu_seconds == near(0.05)
    assert total.wait_seconds == near(0.11)
    assert total.wait_seconds == near(total.network_seconds + total.server_seconds + total.gpu_seconds)


# A server that lies


def test_claims_that_fit_are_taken_as_they_are() -> None:
    assert server_parts(rpc(**SERVER)) == (0.01, 0.02, 0.03, 0.01)


def test_claims_beyond_the_round_trip_are_scaled_down() -> None:
    lies = rpc(queue_seconds=1e8, compute_seconds=3e8)
    assert server_parts(lies) == (near(0.025), 0.0, near(0.075), 0.0)
    total = summed(lies, lap(0, 100, ev.WAIT, request_id=1)).phases[ev.PREFILL]
    assert total.network_seconds == near(0.0)
    assert total.network_seconds >= 0.0
    assert total.gpu_seconds + total.server_seconds == near(0.1)
    assert total.busy.network_seconds == near(0.0)


def test_operations_beyond_the_computation_are_scaled_down() -> None:
    total = summed(rpc(compute_seconds=0.05, operations={"LINEAR": (1, 3e8), "ADD": (1, 1e8)})).phases[ev.PREFILL]
    assert (total.ops["LINEAR"].seconds, total.ops["ADD"].seconds) == (near(0.0375), near(0.0125))
    total = summed(rpc(operations={"LINEAR": (1, 5.0)})).phases[ev.PREFILL]
    assert total.ops["LINEAR"].seconds == 0.0


def test_a_reply_before_its_request_took_no_time() -> None:
    assert server_parts(rpc(1, 100, 50, compute_seconds=1.0)) == (0.0, 0.0, 0.0, 0.0)


def test_an_operation_of_both_sides_is_kept_apart() -> None:
    total = summed(
        lap(0, 10, ev.TEE, "EMBEDDING"),
        rpc(compute_seconds=0.02, operations={"EMBEDDING": (1, 0.02)}),
        lap(10, 20, ev.TEE, "EMBEDDING"),
        rpc(compute_seconds=0.02, operations={"EMBEDDING": (1, 0.02)}),
    ).phases[ev.PREFILL]
    assert total.ops == {
        "EMBEDDING": OpTotal("tee", 2, near(0.02)),
        "EMBEDDING@gpu": OpTotal("gpu", 2, near(0.04)),
    }


# Latency


def test_the_first_token_counts_from_the_start_of_its_prefill() -> None:
    summary = Summary()
    summary.add([ev.PhaseBegan(100 * MS, ev.PREFILL)])
    assert summary.ttft_seconds is None
    summary.add([ev.TokensMade(350 * MS, 1), ev.PhaseEnded(360 * MS, ev.PREFILL, 9, 1)])
    assert summary.ttft_seconds == near(0.25)
    assert summary.tpot_percentile(0.5) is None


def test_a_first_token_made_in_decode_counts_from_the_prefill_too() -> None:
    summary = Summary()
    summary.add(
        [
            ev.PhaseBegan(100 * MS, ev.PREFILL),
            ev.PhaseEnded(300 * MS, ev.PREFILL, 9, 1),
            ev.PhaseBegan(300 * MS, ev.DECODE),
            ev.TokensMade(350 * MS, 1),
        ]
    )
    assert summary.ttft_seconds == near(0.25)


def test_only_the_first_prompt_gives_the_time_to_the_first_token() -> None:
    summary = Summary()
    for start in (0, 5000):
        summary.add(
            [
                ev.PhaseBegan(start * MS, ev.PREFILL),
                ev.TokensMade((start + 100 + start // 50) * MS, 1),
                ev.PhaseEnded((start + 400) * MS, ev.PREFILL, 9, 1),
                ev.PhaseBegan((start + 400) * MS, ev.DECODE),
                ev.TokensMade((start + 500) * MS, 1),
                ev.PhaseEnded((start + 600) * MS, ev.DECODE, 1, 1),
            ]
        )
    assert summary.ttft_seconds == near(0.1)
    assert summary.tpot_seconds == [near(0.4), near(0.3)], "the pause between prompts is nobody's token time"


def test_tokens_of_one_pass_share_its_time() -> None:
    summary = Summary()
    summary.add([ev.PhaseBegan(0, ev.PREFILL), ev.TokensMade(100 * MS, 1), ev.TokensMade(200 * MS, 4)])
    assert summary.tpot_seconds == [near(0.025)] * 4


def test_the_median_and_the_95th_percentile() -> None:
    summary = Summary()
    at, gaps = 0, [10, 30, 20, 40] * 25 + [500]
    summary.add([ev.PhaseBegan(0, ev.PREFILL), ev.TokensMade(0, 1)])
    for gap in gaps:
        at += gap
        summary.add([ev.TokensMade(at * MS, 1)])
    assert summary.tpot_percentile(0.5) == near(statistics.median(gaps) / 1e3)
    assert summary.tpot_percentile(0.95) == near(0.04)
    assert summary.tpot_percentile(1.0) == near(0.5)


def test_one_sample_is_every_percentile() -> None:
    summary = Summary()
    summary.add([ev.PhaseBegan(0, ev.PREFILL), ev.TokensMade(0, 1), ev.TokensMade(20 * MS, 1)])
    assert summary.tpot_percentile(0.5) == summary.tpot_percentile(0.95) == near(0.02)


def test_token_times_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summing, "MAX_SAMPLES", 10)
    summary = Summary()
    summary.add([ev.PhaseBegan(0, ev.PREFILL), *(ev.TokensMade(number * MS, 1) for number in range(100))])
    assert len(summary.tpot_seconds) == 10


def test_requests_are_forgotten_when_their_phase_ends() -> None:
    assert summed(*(rpc(number) for number in range(100)))._rpcs == {}


# Whatever happens


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_the_parts_add_up_to_the_wall_whatever_happens(data: st.DataObject) -> None:
    now_ns = 1000
    summary = Summary()
    recorder = Recorder(summary.add, clock_ns=lambda: now_ns, batch=data.draw(st.sampled_from([1, 7, 2048])))
    walls = {ev.PREFILL: 0, ev.DECODE: 0}
    step = st.integers(0, 50 * MS)
    claim = st.floats(0, 1e9, exclude_max=True) | st.floats(0, 0.01)
    for phase in data.draw(st.lists(st.sampled_from([ev.PREFILL, ev.DECODE]), max_size=4)):
        recorder.begin(phase)
        began_ns = now_ns
        for _ in range(data.draw(st.integers(0, 8))):
            now_ns += data.draw(step)
            what = data.draw(st.sampled_from(["tee", "serialization", "wait", "tokens", "nothing"]))
            layer = data.draw(st.integers(-1, 2))
            if what == "tee":
                recorder.lap(ev.TEE, "SILU", layer)
            elif what == "serialization":
                recorder.lap(ev.SERIALIZATION, "ENCODE", layer)
            elif what == "tokens":
                recorder.tokens(data.draw(st.integers(1, 3)))
            elif what == "wait":
                request_id = data.draw(st.integers(1, 5))
                sent_ns = now_ns - data.draw(step)
                call = rpc(
                    request_id,
                    sent_ns / MS,
                    (now_ns - data.draw(st.integers(0, MS))) / MS,
                    bytes_up=data.draw(st.integers(0, 9)),
                    queue_seconds=data.draw(claim),
                    decode_seconds=data.draw(claim),
                    compute_seconds=data.draw(claim),
                    encode_seconds=data.draw(claim),
                    operations={"LINEAR": (1, data.draw(claim))},
                )
                recorder.add(call)
                recorder.lap_until(now_ns, ev.WAIT, "WAIT", layer, 0, request_id)
        now_ns += data.draw(step)
        recorder.end(1, 1)
        walls[phase] += now_ns - began_ns
    for phase, total in summary.phases.items():
        assert total.seconds == pytest.approx(walls[phase] / 1e9, abs=1e-9)
        assert parts(total) == pytest.approx(total.seconds, abs=1e-9)
        waits = total.network_seconds + total.server_seconds + total.gpu_seconds
        assert waits == pytest.approx(total.wait_seconds, abs=1e-9)
        assert min(total.network_seconds, total.server_seconds, total.gpu_seconds, total.busy.network_seconds) >= 0.0
        assert 0.0 <= total.communication_share <= 1.0 + 1e-9
        assert sum(op.seconds for op in total.ops.values() if op.where == "gpu") <= total.busy.gpu_seconds + 1e-9
        assert sum(layer.tee_seconds for layer in total.layers.values()) <= total.tee_seconds + 1e-9
        assert whole(total) == pytest.approx(total.seconds, abs=1e-9)


# A log that breaks off, or has lost something


def whole(total: PhaseTotal) -> float:
    """All exclusive parts of all layers, and of what belongs to none."""
    rows = [*total.layers.values(), total.outside]
    return sum(sum(getattr(row, name) for name in LayerTotal.__slots__) for row in rows)


def test_a_phase_without_an_end_reaches_to_its_last_lap() -> None:
    summary = Summary()
    summary.add(
        [
            ev.PhaseBegan(0, ev.PREFILL, 9),
            lap(0, 100, ev.TEE, "SILU"),
            ev.TokensMade(100 * MS, 1),
            ev.PhaseBegan(120 * MS, ev.DECODE, 5),
            lap(120, 150, ev.TEE, "SILU"),
            ev.TokensMade(150 * MS, 1),
            ev.TokensMade(160 * MS, 2),
            lap(150, 170, ev.SERIALIZATION),
        ]
    )
    prefill, decode = summary.phases[ev.PREFILL], summary.phases[ev.DECODE]
    assert (prefill.tokens, prefill.passes, prefill.seconds) == (9, 1, near(0.1))
    assert (decode.tokens, decode.passes, decode.seconds) == (3, 2, near(0.05))
    assert parts(decode) == near(0.05) == near(whole(decode))


def test_what_was_counted_gives_way_to_what_the_end_says() -> None:
    summary = Summary()
    summary.add([ev.PhaseBegan(0, ev.DECODE), ev.TokensMade(0, 1), ev.TokensMade(0, 1)])
    assert (summary.phases[ev.DECODE].tokens, summary.phases[ev.DECODE].passes) == (2, 2)
    summary.add([ev.PhaseEnded(MS, ev.DECODE, 7, 3)])
    assert (summary.phases[ev.DECODE].tokens, summary.phases[ev.DECODE].passes) == (7, 3)


def test_time_whose_laps_are_lost_is_other() -> None:
    total = summed(lap(0, 100, ev.TEE), lap(400, 600, ev.TEE), until_ms=700).phases[ev.PREFILL]
    assert (total.tee_seconds, total.other_seconds, total.seconds) == (near(0.3), near(0.4), near(0.7))
    assert total.outside.other_seconds == near(0.4)


def test_no_instant_counts_twice_when_the_clock_goes_backwards() -> None:
    total = summed(
        lap(0, 100, ev.TEE), lap(40, 90, ev.TEE), lap(90, 130, ev.TEE), lap(200, 150, ev.TEE), until_ms=100
    ).phases[ev.PREFILL]
    assert total.seconds == near(0.2) == near(parts(total)) == near(whole(total))
    assert total.tee_seconds == near(0.13)


def test_a_wait_that_is_cut_short_exposes_no_more_than_itself() -> None:
    call = rpc(1, 0, 100, compute_seconds=0.1)
    total = summed(lap(0, 80, ev.TEE), call, lap(0, 100, ev.WAIT, request_id=1), until_ms=100).phases[ev.PREFILL]
    assert (total.wait_seconds, total.gpu_seconds, total.network_seconds) == (near(0.02), near(0.02), near(0.0))


def test_an_end_whose_beginning_is_lost_closes_what_is_open() -> None:
    summary = Summary()
    summary.add([ev.PhaseBegan(0, ev.PREFILL, 9), lap(0, 100, ev.TEE), ev.PhaseEnded(900 * MS, ev.DECODE, 5, 5)])
    assert summary.phases[ev.PREFILL].seconds == near(0.1)
    assert (summary.phases[ev.DECODE].tokens, summary.phases[ev.DECODE].seconds) == (5, 0.0)
    summary.add([lap(900, 950, ev.TEE)])
    assert summary.phases[ev.PREFILL].seconds == near(0.1)


def test_a_log_of_nonsense_keeps_its_memory_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summing, "MAX_NAMES", 10)
    monkeypatch.setattr(summing, "MAX_WAITED_FOR", 10)
    summary = Summary()
    summary.add([ev.PhaseBegan(0, ev.PREFILL)])
    for number in range(100):
        call = rpc(number, operations={f"OP{number}": (1, 0.0)}, endpoint=number, layer=number)
        summary.add([call, lap(number, number + 1, ev.TEE, f"T{number}", layer=number)])
    total = summary.phases[ev.PREFILL]
    assert (len(total.layers), len(summary.endpoints), len(summary._rpcs)) == (10, 10, 10)
    assert len(total.ops) <= 10
    assert total.seconds == near(0.1) == near(whole(total))
    assert total.rpc_calls == 100


# More figures


def test_retries_are_counted_by_phase_and_server() -> None:
    summary = summed(
        ev.Retried(1, 1, 0, 0, 1, "ConnectionLostError"), rpc(1, endpoint=0, attempts=2), rpc(2, endpoint=1), rpc(3)
    )
    total = summary.phases[ev.PREFILL]
    assert (total.rpc_retries, total.rpc_calls) == (1, 3)
    assert summary.endpoints == {0: EndpointTotal(2, 200, 600, 0), 1: EndpointTotal(1, 100, 300, 1)}


def test_the_peak_of_memory_is_kept_even_outside_of_a_phase() -> None:
    summary = Summary()
    summary.add([ev.Sampled(1, 50, 0, 0.0), ev.Sampled(2, 90, 7, 0.0), ev.Sampled(3, 60, 3, 0.0)])
    assert (summary.memory.runner_bytes, summary.memory.server_bytes) == (90, 7)


def test_latencies_are_those_of_the_round_trips() -> None:
    total = summed(*(rpc(number, 0, number) for number in range(1, 101))).phases[ev.PREFILL]
    assert total.latencies.quantile(0.5) == pytest.approx(0.050, rel=0.011)
    assert total.latencies.quantile(0.95) == pytest.approx(0.095, rel=0.011)
    assert total.latencies.max_seconds == near(0.1)


def test_layers_and_what_belongs_to_none_are_the_wall() -> None:
    total = summed(
        lap(0, 10, ev.TEE, "EMBEDDING", layer=ev.NO_LAYER),
        lap(10, 20, ev.OTHER, "TURN", layer=1),
        rpc(7, 20, 120, compute_seconds=0.04, queue_seconds=0.01),
        lap(20, 120, ev.WAIT, layer=0, request_id=7),
        until_ms=130,
    ).phases[ev.PREFILL]
    assert whole(total) == near(total.seconds) == near(0.13)
    assert total.layers[1].other_seconds == near(0.01)
    assert (total.outside.tee_seconds, total.outside.other_seconds) == (near(0.01), near(0.01))

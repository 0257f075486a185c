"""Figures made of samples."""

from __future__ import annotations

from typing import Any

import pytest

from teegpu.bench.samples import Measured, PhaseSample, Sample
from teegpu.bench.summary import bounds, results, verdict
from transports.linkspec import LinkSpec


def sample(seconds: float, ids: list[int] | None = None, **prefill: Any) -> Sample:
    return Sample(
        prefill=PhaseSample(100, 1, seconds, **prefill),
        decode=PhaseSample(4, 2, seconds / 2, rpc_calls=6, rounds=6, bytes_up=20, bytes_down=10),
        ttft_seconds=seconds,
        tpot_median_seconds=seconds / 8,
        token_ids=[7, 8, 9, 1, 2] if ids is None else ids,
        peak_memory_bytes=int(seconds * 100),
    )


def measured(plan: str, *samples: Sample, remote: bool = True) -> Measured:
    case = {"prefill_plan": plan, "decode_plan": plan, "remote": remote}
    return Measured(plan, case, samples=list(samples), warm_up=samples[0] if samples else None)


def test_medians_spread_and_speed_up_over_per_op() -> None:
    slow = measured("per-op", sample(8.0), sample(10.0), sample(9.0))
    quick = measured("fused", sample(3.0), sample(2.0))
    first, second = results([quick, slow], reference=[7, 8, 9, 1, 2], link=None)
    assert first["prefill"]["seconds"] == {"median": 2.5, "min": 2.0, "max": 3.0}
    assert first["prefill"]["speed_up"] == pytest.approx(9.0 / 2.5)
    assert first["decode"]["speed_up"] == pytest.approx(9.0 / 2.5)
    assert second["prefill"]["speed_up"] == 1.0
    assert first["decode"]["tokens_per_second"]["max"] == pytest.approx(4.0)
    assert first["decode"]["tpot_seconds"]["median"] == pytest.approx(2.5 / 8)
    assert first["peak_memory_bytes"] == 300
    assert len(first["samples"]) == 2


def test_products_alone_bound_what_any_plan_can_reach() -> None:
    local = measured("local", sample(2.0, products_seconds=1.5), sample(2.2, products_seconds=1.7), remote=False)
    slow = measured("per-op", sample(8.0, products_seconds=3.0))
    quick = measured("fused", sample(2.5, products_seconds=2.0, overlapped=True))
    quick.facts["threads"] = {"runner": 1, "server": 1}
    whole, server = bounds([slow, quick, local])
    assert "products alone take 1.600 s of local's prefill of 2.100 s" in whole
    assert "less than 0.76 × of local, or is more than 5.0 × as fast as per-op" in whole
    assert server == "fused: the server's products take 2.000 s of the prefill's 2.500 s, on 1 thread"
    assert bounds([local])[0].endswith("0.76 × of local")
    assert bounds([slow]) == []
    assert bounds([measured("local", remote=False), measured("fused")]) == []


def test_a_decode_step_is_a_pass() -> None:
    (entry,) = results([measured("fused", sample(1.0))], reference=None, link=None)
    assert entry["decode"]["rpc_calls_per_step"] == 3
    assert entry["decode"]["bytes_up_per_step"] == 10
    assert entry["decode"]["tokens_per_step"] == 2


def test_without_a_per_op_case_there_is_no_speed_up() -> None:
    (entry,) = results([measured("fused", sample(1.0))], reference=None, link=None)
    assert entry["prefill"]["speed_up"] is None


def test_a_per_op_case_without_samples_is_no_base() -> None:
    failed = measured("per-op")
    failed.error = "no server"
    entry, broken = results([measured("fused", sample(1.0)), failed], reference=None, link=None)
    assert entry["prefill"]["speed_up"] is None
    assert broken["error"] == "no server"
    assert broken["samples"] == []
    assert broken["warm_up"] is None
    assert "prefill" not in broken


def test_the_floor_is_that_of_the_link_and_of_cases_with_a_server() -> None:
    link = LinkSpec.parse("rtt=100ms,bandwidth=8kbit")
    remote = measured("fused", sample(3.0, rounds=10, bytes_up=500, bytes_down=1000))
    local = measured("local", sample(1.0), remote=False)
    first, second = results([remote, local], reference=None, link=link)
    assert first["prefill"]["link_floor_seconds"] == pytest.approx(1.0 + 1.0)
    assert first["prefill"]["ratio_to_floor"] == pytest.approx(1.5)
    assert second["prefill"]["link_floor_seconds"] is None


def test_a_link_without_limits_has_no_ratio() -> None:
    (entry,) = results([measured("fused", sample(1.0))], reference=None, link=LinkSpec())
    assert entry["prefill"]["link_floor_seconds"] == 0.0
    assert entry["prefill"]["ratio_to_floor"] is None


def test_prefill_alone_has_no_decode() -> None:
    alone = Sample(PhaseSample(100, 1, 1.0), PhaseSample(0, 0, 0.0), 1.0, None, [7], 1)
    (entry,) = results([measured("fused", alone)], reference=[7], link=None)
    assert "decode" not in entry
    assert entry["output"]["identical"]


@pytest.mark.parametrize(
    ("made", "reference", "told"),
    [
        ([[7, 8, 9]], [7, 8, 9], "identical"),
        ([[7, 8, 9], [7, 1, 9]], [7, 8, 9], "first 1 of 3"),
        ([[7, 8]], [7, 8, 9], "first 2 of 2"),
        ([[7, 8, 9]], None, "not checked"),
    ],
)
def test_the_output_check_takes_the_worst_repeat(made: list[list[int]], reference: list[int] | None, told: str) -> None:
    (entry,) = results([measured("fused", *(sample(1.0, ids) for ids in made))], reference=reference, link=None)
    assert verdict(entry["output"]) == told

"""The cost model's formulas, with prices that can be reckoned by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from teegpu.metrics import demand, traffic
from teegpu.metrics.cost_model import CostModel, Settings, frames
from teegpu.metrics.predict import Link
from teegpu.metrics.rates import Rates
from teegpu.metrics.traffic import Shape
from tests.teegpu.metrics.tuning import SHAPE, rates

FUSED = Settings("fused", "fp16", "zmq", 2048)
CHUNKED = Settings("fused", "fp16", "pipelined", 128)


def one_price(place: str, *units: float, link: Link | None = None) -> Rates:
    """Nothing costs anything but this."""
    free = dict.fromkeys(rates().prices, (0.0, 0.0, 0.0))
    first, second, third = units
    return Rates(free | {place: (first, second, third)}, link or Link(0.0, 1e30, 1e30))


def test_products_of_local_are_those_of_the_model() -> None:
    per_token = 30 * SHAPE.layer_values
    model = CostModel(SHAPE, one_price("tee/LINEAR", 0.0, 0.0, 1e-9))
    # In the last layer only keys and values are computed for all, and one row goes on to lm_head.
    last = SHAPE.q * 576 + 3 * 576 * 1536
    want = 100 * per_token - 99 * last + 576 * 49152
    assert model.prefill(Settings("local", "fp16", "zmq", 2048), 100).seconds == pytest.approx(want * 1e-9)
    assert model.decode(Settings("local", "fp16", "zmq", 2048), 100).seconds == pytest.approx(
        (per_token + 576 * 49152) * 1e-9
    )


@pytest.mark.parametrize("plan", traffic.REMOTE_PLANS)
def test_the_server_multiplies_what_local_does(plan: str) -> None:
    ours = demand.forward(SHAPE, "local", "fp32", tokens=7, start=0, want="last")["tee/LINEAR"]
    theirs = demand.forward(SHAPE, plan, "fp32", tokens=7, start=0, want="last")["server/LINEAR"]
    assert theirs[1:] == ours[1:]


def test_rounds_and_requests_in_lock_step() -> None:
    link = Link(0.01, 1e30, 1e30, 0.001)
    assert CostModel(SHAPE, one_price("tee/OTHER", 0, 0, 0, link=link)).decode(FUSED, 50).seconds == pytest.approx(
        61 * 0.011
    )
    model = CostModel(SHAPE, one_price("runner/encode.fp16", 1e-3, 0, 0))
    assert model.decode(FUSED, 50).seconds == pytest.approx(0.061)
    assert model.decode(replace(FUSED, product_cost=3.0), 50).seconds == pytest.approx(0.183)


def test_bytes_up_and_down_add_up_in_lock_step_and_hide_behind_each_other_in_chunks() -> None:
    model = CostModel(SHAPE, one_price("tee/OTHER", 0, 0, 0, link=Link(0.0, 1e8, 1e8)))
    alone, together = model.prefill(FUSED, 1024), model.prefill(CHUNKED, 1024)
    up, down = alone.traffic.bytes_up_with_headers / 1e8, alone.traffic.bytes_down_with_headers / 1e8
    assert alone.seconds == pytest.approx(up + down)
    assert down < together.seconds < 1.05 * down
    assert together.bound_by == "down"


def test_both_sides_on_the_same_cores_can_not_do_more_than_these() -> None:
    apart = rates(server_flop=1e-10)
    shared = replace(apart, cores=2, runner_share=0.5, server_share=0.5)
    first, second = (CostModel(SHAPE, each).prefill(CHUNKED, 1024) for each in (apart, shared))
    work = second.work
    assert second.seconds >= (work.runner + work.server) / 2
    assert second.seconds >= first.seconds
    crowded = CostModel(SHAPE, replace(shared, runner_share=1.0, server_share=1.0)).prefill(CHUNKED, 1024)
    assert crowded.bound_by == "cores"
    assert crowded.seconds >= work.runner + work.server - 1e-9
    turns = replace(shared, runner_share=1.0, server_share=1.0, slowdown=1.5)
    assert CostModel(SHAPE, turns).prefill(CHUNKED, 1024).seconds >= 1.5 * (work.runner + work.server) - 1e-9
    slow = CostModel(SHAPE, replace(shared, slowdown=1.5)).prefill(CHUNKED, 1024)
    assert slow.work.runner == pytest.approx(1.5 * work.runner)


def test_a_run_without_a_server_has_the_cores_that_one_would_take() -> None:
    apart = rates()
    shared = replace(apart, cores=2, runner_share=0.5, server_share=0.5)
    alone = Settings("local", "fp32", "zmq", 64)
    with_all, measured = (CostModel(SHAPE, each).prefill(alone, 512).seconds for each in (shared, apart))
    assert 0.5 * measured <= with_all < measured


def test_more_servers_share_chunks_but_not_a_single_pass() -> None:
    model = CostModel(SHAPE, rates(server_flop=1e-9))
    two = replace(CHUNKED, servers=2)
    assert model.prefill(two, 1024).seconds < 0.6 * model.prefill(CHUNKED, 1024).seconds
    assert model.decode(two, 100) == model.decode(CHUNKED, 100)


def test_a_border_between_servers_costs_a_round() -> None:
    link = Link(0.01, 1e30, 1e30)
    cut = CostModel(replace(SHAPE, cuts=(15,)), one_price("tee/OTHER", 0, 0, 0, link=link))
    assert cut.decode(FUSED, 50).seconds == pytest.approx(0.62)


def test_zstd_is_reckoned_with_where_it_pays() -> None:
    slow, quick = (CostModel(SHAPE, rates(bandwidth=rate)) for rate in (25e6, 5e9))
    for transport in ("zmq", "zmq+zstd"):
        assert quick.prefill(replace(FUSED, transport=transport), 1024) == quick.prefill(FUSED, 1024)
    plain, compressed = slow.prefill(FUSED, 1024), slow.prefill(replace(FUSED, transport="zmq+zstd"), 1024)
    assert compressed.traffic.bytes_down < 0.8 * plain.traffic.bytes_down
    assert compressed.seconds < plain.seconds
    small = slow.prefill(replace(CHUNKED, transport="pipelined+zstd"), 1024)
    assert small.seconds == slow.prefill(CHUNKED, 1024).seconds  # no frame of a chunk has a MiB


def test_neighbours_of_a_narrow_dtype_share_a_frame() -> None:
    outputs = [("z", (4, 64)), ("gate", (4, 128)), ("up", (4, 128))]
    assert frames(outputs, "fp32") == [1024, 2048, 2048]
    assert frames(outputs, "fp16") == [512 + 1024 + 1024]
    assert frames(outputs, "int8") == [512, 2 * (4 * 128 + 2 * 4 * 2)]


def test_the_codec_of_a_pass_by_requests_tensors_and_values() -> None:
    asked = demand.forward(SHAPE, "fused", "int8", tokens=1, start=5, want="last")
    values = 576 + 30 * (576 + 576) + 30 * (1536 + 576)
    assert asked["runner/encode.int8"] == asked["server/decode.int8"] == (61.0, 121.0, float(values))


def test_attention_of_a_window_sees_no_more_than_that() -> None:
    windows = replace(SHAPE, layers=2, windows=(16, None))
    full = replace(SHAPE, layers=2)
    assert demand.attention(windows, 1, 1000, "last")[2] < 0.52 * demand.attention(full, 1, 1000, "last")[2]


def test_many_chunks_of_scores_are_estimated_from_some() -> None:
    tiny = Shape(2, 32, 64, 4, 2, 8, 272)
    model = CostModel(tiny, one_price("tee/SOFTMAX", 0, 1e-9, 0))
    whole = 2 * 4 * sum(range(1, 4001)) - 4 * sum(range(1, 4000))
    guess = model.prefill(Settings("batched", "fp32", "zmq", 1), 4000)
    assert guess.seconds == pytest.approx(whole * 1e-9, rel=0.02)


def test_unknown_names_and_missing_prices() -> None:
    model = CostModel(SHAPE, rates())
    with pytest.raises(ValueError, match="no plan 'fussed'"):
        model.decode(replace(FUSED, plan="fussed"), 1)
    with pytest.raises(ValueError, match="over 'fp8'"):
        model.decode(replace(FUSED, wire_dtype="fp8"), 1)
    known = {place: price for place, price in rates().prices.items() if "int8" not in place}
    fewer = CostModel(SHAPE, replace(rates(), prices=known))
    assert fewer.knows("fused", "fp16")
    assert not fewer.knows("fused", "int8")
    assert fewer.local_seconds(10) is not None
    with pytest.raises(KeyError):
        fewer.decode(replace(FUSED, wire_dtype="int8"), 1)


def test_rates_over_another_link_keep_what_handing_over_costs() -> None:
    own = replace(rates(), link=Link(0.0002, 1e9, 2e9, 0.0001))
    link = own.over(Link(0.005, 1.25e8, 1.25e8)).link
    assert link.rtt_seconds == 0.005
    assert link.overhead_seconds == pytest.approx(0.0003)
    assert link.up_bytes_per_second == pytest.approx(1 / (1 / 1e9 + 1 / 1.25e8))


def test_rates_come_back_from_json_and_nothing_else_does() -> None:
    own = rates(rtt=0.01, cores=2, runner_share=0.5, server_share=0.5, slowdown=1.2, overlap_seconds=1e-4)
    assert Rates.from_json(own.to_json()) == own
    for change in ({"prices": None}, {"cores": "2"}, {"link": {}}, {"slowdown": -1.0}, {"prices": {"x": [1.0]}}):
        with pytest.raises(ValueError, match=r"rates|unpack"):
            Rates.from_json(own.to_json() | change)

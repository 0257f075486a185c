"""What is chosen among predictions."""

from __future__ import annotations

import pytest

from teegpu.metrics import chooser
from teegpu.metrics.chooser import AUTO_CHUNK_TOKENS, AUTO_PLANS, Candidate, chunk_sizes, decodes, pick, prefills
from teegpu.metrics.cost_model import CostModel, Phase, Settings
from teegpu.metrics.predict import Work
from teegpu.metrics.traffic import Traffic
from tests.teegpu.metrics.tuning import SHAPE, rates

BASE = Settings("fused", "fp16", "pipelined", 0)


def candidate(plan: str, seconds: float, chunk: int = AUTO_CHUNK_TOKENS) -> Candidate:
    return Candidate(Settings(plan, "fp16", "pipelined", chunk), Phase(seconds, "up", Work(), Traffic()))


def test_the_more_private_of_two_that_are_about_as_quick() -> None:
    assert pick([candidate("fused", 1.0), candidate("local", 1.02)]).plan == "local"
    assert pick([candidate("fused", 1.0), candidate("local", 1.05)]).plan == "fused"
    assert pick([candidate("batched", 1.0), candidate("attention", 1.01)]).plan == "attention"
    with pytest.raises(ValueError, match="nothing"):
        pick([])


def test_the_usual_chunk_unless_another_is_clearly_better() -> None:
    assert pick([candidate("fused", 1.0, 64), candidate("fused", 1.01)]).settings.chunk_tokens == AUTO_CHUNK_TOKENS
    assert pick([candidate("fused", 1.0, 64), candidate("fused", 1.1)]).settings.chunk_tokens == 64


def test_chunks_to_weigh() -> None:
    assert chunk_sizes(77, 1024, overlaps=True) == (77,)
    assert chunk_sizes(0, 1024, overlaps=False) == (2048,)
    assert chunk_sizes(0, 100, overlaps=True) == (32, 64, 256, 2048)
    assert chooser.default_chunk(overlaps=True) == 256
    assert chooser.default_chunk(overlaps=False) == 2048


def test_auto_never_shows_the_server_more() -> None:
    assert set(AUTO_PLANS) == {"local", "attention", "fused"}


@pytest.mark.parametrize(
    ("rtt", "bandwidth", "prefill", "decode"),
    [(1e-5, 1e10, "fused", "fused"), (0.02, 1.25e9, "fused", "local"), (0.02, 2.5e6, "local", "local")],
)
def test_a_slow_tee_offloads_as_the_link_allows(rtt: float, bandwidth: float, prefill: str, decode: str) -> None:
    """A TEE of 5 GFLOP/s and a server of 1 TFLOP/s."""
    model = CostModel(SHAPE, rates(rtt=rtt, bandwidth=bandwidth, tee_flop=4e-10, server_flop=2e-12, request=5e-5))
    assert pick(prefills(model, BASE, tokens=1024, plans=AUTO_PLANS)).plan == prefill
    assert pick(decodes(model, BASE, position=1024, plans=AUTO_PLANS)).plan == decode


def test_a_plan_without_prices_is_left_out() -> None:
    base = Settings("fused", "int8", "pipelined", 0)
    known = {place: price for place, price in rates().prices.items() if "int8" not in place}
    model = CostModel(SHAPE, type(rates())(known, rates().link))
    assert {each.plan for each in prefills(model, base, tokens=64, plans=AUTO_PLANS)} == {"local"}

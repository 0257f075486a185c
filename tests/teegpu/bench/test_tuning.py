"""What is read off the measurements of ``tune``."""

from __future__ import annotations

from dataclasses import replace

import pytest

from teegpu.bench.tuning import SLOWDOWNS, slowdown_of
from teegpu.metrics.cost_model import CostModel, Settings
from teegpu.metrics.predict import Link
from tests.teegpu.metrics.tuning import SHAPE, rates

CHUNKED = Settings("fused", "fp16", "pipelined", 256)
TURNS = replace(rates(), cores=2, runner_share=1.0, server_share=1.0, link=Link(0.0, 1e30, 1e30))
PAUSED = replace(TURNS, link=Link(0.005, 1e30, 1e30))
FAR = replace(TURNS, link=Link(0.02, 2.5e6, 2.5e6))


def seconds(known, slowdown: float) -> float:
    return CostModel(SHAPE, replace(known, slowdown=slowdown)).prefill(CHUNKED, 1024).seconds


@pytest.mark.parametrize("slowdown", [1.0, 1.3, 2.5])
def test_the_slowdown_is_the_one_that_explains_the_time(slowdown: float) -> None:
    assert slowdown_of(SHAPE, TURNS, CHUNKED, 1024, seconds(TURNS, slowdown)) == pytest.approx(slowdown, rel=1e-4)


def test_only_pauses_explain_that_both_are_quicker_together() -> None:
    assert slowdown_of(SHAPE, PAUSED, CHUNKED, 1024, seconds(PAUSED, 0.9)) == pytest.approx(0.9, rel=1e-4)
    assert slowdown_of(SHAPE, TURNS, CHUNKED, 1024, seconds(TURNS, 0.9)) == 1.0


def test_a_slow_link_says_nothing_of_the_cores() -> None:
    assert slowdown_of(SHAPE, FAR, CHUNKED, 1024, 1.2 * seconds(FAR, 1.0)) == 1.0


def test_no_slowdown_is_read_off_what_none_explains() -> None:
    assert slowdown_of(SHAPE, TURNS, CHUNKED, 1024, 0.5 * seconds(TURNS, SLOWDOWNS[0])) == 1.0
    assert slowdown_of(SHAPE, TURNS, CHUNKED, 1024, 10 * seconds(TURNS, 1.0)) == pytest.approx(SLOWDOWNS[1])

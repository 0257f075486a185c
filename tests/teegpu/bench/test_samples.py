"""Samples and their spread."""

from __future__ import annotations

import json

import pytest

from teegpu.bench.samples import PhaseSample, Sample, Spread, agreement, quantile


def test_a_sample_survives_json() -> None:
    sample = Sample(PhaseSample(4, 1, 0.5, rpc_calls=3), PhaseSample(2, 2, 0.25), 0.5, 0.125, [1, 2, 3], 10)
    assert Sample.from_json(json.loads(json.dumps(sample.to_json()))) == sample


@pytest.mark.parametrize("missing", ["prefill", "token_ids"])
def test_what_is_no_sample_is_refused(missing: str) -> None:
    value = Sample(PhaseSample(4, 1, 0.5), PhaseSample(2, 2, 0.25), 0.5, None, [1], 10).to_json()
    del value[missing]
    with pytest.raises(ValueError, match="not a sample"):
        Sample.from_json(value)


def test_spread() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([1.0, 2.0]).to_json() == {"median": 1.5, "min": 1.0, "max": 2.0}
    with pytest.raises(ValueError, match="no values"):
        Spread.of([])


def test_quantile() -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert quantile([1.0, 2.0, 3.0], 1.0) == 3.0
    assert quantile([5.0], 0.95) == 5.0
    assert quantile(list(range(101)), 0.95) == 95.0
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_agreement_ends_at_the_first_difference() -> None:
    assert agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert agreement([1, 2], [1, 2, 3]) == 2
    assert agreement([], [1]) == 0


def test_shares_and_rates_of_a_phase() -> None:
    phase = PhaseSample(10, 1, 2.0, serialization_seconds=0.5, network_seconds=0.5)
    assert phase.communication_share == 0.5
    assert phase.tokens_per_second == 5.0
    assert PhaseSample(0, 0, 0.0).communication_share == PhaseSample(0, 0, 0.0).tokens_per_second == 0.0

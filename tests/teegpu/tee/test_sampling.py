"""Filters against transformers' own, and the draw itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as reference

from teegpu.errors import BadReplyError
from teegpu.tee.sampling import Sampler, SamplingOptions


def logits(seed: int = 0, vocab: int = 50) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("options", "filters"),
    [
        (SamplingOptions(temperature=0.5), [reference.TemperatureLogitsWarper(0.5)]),
        (SamplingOptions(temperature=1.0, top_k=7), [reference.TopKLogitsWarper(7)]),
        (SamplingOptions(temperature=1.0, top_p=0.8), [reference.TopPLogitsWarper(0.8)]),
        (SamplingOptions(temperature=1.0, min_p=0.1), [reference.MinPLogitsWarper(0.1)]),
        (
            SamplingOptions(temperature=1.7, top_k=20, top_p=0.9, min_p=0.05),
            [
                reference.TemperatureLogitsWarper(1.7),
                reference.TopKLogitsWarper(20),
                reference.TopPLogitsWarper(0.9),
                reference.MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
@pytest.mark.parametrize("vocab", [50, 3000])
def test_filters_are_those_of_transformers(
    vocab: int, seed: int, options: SamplingOptions, filters: list[object]
) -> None:
    scores = logits(seed, vocab)[None]
    for each in filters:
        scores = each(torch.zeros(1, 0, dtype=torch.int64), scores)
    want = torch.softmax(scores[0], dim=-1)
    got = Sampler(options).probabilities(logits(seed, vocab))
    torch.testing.assert_close(got, want)
    assert ((got == 0) == (want == 0)).all()


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    context = [3, 7, 7, 20]
    for seed in range(10):
        want = reference.RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([context]), logits(seed)[None].clone())
        got = Sampler(SamplingOptions(repetition_penalty=1.8))(logits(seed), context)
        assert got == int(want.argmax())


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert Sampler(SamplingOptions())(torch.tensor([1.0, 5.0, 5.0, 2.0]), []) == 1


def test_a_seed_repeats_itself_and_seeds_differ() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed))
        return [sampler(logits(), []) for _ in range(30)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_seed_of_the_operating_system_is_told_and_can_be_used_again() -> None:
    first, second = (Sampler(SamplingOptions(temperature=1.0)) for _ in range(2))
    assert first.seed != second.seed
    again = Sampler(SamplingOptions(temperature=1.0, seed=first.seed))
    assert [first(logits(), []) for _ in range(20)] == [again(logits(), []) for _ in range(20)]


def test_draws_follow_the_distribution() -> None:
    sampler = Sampler(SamplingOptions(temperature=1.0, top_k=4, seed=0))
    values = logits(2, vocab=10)
    counts = torch.bincount(torch.tensor([sampler(values, []) for _ in range(4000)]), minlength=10) / 4000
    assert float((counts - sampler.probabilities(values)).abs().max()) < 0.03
    assert int((counts > 0).sum()) <= 4


@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(temperature=0.7, top_p=0.9, min_p=0.1, seed=1)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_no_token_can_be_drawn_from_is_told(value: float, options: SamplingOptions) -> None:
    damaged = torch.zeros(50)
    damaged[7] = value
    if value < 0 and options.temperature:
        assert 0 <= Sampler(options)(damaged, []) < 50  # a token that can't be, as the filters make them too
        return
    with pytest.raises(BadReplyError, match="not numbers"):
        Sampler(options)(damaged, [])


def test_a_bias_is_read_once_however_long_it_is() -> None:
    """Others wait for each token while it is."""
    read: list[int] = []

    class Bias(tuple[tuple[int, float], ...]):
        def __iter__(self) -> Iterator[tuple[int, float]]:
            read.append(1)
            return super().__iter__()

    sampler = Sampler(SamplingOptions(bias=Bias([(7, 50.0), (99, 100.0)]), presence_penalty=2.0))
    assert [sampler(logits(), []) for _ in range(4)] == [7] * 4
    assert len(read) == 1


@pytest.mark.parametrize("penalty", [1e-30, 1e-38, 1e-40, 1e-300])
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 0.7])
def test_no_penalty_makes_numbers_of_a_server_into_none(temperature: float, penalty: float) -> None:
    """It would be taken for a server's fault, which ends all that runs."""
    values = torch.arange(-25.0, 26.0)
    options = SamplingOptions(temperature=temperature, repetition_penalty=penalty, seed=1)
    assert Sampler(options)(values, list(range(51))) > 25


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 5e-324])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
@pytest.mark.parametrize("scale", [1.0, -1.0, 3e38])
def test_the_lowest_temperatures_draw_the_likeliest_token(
    temperature: float, filters: dict[str, Any], scale: float
) -> None:
    values = torch.linspace(0.0, 1.0, 50) * scale
    token = Sampler(SamplingOptions(temperature=temperature, seed=1, **filters))(values, [])
    assert token == int(values.argmax())


def test_of_logits_that_overflow_equal_ones_are_drawn_alike() -> None:
    tokens = {Sampler(SamplingOptions(temperature=0.01, seed=seed))(torch.full((4,), 3e38), []) for seed in range(40)}
    assert tokens == {0, 1, 2, 3}

"""Tail probabilities, and what counts as found."""

from __future__ import annotations

import math
import random

import pytest

from teegpu.audit import chance


@pytest.mark.parametrize(
    ("count", "mean", "probability"), [(0, 1.0, 1.0), (1, 1.0, 1 - math.exp(-1)), (3, 1.0, 0.0803014), (2, 0.0, 0.0)]
)
def test_poisson(count: int, mean: float, probability: float) -> None:
    assert chance.poisson_tail(count, mean) == pytest.approx(probability, rel=1e-6)


def test_tails_of_known_distributions() -> None:
    assert chance.chi_squared_tail(3.841459, 1) == pytest.approx(0.05, rel=1e-5)
    assert chance.chi_squared_tail(330.5197, 255) == pytest.approx(0.001, rel=1e-3)
    assert chance.normal_tails(-1.959964) == pytest.approx(0.05, rel=1e-6)
    assert chance.among(0.3, 5) == 1.0


def test_right_guesses_are_no_chance() -> None:
    truth = list(range(40))
    right, mean, probability = chance.matches(truth, truth)
    assert (right, mean) == (40, 1.0)
    assert probability < 1e-40


def test_a_frequent_word_guessed_everywhere_is_chance() -> None:
    truth = [7] * 30 + list(range(100, 170))
    right, mean, probability = chance.matches([7] * 100, truth)
    assert (right, mean) == (30, pytest.approx(30.0))
    assert probability > 0.1


def test_unrelated_guesses_raise_no_more_alarms_than_said() -> None:
    """Guesses and truth with frequent words, as text has, that have nothing to do with each other."""
    numbers = random.Random(1)
    weights = [1 / (rank + 1) for rank in range(200)]
    small = 0
    for _ in range(2000):
        guesses, truth = (numbers.choices(range(200), weights, k=80) for _ in range(2))
        probability = chance.matches(guesses, truth)[2]
        assert probability > chance.FALSE_ALARM
        small += probability < 0.01
    assert small <= 0.02 * 2000

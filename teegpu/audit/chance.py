"""How likely it is to see as much by chance alone: tail probabilities, and when something counts as found."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

FALSE_ALARM = 1e-6
"""With this probability at most, a test on numbers that tell nothing says that they do."""


def matches(guesses: Sequence[int], truth: Sequence[int]) -> tuple[int, float, float]:
    """How many ``guesses`` are right, how many would be by chance, and the probability of at least so many.

    Chance is: the same guesses, dealt out to the places in any order. So an attack that guesses a frequent word
    everywhere is not given credit for the places where it stands. The number of right ones is then close to a Poisson
    number whose mean is known.
    """
    right = sum(guess == true for guess, true in zip(guesses, truth, strict=True))
    guessed = Counter(guesses)
    mean = sum(guessed[token] * count for token, count in Counter(truth).items()) / max(1, len(truth))
    return right, mean, poisson_tail(right, mean)


def poisson_tail(count: int, mean: float) -> float:
    """The probability that a Poisson number with ``mean`` is ``count`` or more."""
    if count <= 0:
        return 1.0
    if mean <= 0.0:
        return 0.0
    return float(torch.special.gammainc(torch.tensor(float(count), dtype=torch.float64), _number(mean)))


def chi_squared_tail(statistic: float, freedom: int) -> float:
    """The probability that a chi-squared number with ``freedom`` degrees is ``statistic`` or more."""
    return float(torch.special.gammaincc(_number(freedom / 2.0), _number(statistic / 2.0)))


def normal_tails(z: float) -> float:
    """The probability that a standard normal number is at least as far from 0 as ``z``."""
    return math.erfc(abs(z) / math.sqrt(2.0))


def among(probability: float, tests: int) -> float:
    """The probability that the smallest of ``tests`` results is at most ``probability`` (Bonferroni's bound)."""
    return min(1.0, probability * tests)


def _number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)

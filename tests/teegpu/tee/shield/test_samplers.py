from __future__ import annotations

import math

import numpy as np
import torch

from teegpu.tee.shield import samplers
from teegpu.tee.shield.samplers import SIGMA, Stream, gaussian, ternary

COUNT = 400_000


def pmf(k: int) -> float:
    total = sum(math.exp(-(j**2) / (2 * SIGMA**2)) for j in range(-96, 97))
    return math.exp(-(k**2) / (2 * SIGMA**2)) / total


def test_gaussian_moments() -> None:
    values = gaussian(Stream(bytes(32)), 1000, COUNT // 1000).to(torch.float64).flatten()
    deviation = 1 / math.sqrt(COUNT)
    assert abs(float(values.mean())) < 4 * SIGMA * deviation
    assert abs(float(values.var()) / SIGMA**2 - 1) < 4 * math.sqrt(2) * deviation
    assert abs(float((values**3).mean())) / SIGMA**3 < 4 * math.sqrt(15) * deviation
    assert abs(float((values**4).mean()) / SIGMA**4 - 3) < 4 * math.sqrt(96) * deviation
    assert int(values.abs().max()) < 8 * SIGMA


def test_gaussian_frequencies() -> None:
    values = gaussian(Stream(bytes(31) + b"1"), 1, COUNT).flatten()
    inner = range(-24, 25)
    expected = [COUNT * pmf(k) for k in inner]
    seen = [int((values == k).sum()) for k in inner]
    chi_squared = sum((s - e) ** 2 / e for s, e in zip(seen, expected, strict=True))
    assert chi_squared < 49 + 4 * math.sqrt(98)


class Given:
    """A stream of bytes that were chosen: 16 bits first, then the 48 bits for those that are not sure."""

    def __init__(self, *parts: bytes) -> None:
        self._parts = list(parts)

    def take(self, count: int) -> np.ndarray:
        part = self._parts.pop(0)
        assert len(part) == count
        return np.frombuffer(part, dtype=np.uint8).copy()


def test_the_table_and_the_thresholds_agree() -> None:
    """At both sides of each border between two values, the value is the one that 64 bits decide."""
    _, thresholds = samplers._gaussian_tables()
    for number, border in enumerate(thresholds.tolist()):
        if border in (0, 2**64 - 1):
            continue
        for whole, expected in ((border - 1, number), (border, number + 1)):
            low = (whole & (2**48 - 1)).to_bytes(6, "little")
            drawn = Given((whole >> 48).to_bytes(2, "little"), low)
            value = int(gaussian(drawn, 1, 1)[0, 0])  # type: ignore[arg-type]
            # Borders may coincide far out, where a value has less than 2**-64.
            assert thresholds[value + 96 - 1] <= whole < (thresholds[value + 96] if value < 96 else 2**64)
            assert value + 96 >= expected or thresholds[expected - 1] == border


def test_the_tables_are_the_distribution() -> None:
    table, thresholds = samplers._gaussian_tables()
    cumulated = 0.0
    for k in range(-40, 41):
        at = int(thresholds[k + 96]) / 2**64
        cumulated = sum(pmf(j) for j in range(-96, k + 1))
        assert abs(at - cumulated) < 1e-14
    assert (table == samplers._UNSURE).mean() < 0.002


def test_ternary_is_even() -> None:
    values = ternary(Stream(bytes(32)), 100, COUNT // 100).flatten()
    seen = torch.bincount((values + 1).to(torch.int64), minlength=3).to(torch.float64)
    assert seen.sum() == COUNT
    assert (seen - COUNT / 3).abs().max() < 4.5 * math.sqrt(COUNT * 2 / 9)
    pairs = torch.bincount(((values[:-1] + 1) * 3 + values[1:] + 1).to(torch.int64), minlength=9)
    assert (pairs - COUNT / 9).abs().max() < 4.5 * math.sqrt(COUNT / 9)


def test_ternary_draws_again_where_it_has_to() -> None:
    rejected = bytes([243, 255] * 40)
    drawn = Given(rejected[:64], bytes([0] * 64))
    assert ternary(drawn, 1, 3).tolist() == [[-1, -1, -1]]  # type: ignore[arg-type]


def test_streams_differ() -> None:
    one, other = Stream(), Stream()
    assert not np.array_equal(one.take(32), other.take(32))
    again = Stream(bytes(32))
    first, second = again.take(32), again.take(32)
    assert not np.array_equal(first, second)
    assert np.array_equal(np.concatenate([first, second]), Stream(bytes(32)).take(64))

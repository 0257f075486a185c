from __future__ import annotations

import math

import pytest
import torch

from teegpu import ring
from teegpu.tee.shield import fixedpoint, wholeverify
from teegpu.tee.shield.wholeverify import WholeKeys

PRODUCT = ("w",)
OUT, IN, ROWS = 48, 40, 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fixed(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Values as the fixed point makes them: their products with 8 bits stay below 2**31."""
    return torch.randint(-(2**17), 2**17, (rows, columns), generator=generator(seed)).to(torch.int32)


def keys_of(weight: torch.Tensor, checks: int, seed: bytes = bytes(range(32))) -> WholeKeys:
    folded = wholeverify.fold(weight, wholeverify.whole_vectors(seed, weight.shape[0], checks))
    return WholeKeys(seed, checks, {PRODUCT: folded}, {PRODUCT: weight.shape[0]})


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randint(-127, 128, (OUT, IN), generator=generator(1)).to(torch.int8)


def test_what_is_right_passes(weight: torch.Tensor) -> None:
    keys = keys_of(weight, 40)
    for seed in range(20):
        sent = fixed(ROWS, IN, seed)
        assert keys.wrong_rows(PRODUCT, sent, ring.RingMatrix(weight).product(sent)) == []


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_counts(weight: torch.Tensor, bit: int) -> None:
    keys, sent = keys_of(weight, 40), fixed(100, IN, 3)
    received = ring.RingMatrix(weight).product(sent)
    for number, column in enumerate((0, 17, OUT - 1)):
        wrong = received.clone()
        wrong[number + 5, column] ^= -(2**31) if bit == 31 else 1 << bit
        assert keys.wrong_rows(PRODUCT, sent, wrong) == [number + 5]


def test_errors_that_cancel_each_other_out_are_caught(weight: torch.Tensor) -> None:
    keys, sent = keys_of(weight, 40), fixed(ROWS, IN, 3)
    received = ring.RingMatrix(weight).product(sent)
    for shift in range(1, OUT):
        wrong = received.clone()
        wrong[2, 0] += 1 << 20
        wrong[2, shift] -= 1 << 20
        assert keys.wrong_rows(PRODUCT, sent, wrong) == [2]


def test_one_bit_catches_half_of_what_is_hardest_to_see(weight: torch.Tensor) -> None:
    """So the bound of 2**-k is met. An error in one value alone is seen unless the vector's value there is zero."""
    sent = fixed(1, IN, 3)
    wrong = ring.RingMatrix(weight).product(sent)
    wrong[0, 5] += 3
    caught = {1: 0, 3: 0}
    for number in range(900):
        for checks in caught:
            caught[checks] += bool(keys_of(weight, checks, number.to_bytes(32, "big")).wrong_rows(PRODUCT, sent, wrong))
    assert 0.44 < caught[1] / 900 < 0.56  # 3.6 standard deviations
    assert 0.83 < caught[3] / 900 < 0.92


@pytest.mark.parametrize("length", [1, 2, 48, 576, 960, 3072, 4096, 4097, 49_152, 152_064, 2**20])
@pytest.mark.parametrize("checks", [1, 8, 40, 64])
def test_bits_suffice_and_no_sum_is_rounded(length: int, checks: int) -> None:
    count, bits = wholeverify.bits_of(length, checks)
    assert count * bits >= checks
    assert length * 2**31 * 2 ** (bits - 1) <= 2**53
    # S·W has 29 bits, and sums of the runner's own values with its halves, of 14 bits each, are exact too
    assert length * 2 ** (bits - 1) * 127 < 2**29
    assert wholeverify.MOST_COLUMNS * fixedpoint.MOST * 2**14 <= 2**52


def test_products_too_long_to_be_exact_are_refused() -> None:
    with pytest.raises(ValueError, match="beyond what float64 holds"):
        wholeverify.bits_of(2**23, 40)
    with pytest.raises(ValueError, match="can't be checked"):
        wholeverify.fold(torch.zeros((1, 2**17), dtype=torch.int8), torch.zeros((1, 1), dtype=torch.float64))


def test_extremes_are_exact() -> None:
    """The largest values there can be, of which every sum is at the edge of what float64 holds."""
    weight = torch.full((3072, 600), 127, dtype=torch.int8)
    weight[::3] = -127
    keys = keys_of(weight, 40)
    for value in (-fixedpoint.MOST, fixedpoint.MOST):
        sent = torch.zeros((2, 600), dtype=torch.int32)
        sent[:, :2] = value
        received = ring.RingMatrix(weight).product(sent)
        assert keys.wrong_rows(PRODUCT, sent, received) == []
        for lie in (-(2**31), 2**31 - 1):
            assert keys.wrong_rows(PRODUCT, sent, torch.full_like(received, lie)) == [0, 1]
        received[1, 7] += 1
        assert keys.wrong_rows(PRODUCT, sent, received) == [1]


def test_sums_are_those_of_whole_numbers() -> None:
    weight = torch.randint(-127, 128, (1000, 70), generator=generator(4)).to(torch.int8)
    chosen = wholeverify.whole_vectors(bytes(32), 1000, 40)
    expected = weight.to(torch.int64).t() @ chosen.to(torch.int64)
    assert torch.equal(wholeverify.fold(weight, chosen).to(torch.int64), expected)
    halves = wholeverify._halves(wholeverify.fold(weight, chosen))
    high, low = halves.chunk(2, dim=-1)
    assert torch.equal((high + low).to(torch.int64), expected)
    assert float(low.abs().max()) <= 2**14
    assert float((high / 2**15).abs().max()) <= 2**14


def test_folding_is_exact_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randint(-127, 128, (50, 9), generator=generator(4)).to(torch.int8)
    chosen = wholeverify.whole_vectors(bytes(32), 50, 40)
    whole = wholeverify.fold(weight, chosen)
    monkeypatch.setattr(wholeverify, "_FOLD_VALUES", 70)
    assert torch.equal(wholeverify.fold(weight, chosen), whole)


def test_vectors_are_uniform() -> None:
    drawn = wholeverify.whole_vectors(bytes(32), 4096, 40)
    count, bits = wholeverify.bits_of(4096, 40)
    assert drawn.shape == (4096, count)
    assert set(drawn.unique().tolist()) == set(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    least = 4096 * count / 2**bits
    frequencies = torch.bincount((drawn.flatten() + 2 ** (bits - 1)).to(torch.int64))
    assert float((frequencies - least).abs().max()) < 6 * math.sqrt(least)
    assert not torch.equal(drawn, wholeverify.whole_vectors(bytes(31) + b"1", 4096, 40))


def test_nothing_is_said_of_what_is_not_finite(weight: torch.Tensor) -> None:
    """Its whole numbers are larger than any, and products of them wrap."""
    keys, sent = keys_of(weight, 40), fixed(3, IN, 3)
    sent[1] = 2**30
    received = ring.RingMatrix(weight).product(sent)
    assert keys.wrong_rows(PRODUCT, sent, received) == []
    received[2, 0] += 1
    assert keys.wrong_rows(PRODUCT, sent, received) == [2]

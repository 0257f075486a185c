from __future__ import annotations

import math

import pytest
import torch

from teegpu import ring
from teegpu.shield import fixedpoint, freivalds
from teegpu.shield.freivalds import Checks
from teegpu.shield.quantised import Measure

LINEAR = ("w",)
OUT, IN, ROWS = 48, 40, 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fixed(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Values as the fixed point makes them: their products with 8 bits stay below 2**31."""
    return torch.randint(-(2**17), 2**17, (rows, columns), generator=generator(seed)).to(torch.int32)


def checks_of(weight: torch.Tensor, bits: int) -> Checks:
    checks = Checks(bits, lambda reader: reader(LINEAR, weight, torch.ones(weight.shape[0])))
    checks.add(LINEAR, weight, torch.ones(weight.shape[0]))
    return checks


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randint(-127, 128, (OUT, IN), generator=generator(1)).to(torch.int8)


def test_what_is_right_passes(weight: torch.Tensor) -> None:
    checks = checks_of(weight, 40)
    for seed in range(20):
        sent = fixed(ROWS, IN, seed)
        assert checks.prepare(LINEAR, sent)(ring.RingMatrix(weight).product(sent)) == []


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_counts(weight: torch.Tensor, bit: int) -> None:
    checks, sent = checks_of(weight, 40), fixed(100, IN, 3)
    received = ring.RingMatrix(weight).product(sent)
    for number, column in enumerate((0, 17, OUT - 1)):
        wrong = received.clone()
        wrong[number + 5, column] ^= -(2**31) if bit == 31 else 1 << bit
        assert checks.prepare(LINEAR, sent)(wrong) == [number + 5]


def test_rows_are_found_in_each_block_and_on_each_thread() -> None:
    weight = torch.randint(-127, 128, (1500, 900), generator=generator(1)).to(torch.int8)
    checks, sent = checks_of(weight, 40), torch.randint(-1000, 1000, (300, 900), generator=generator(2)).int()
    received = ring.RingMatrix(weight).product(sent)
    torch.set_num_threads(3)
    assert checks.prepare(LINEAR, sent)(received) == []
    lies = [0, 42, 43, 44, 99, 100, 199, 200, 299]
    received[lies, torch.arange(len(lies)) * 180] += 1
    assert checks.prepare(LINEAR, sent)(received) == lies


def test_errors_that_cancel_each_other_out_are_caught(weight: torch.Tensor) -> None:
    checks, sent = checks_of(weight, 40), fixed(ROWS, IN, 3)
    received = ring.RingMatrix(weight).product(sent)
    for shift in range(1, OUT):
        wrong = received.clone()
        wrong[2, 0] += 1 << 20
        wrong[2, shift] -= 1 << 20
        assert checks.prepare(LINEAR, sent)(wrong) == [2]


def test_one_bit_catches_half_of_what_is_hardest_to_see(weight: torch.Tensor) -> None:
    """So the bound of 2**-k is met. An error in one value alone is seen unless the vector's value there is zero."""
    sent = fixed(1, IN, 3)
    wrong = ring.RingMatrix(weight).product(sent)
    wrong[0, 5] += 3
    caught = {1: 0, 3: 0}
    for _ in range(900):
        for checks in caught:
            caught[checks] += bool(checks_of(weight, checks).prepare(LINEAR, sent)(wrong))
    assert 0.416 < caught[1] / 900 < 0.584  # 5 standard deviations
    assert 0.82 < caught[3] / 900 < 0.93


@pytest.mark.parametrize("length", [1, 2, 48, 576, 960, 3072, 4096, 4097, 49_152, 152_064, 2**20])
@pytest.mark.parametrize("checks", [1, 8, 40, 64])
def test_bits_suffice_and_no_sum_is_rounded(length: int, checks: int) -> None:
    count, bits = freivalds.bits_of(length, checks)
    assert count * bits >= checks
    assert 2**7 * 2 ** (bits - 1) <= 2**24
    assert length * 2**31 * 2 ** (bits - 1) <= 2**53


def test_products_too_long_to_be_exact_are_refused() -> None:
    with pytest.raises(ValueError, match="beyond what float64 holds"):
        freivalds.bits_of(2**23, 40)


def test_extremes_are_exact() -> None:
    """The largest values there can be, of which every sum is at the edge of what float64 holds."""
    weight = torch.full((3072, 600), 127, dtype=torch.int8)
    weight[::3] = -127
    checks = checks_of(weight, 40)
    for value in (-fixedpoint.MOST, fixedpoint.MOST):
        sent = torch.zeros((2, 600), dtype=torch.int32)
        sent[:, :2] = value
        received = ring.RingMatrix(weight).product(sent)
        assert checks.prepare(LINEAR, sent)(received) == []
        for lie in (-(2**31), 2**31 - 1):
            assert checks.prepare(LINEAR, sent)(torch.full_like(received, lie)) == [0, 1]
        received[1, 7] += 1
        assert checks.prepare(LINEAR, sent)(received) == [1]


def test_sums_are_those_of_whole_numbers() -> None:
    weight = torch.randint(-127, 128, (1000, 70), generator=generator(4)).to(torch.int8)
    chosen = freivalds.vectors(bytes(32), 1000, 40)
    expected = chosen.to(torch.int64) @ weight.to(torch.int64)
    assert torch.equal(freivalds.fold(weight, chosen).to(torch.int64), expected)


@pytest.mark.parametrize(("rows", "columns"), [(8192, 1), (8192, 300), (4096, 8192), (48, 70_000)])
def test_sums_on_the_runners_side_are_exact_at_the_edge(rows: int, columns: int) -> None:
    """Vectors, weights and a token that all are as large as they can be, and in line: no sum could be larger."""
    weight = torch.full((rows, columns), 127, dtype=torch.int8)
    measure = Measure(LINEAR, columns, rows, torch.ones(rows), 127.0 * columns**0.5)
    sent, _ = fixedpoint.encode(torch.cat([torch.full((1, columns), 3.7), torch.full((1, columns), -1.0)]), measure)
    count, bits = freivalds.bits_of(rows, 40)
    folded = freivalds.fold(weight, torch.full((count, rows), -(2.0 ** (bits - 1)), dtype=torch.float64))
    found = freivalds._product(sent, folded.numpy())
    for row, values in enumerate(sent.tolist()):
        assert found[row].tolist() == [-(2 ** (bits - 1)) * 127 * rows * sum(values)] * count
    assert 2**51 < abs(found).max() <= 2**53 or columns == 1 or rows == 48


@pytest.mark.parametrize(("bits", "length"), [(1, 3000), (7, 49_152), (10, 3000), (16, 64)])
def test_folding_is_exact_at_the_extremes(bits: int, length: int) -> None:
    weight = torch.full((length, 9), -127, dtype=torch.int8)
    weight[:, ::2] = 127
    weight[::7, 1::3] = 1
    chosen = torch.full((3, length), float(-(2 ** (bits - 1))), dtype=torch.float64)
    chosen[:, ::3] = 2.0 ** (bits - 1) - 1
    expected = chosen.to(torch.int64) @ weight.to(torch.int64)
    assert torch.equal(freivalds.fold(weight, chosen).to(torch.int64), expected)


def test_vectors_are_uniform() -> None:
    drawn = freivalds.vectors(bytes(32), 4096, 40)
    count, bits = freivalds.bits_of(4096, 40)
    assert drawn.shape == (count, 4096)
    assert set(drawn.unique().tolist()) == set(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    least = 4096 * count / 2**bits
    frequencies = torch.bincount((drawn.flatten() + 2 ** (bits - 1)).to(torch.int64))
    assert float((frequencies - least).abs().max()) < 6 * math.sqrt(least)
    assert not torch.equal(drawn, freivalds.vectors(bytes(31) + b"1", 4096, 40))


def test_what_is_not_finite_or_nothing_is_checked_as_all_else(weight: torch.Tensor) -> None:
    """Its whole numbers are zeros, and so must its products be: no row is exempt."""
    checks = checks_of(weight, 40)
    measure = Measure(LINEAR, IN, OUT, torch.ones(OUT), 127.0 * IN**0.5)
    x = torch.randn(5, IN, generator=generator(2))
    x[0, 3], x[1, 0], x[2], x[3] = float("nan"), float("inf"), 1e-30, 1e-44
    sent, _ = fixedpoint.encode(x, measure)
    received = ring.RingMatrix(weight).product(sent)
    assert not received[:4].any()
    assert checks.prepare(LINEAR, sent)(received) == []
    for row in range(4):
        wrong = received.clone()
        wrong[row, 7] = 12345
        assert checks.prepare(LINEAR, sent)(wrong) == [row]


def test_vectors_that_found_a_lie_are_not_used_again_and_no_others_are_the_same(weight: torch.Tensor) -> None:
    checks, sent = checks_of(weight, 40), fixed(2, IN, 3)
    received = ring.RingMatrix(weight).product(sent)
    seen = [checks._seed]
    assert checks.prepare(LINEAR, sent)(received) == []
    assert checks._seed == seen[0]
    for _ in range(3):
        wrong = received.clone()
        wrong[1, 0] += 1
        assert checks.prepare(LINEAR, sent)(wrong) == [1]
        assert checks.prepare(LINEAR, sent)(received) == []  # with others, drawn meanwhile
        seen.append(checks._seed)
    assert checks_of(weight, 40)._seed not in seen
    assert len(set(seen)) == 4


def test_what_is_not_of_the_model_is_no_product(weight: torch.Tensor) -> None:
    with pytest.raises(KeyError):
        checks_of(weight, 40).prepare(("other",), fixed(1, IN, 1))(fixed(1, OUT, 1))

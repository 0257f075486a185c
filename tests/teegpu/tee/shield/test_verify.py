from __future__ import annotations

import pytest
import torch

from teegpu import ring
from teegpu.tee.shield import verify
from teegpu.tee.shield.verify import Keys

PRODUCT = ("w",)
OUT, IN, ROWS = 48, 40, 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (rows, columns), generator=generator(seed)).to(torch.int32)


def keys_of(weight: torch.Tensor, checks: int, seed: bytes = bytes(range(32))) -> Keys:
    folded = verify.fold(weight, verify.vectors(seed, weight.shape[0], checks).to(torch.float32))
    return Keys(seed, checks, {PRODUCT: folded}, weight.shape[0])


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randint(-127, 128, (OUT, IN), generator=generator(1)).to(torch.int8)


def cheats(honest: torch.Tensor, earlier: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Answers that a server might give in place of ``honest``, none of them equal to it."""
    draw = generator(7)
    made = []
    for number in range(count):
        row, column = (int(torch.randint(0, size, (), generator=draw)) for size in honest.shape)
        wrong = honest.clone()
        match number % 6:
            case 0:  # one bit
                bit = int(torch.randint(0, 32, (), generator=draw))
                wrong[row, column] ^= -(2**31) if bit == 31 else 1 << bit
            case 1:  # the error that is hardest to see modulo 2**32
                wrong[row, column] ^= -(2**31)
            case 2:
                wrong[row] = 0
            case 3:
                wrong[[row, (row + 1) % ROWS]] = wrong[[(row + 1) % ROWS, row]]
            case 4:
                wrong[row] = earlier[row]
            case _:  # two errors that cancel each other out in a sum
                wrong[row, column] += 1 << 20
                wrong[row, (column + 1) % OUT] -= 1 << 20
        made.append(wrong)
    return made


def test_what_is_right_passes(weight: torch.Tensor) -> None:
    keys = keys_of(weight, 40)
    for seed in range(20):
        sent = uniform(ROWS, IN, seed)
        assert keys.wrong_rows(PRODUCT, sent, ring.RingMatrix(weight).product(sent)) == []


def test_every_cheat_of_thousands_is_caught(weight: torch.Tensor) -> None:
    keys = keys_of(weight, 40)
    sent = uniform(ROWS, IN, 3)
    honest = ring.RingMatrix(weight).product(sent)
    earlier = ring.RingMatrix(weight).product(uniform(ROWS, IN, 4))
    for wrong in cheats(honest, earlier, 3000):
        expected = (wrong != honest).any(-1).nonzero().flatten().tolist()
        assert expected
        assert keys.wrong_rows(PRODUCT, sent, wrong) == expected


def test_one_check_catches_half_of_what_is_hardest_to_see(weight: torch.Tensor) -> None:
    """So the bound of 2**-k is met, and not by accident undercut by weaker cheats."""
    sent = uniform(ROWS, IN, 3)
    honest = ring.RingMatrix(weight).product(sent)
    wrongs = [wrong for number, wrong in enumerate(cheats(honest, honest.flip(0), 60)) if number % 6 in (0, 1, 5)]
    caught = {1: 0, 3: 0}
    for number in range(900):
        for checks in caught:
            keys = keys_of(weight, checks, number.to_bytes(32, "big"))
            caught[checks] += bool(keys.wrong_rows(PRODUCT, sent, wrongs[number % len(wrongs)]))
    assert 0.44 < caught[1] / 900 < 0.56  # 3.6 standard deviations
    assert 0.83 < caught[3] / 900 < 0.92


def test_it_works_on_many_rows_and_names_the_wrong_ones(weight: torch.Tensor) -> None:
    keys = keys_of(weight, 40)
    sent = uniform(100, IN, 5)
    received = ring.RingMatrix(weight).product(sent)
    received[17, 3] += 1
    received[99, 0] ^= -(2**31)
    assert keys.wrong_rows(PRODUCT, sent, received) == [17, 99]


def test_extremes_are_exact() -> None:
    """Sums far beyond 2**53, which float64 would round."""
    columns = 400
    weight = torch.full((1200, columns), 127, dtype=torch.int8)
    weight[::3] = -1
    keys = keys_of(weight, 8)
    chosen = verify.vectors(bytes(range(32)), 1200, 8)
    for value in (-(2**31), 2**31 - 1, -1, 65535):
        sent = torch.full((2, columns), value, dtype=torch.int32)
        received = ring.RingMatrix(weight).product(sent)
        assert keys.wrong_rows(PRODUCT, sent, received) == []
        received[1, 7] += 1
        assert keys.wrong_rows(PRODUCT, sent, received) == ([1] if chosen[7].any() else [])


def test_folding_is_exact_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_EXACT_FLOAT_ROWS", 7)
    weight = torch.randint(-127, 128, (50, 9), generator=generator(4)).to(torch.int8)
    chosen = verify.vectors(bytes(32), 60, 5)
    expected = (chosen[:50].to(torch.int64).t() @ weight.to(torch.int64)).t()
    assert torch.equal(verify.fold(weight, chosen.to(torch.float32)), expected.to(torch.int32))


def test_vectors_are_even(weight: torch.Tensor) -> None:
    drawn = verify.vectors(bytes(32), 2000, 40).to(torch.float64)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert abs(float(drawn.mean()) - 0.5) < 0.01
    correlation = torch.corrcoef(drawn.t()) - torch.eye(40, dtype=torch.float64)
    assert float(correlation.abs().max()) < 0.12

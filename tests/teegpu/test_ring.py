from __future__ import annotations

import numpy as np
import pytest
import torch

from teegpu import ring


def exact(operand: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = operand.numpy().astype(object) @ weight.numpy().astype(object).T
    return torch.from_numpy(np.array([[int(v) % 2**32 for v in row] for row in wide], dtype=np.uint32).view(np.int32))


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_products_are_exact(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randint(-127, 128, (17, 70), dtype=torch.int8, generator=generator)
    operand = torch.randint(-(2**31), 2**31, (rows, 70), generator=generator).to(torch.int32)
    assert torch.equal(ring.RingMatrix(weight).product(operand), exact(operand, weight))


def test_a_row_of_extremes_does_not_round(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = ring._EXACT_COLUMNS + 3  # also cut into two
    weight = torch.full((2, columns), 127, dtype=torch.int8)
    weight[1] = -127
    operand = torch.full((1, columns), -(2**31), dtype=torch.int32)
    operand[0, 0] = 2**31 - 1
    total = 127 * (2**31 - 1 - 2**31 * (columns - 1))
    expected = [total % 2**32, -total % 2**32]
    assert [int(v) % 2**32 for v in ring.RingMatrix(weight).product(operand)[0]] == expected


def test_the_quantiser_keeps_half_a_step() -> None:
    weight = torch.randn(9, 40, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    quantised, scale = ring.quantise(weight)
    assert quantised.dtype == torch.int8
    assert int(quantised.abs().max()) == 127
    assert float(scale[3]) == 1.0
    assert ((quantised * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


def test_a_seed_gives_one_stream() -> None:
    seed = bytes(range(32))
    values = ring.expand(seed, 3, 5)
    assert values.dtype == torch.int32
    assert torch.equal(values.flatten()[:10], ring.expand(seed, 2, 5).flatten())
    assert not torch.equal(values, ring.expand(bytes(32), 3, 5))
    # AES-256 of the all-zero block under this key, from FIPS 197's cipher by an independent tool
    assert ring.expand(bytes(32), 1, 4).numpy().tobytes().hex() == "dc95c078a2408989ad48a21492842087"


def test_a_short_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="key"):
        ring.expand(b"short", 1, 1)


def test_the_digest_covers_weight_and_scale() -> None:
    weight, scale = ring.quantise(torch.randn(4, 8))
    known = ring.digest(weight, scale)
    assert known == ring.digest(weight.clone(), scale.clone())
    assert known != ring.digest(weight, scale * 2)

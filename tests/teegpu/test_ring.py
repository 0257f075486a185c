from __future__ import annotations

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

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


@pytest.mark.parametrize("roomy", [False, True])
@pytest.mark.parametrize("rows", [1, 17, 70])
def test_parts_are_those_of_the_whole(rows: int, roomy: bool) -> None:
    weight = torch.randint(-127, 128, (40, 33), dtype=torch.int8, generator=torch.Generator().manual_seed(5))
    matrix = ring.RingMatrix(weight, roomy=roomy)
    assert matrix.shape == (40, 33)
    assert matrix.nbytes in ({weight.numel()} if not roomy else {n * weight.numel() for n in (1, 4, 5)})
    operand = ring.expand(bytes(32), rows, 33)
    whole = exact(operand, weight)
    assert torch.equal(matrix.product(operand), whole)
    part = matrix.rows(7, 9)
    assert part.shape == (2, 33)
    assert torch.equal(part.product(operand), whole[:, 7:9])


@pytest.mark.parametrize(
    "weight", [torch.ones(2, 2), torch.ones(2, dtype=torch.int8), torch.ones((0, 2), dtype=torch.int8)]
)
def test_only_int8_matrices_are_ring_matrices(weight: torch.Tensor) -> None:
    with pytest.raises(TypeError, match="int8"):
        ring.RingMatrix(weight)


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
    whole = (
        Cipher(algorithms.AES256(bytes(32)), modes.CTR(bytes(16))).encryptor().update(bytes(4 * 5 * 30_001))
    )  # longer than what is encrypted at once, and no multiple of it
    assert ring.expand(bytes(32), 5, 30_001).numpy().tobytes() == whole
    assert ring.expand(bytes(32), 2, 30_001, first=3).numpy().tobytes() == whole[4 * 3 * 30_001 :]
    assert ring.expand(bytes(32), 1, 4).numpy().tobytes().hex() == "dc95c078a2408989ad48a21492842087"


@pytest.mark.parametrize(("rows", "columns", "first"), [(1, 7, 0), (3, 5, 2), (700, 1023, 0), (700, 1023, 3)])
def test_threads_and_what_is_added_change_nothing_of_a_stream(rows: int, columns: int, first: int) -> None:
    whole = ring.expand(bytes(32), first + rows, columns)[first:]
    values = torch.randint(-(2**31), 2**31, (rows, columns), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    torch.set_num_threads(3)
    assert torch.equal(ring.expand(bytes(32), rows, columns, first=first), whole)
    found = ring.expand(bytes(32), rows, columns, first=first, plus=values)
    assert torch.equal(found, ring.wrap(whole.to(torch.float64) + values.to(torch.float64)))
    assert torch.equal(found, ring.add(values, whole))
    assert torch.equal(ring.subtract(found, values), whole)


def test_a_short_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="key"):
        ring.expand(b"short", 1, 1)


def test_the_digest_covers_weight_and_scale() -> None:
    weight, scale = ring.quantise(torch.randn(4, 8))
    known = ring.digest(weight, scale)
    assert known == ring.digest(weight.clone(), scale.clone())
    assert known != ring.digest(weight, scale * 2)

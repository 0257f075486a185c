from __future__ import annotations

import pytest
import torch

from teegpu import ring
from teegpu.tee.shield import wrapping


@pytest.mark.parametrize("wraps", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_products_of_int32_are_exact(monkeypatch: pytest.MonkeyPatch, wraps: bool, rows: int) -> None:
    """Whatever way they are computed."""
    monkeypatch.setattr(wrapping, "wraps", lambda: wraps)
    inner = 2100 if rows == 7 else 50
    left = ring.expand(bytes(32), rows, inner)
    left[0] = -(2**31)
    right = ring.expand(bytes(31) + b"1", inner, 9)
    right[:, 0] = -(2**31)
    right[:, 1] = 2**31 - 1
    product = wrapping.multiply(left, right)
    for row, column in ((0, 0), (0, 1), (rows - 1, 8), (rows - 1, 1)):
        pairs = zip(left[row].tolist(), right[:, column].tolist(), strict=True)
        assert int(product[row, column]) % 2**32 == sum(a * b for a, b in pairs) % 2**32


def test_torch_is_looked_at_before_it_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(wrapping.wraps(), bool)
    probe = wrapping.wraps.__wrapped__
    matmul = torch.Tensor.__matmul__

    def off_by_one(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = matmul(left, right)
        return product + 1 if product.dtype == torch.int32 and left.shape[0] == 64 else product

    monkeypatch.setattr(torch.Tensor, "__matmul__", off_by_one)
    assert probe() is False

"""The quick layout against torch's own product."""

from __future__ import annotations

import pytest
import torch

from teegpu import kernels
from teegpu.kernels import Matrix, convert

SHAPES = [(960, 576), (7, 5), (1, 3), (64, 1)]


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)])
def test_products_are_those_of_torch(dtype: torch.dtype, bound: float, shape: tuple[int, int], rows: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(shape).to(dtype), torch.randn(rows, shape[1]).to(dtype)
    want = x.float() @ weight.float().T
    got = Matrix(weight).product(x)
    assert got.dtype == dtype
    assert float((got.float() - want).abs().max() / want.abs().max().clamp_min(1.0)) < bound


def test_a_strided_input_is_taken_as_it_is_meant() -> None:
    weight, wide = torch.randn(4, 6), torch.randn(3, 12)
    torch.testing.assert_close(Matrix(weight).product(wide[:, 3:9]), wide[:, 3:9] @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_come_back_exactly(dtype: torch.dtype) -> None:
    weight = torch.randn(50, 20).to(dtype)
    matrix = Matrix(weight)
    assert torch.equal(matrix.rows(0, 50), weight)
    assert torch.equal(matrix.rows(13, 29), weight[13:29])
    assert matrix.nbytes == weight.nbytes
    assert matrix.shape == (50, 20)


def test_without_the_operators_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_packable", lambda _: False)
    weight, x = torch.randn(8, 4), torch.randn(2, 4)
    matrix = Matrix(weight)
    assert matrix.rows(0, 8).data_ptr() == weight.data_ptr()
    torch.testing.assert_close(matrix.product(x), x @ weight.T)


@pytest.mark.parametrize("size", [10, 5000])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_conversion_rounds_as_torch_does(source: torch.dtype, target: torch.dtype, size: int) -> None:
    values = torch.cat((torch.randn(size) * 10, torch.tensor([0.0, -0.0, 65504.0, 1e-7, 3e38, float("inf")]))).to(
        source
    )
    assert torch.equal(convert(values, target), values.to(target))
    if source == target:
        assert convert(values, target) is values

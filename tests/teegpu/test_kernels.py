"""The quick layout against torch's own product."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from teegpu import kernels
from teegpu.kernels import Int8Matrix, Matrix, convert

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


# ---- int8 weights


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Up to 16 rows are multiplied with int8 weights, quick or not, where that is right."""
    monkeypatch.setattr(kernels, "int8_rows", lambda _: 16)
    kernels._right.cache_clear()
    yield
    kernels._right.cache_clear()


def int8_weight(outputs: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and the values that they stand for."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-128, 128, (outputs, columns), generator=generator).to(torch.int8)
    scale = torch.rand(outputs, generator=generator) / 100 + 0.001
    return codes, scale, codes * scale[:, None]


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-2), (torch.bfloat16, 2e-2)])
def test_products_with_int8_weights_are_those_of_their_values(
    dtype: torch.dtype, bound: float, shape: tuple[int, int], rows: int, few: None
) -> None:
    codes, scale, values = int8_weight(*shape)
    x = torch.randn(rows, shape[1]).to(dtype)
    matrix = Int8Matrix(codes, scale, dtype)
    got, want = matrix.product(x), x.float() @ values.T
    assert got.dtype == dtype
    assert float((got.float() - want).abs().max() / (x.float().abs() @ values.abs().T).max()) < bound
    if dtype == torch.float32 and rows > 16:
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert torch.equal(matrix.part(0, shape[0] // 2 + 1).product(x), got[:, : shape[0] // 2 + 1]) or rows > 16
    assert matrix.nbytes == codes.numel() * kernels.matrix_bytes(dtype, int8=True)


def off_by_one(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    found = torch.nn.functional.linear(x.float(), codes.float()).to(torch.bfloat16)
    found[-1, -1] += 1
    return found


def in_few_bits(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Sums that are rounded on the way."""
    halves = torch.nn.functional.linear(x[:, ::2].float(), codes[:, ::2].float()).to(torch.bfloat16)
    return halves + torch.nn.functional.linear(x[:, 1::2].float(), codes[:, 1::2].float()).to(torch.bfloat16)


def not_here(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError


@pytest.mark.parametrize("kernel", [off_by_one, in_few_bits, not_here, None])
def test_a_kernel_that_is_not_right_here_is_not_used(
    kernel: Callable[..., torch.Tensor] | None, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_int8_product", kernel)
    codes, scale, values = int8_weight(48, 64)
    x = torch.randn(3, 64)
    torch.testing.assert_close(Int8Matrix(codes, scale, torch.float32).product(x), x @ values.T)


def test_an_honest_kernel_is_used(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def honest(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        asked.append(x.shape[0])
        return torch.nn.functional.linear(x.float(), codes.float()).to(torch.bfloat16)

    monkeypatch.setattr(kernels, "_int8_product", honest)
    codes, scale, _ = int8_weight(48, 64)
    matrix = Int8Matrix(codes, scale, torch.float32)
    for rows in (3, 3, 17):
        matrix.product(torch.randn(rows, 64))
    assert asked == [3, 3, 3]  # once to see whether it is right, then twice; never for 17


@pytest.mark.parametrize(("until", "rows"), [(0, 0), (1, 1), (4, 4), (99, 16)])
def test_int8_weights_are_used_as_far_as_they_are_quicker(
    until: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(product: Callable[..., torch.Tensor], *operands: torch.Tensor) -> float:
        int8 = len(operands) == 3
        return 2.0 if not int8 else 1.0 if operands[0].shape[0] <= until else 3.0

    monkeypatch.setattr(kernels, "_seconds", seconds)
    monkeypatch.setattr(kernels, "_PROBE", 64)
    kernels._int8_rows.cache_clear()
    try:
        assert kernels.int8_rows(torch.float32) == rows
    finally:
        kernels._int8_rows.cache_clear()


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

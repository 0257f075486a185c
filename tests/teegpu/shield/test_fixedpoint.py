from __future__ import annotations

import numpy as np
import pytest
import torch

from teegpu import ring
from teegpu.shield import fixedpoint
from teegpu.shield.quantised import Measure


def measured(weight: torch.Tensor) -> tuple[torch.Tensor, Measure]:
    int8, scale = ring.quantise(weight)
    largest = float(int8.to(torch.float64).square().sum(-1).max().sqrt())
    return int8, Measure(("w",), weight.shape[1], weight.shape[0], scale, largest)


def test_a_product_comes_back() -> None:
    generator = torch.Generator().manual_seed(3)
    int8, measure = measured(torch.randn(48, 200, generator=generator))
    x = torch.randn(7, 200, generator=generator) * torch.logspace(-6, 6, 7)[:, None]
    x[2, 5] = 900.0 * float(x[2].abs().max())  # a massive activation
    whole, step = fixedpoint.encode(x, measure)
    assert whole.dtype == torch.int32
    # half a step, and what float32 loses of a value of 22 bits
    assert ((whole * step.to(torch.float64) - x).abs() <= step).all()
    found = fixedpoint.decode(ring.RingMatrix(int8).product(whole), step, measure)
    expected = x.to(torch.float64) @ (int8.to(torch.float64) * measure.scale[:, None].to(torch.float64)).t()
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.max()) < 1e-4


@pytest.mark.parametrize("columns", [1, 8, 576, 5632])
def test_no_product_wraps_not_even_along_the_largest_row(columns: int) -> None:
    """A token that is a multiple of the matrix's longest row makes Cauchy-Schwarz an equality."""
    weight = torch.full((2, columns), 127, dtype=torch.int8)
    measure = Measure(("w",), columns, 2, torch.ones(2), 127.0 * columns**0.5)
    whole, _ = fixedpoint.encode(torch.full((1, columns), 3.7), measure)
    total = int((whole.to(torch.int64) @ weight.to(torch.int64).t()).abs().max())
    assert total < 2**31
    assert total > 2**30 or columns <= 8  # and the room is used


def test_zeros_and_tiny_rows_are_exact_or_zero() -> None:
    _, measure = measured(torch.eye(4))
    x = torch.zeros(5, 4)
    x[1, 0], x[2], x[3], x[4, 1] = 1e-42, 1e-24, 2e-23, 1e-20
    whole, step = fixedpoint.encode(x, measure)
    assert torch.isfinite(step).all()
    assert not whole[[0, 1]].any()
    # squares of these vanish in float32, and their norm is right all the same
    assert ((whole * step.to(torch.float64) - x).abs() <= step)[2:].all()
    assert int(whole.abs().max()) <= fixedpoint.MOST
    assert fixedpoint.decode(whole, step, measure)[0].eq(0).all()


@pytest.mark.parametrize("value", [3e-45, 1e-38, 1e-30, 1e-24, 2e-23, 1e-10, 1e10, 1e30])
def test_no_product_wraps_however_small_or_large_all_values_are(value: float) -> None:
    weight = torch.full((2, 4096), 127, dtype=torch.int8)
    measure = Measure(("w",), 4096, 2, torch.ones(2), 127.0 * 64)
    whole, step = fixedpoint.encode(torch.full((1, 4096), value), measure)
    assert int((whole.to(torch.int64) @ weight.to(torch.int64).t()).abs().max()) < 2**31
    assert torch.isfinite(step).all()


@pytest.mark.parametrize("columns", [4096, 2**18])
def test_no_product_wraps_in_whatever_order_squares_are_summed(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """One after the other, behind a large one, nearly all of them are lost: what a norm in float32 loses at worst."""
    x = torch.full((1, columns), 2.0**-12.1)
    x[0, 0] = 1.0
    one_by_one = np.cumsum(x.numpy() ** 2, axis=-1, dtype=np.float32)[:, -1:]
    norm = torch.from_numpy(one_by_one).sqrt()
    true = float(x.to(torch.float64).norm())
    assert float(norm) < true * (1 - columns * 2.0**-27)
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *_, **__: norm.clone())
    # The matrix's largest row is a multiple of the token: Cauchy-Schwarz is an equality.
    measure = Measure(("w",), columns, 1, torch.ones(1), 1000.0 * true)
    whole, _ = fixedpoint.encode(x, measure)
    total = float((whole.to(torch.float64) * 1000.0 * x).sum())
    assert 2**30 < total < 2**31


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value: float) -> None:
    _, measure = measured(torch.eye(4))
    x = torch.ones(2, 4)
    x[1, 2] = value
    whole, step = fixedpoint.encode(x, measure)
    assert not whole[1].any()
    found = fixedpoint.decode(whole, step, measure)
    assert torch.isfinite(found[0]).all()
    assert not torch.isfinite(found[1]).any()


def test_a_matrix_of_zeros_has_room() -> None:
    measure = Measure(("w",), 16, 4, torch.ones(4), 0.0)
    whole, step = fixedpoint.encode(torch.ones(1, 16), measure)
    assert ((whole * step - 1).abs() < 1e-5).all()


def test_a_matrix_without_room_is_an_error() -> None:
    with pytest.raises(ValueError, match="room"):
        fixedpoint.room(Measure(("w",), 2**26, 1, torch.ones(1), 2.0**31))


def test_a_row_is_the_same_whatever_is_beside_it() -> None:
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(3)) * torch.logspace(-30, 30, 40)[:, None]
    measure = Measure(("w",), 96, 1, torch.ones(1), 777.0)
    whole, step = fixedpoint.encode(x, measure)
    odd, odd_step = fixedpoint.encode(torch.cat([x, torch.full((1, 96), float("nan"))]), measure)
    assert torch.equal(odd[:-1], whole)
    assert torch.equal(odd_step[:-1], step)
    for row in range(40):
        alone, alone_step = fixedpoint.encode(x[row : row + 1], measure)
        assert torch.equal(alone, whole[row : row + 1])
        assert torch.equal(alone_step, step[row : row + 1])


def test_a_row_is_the_same_bits_alone_and_among_many_on_several_threads() -> None:
    """Also where one of them is no usual row, in its block or in another one."""
    generator = torch.Generator().manual_seed(4)
    rows, columns = 300, 1100
    x = torch.randn(rows, columns, generator=generator)
    x[7], x[160, 3], x[299] = 1e-30, float("inf"), 1e-22
    _, measure = measured(torch.randn(columns, 8, generator=generator).t().contiguous())
    _, back = measured(torch.randn(columns, 8, generator=generator))
    torch.set_num_threads(3)
    whole, step = fixedpoint.encode(x, measure)
    values = fixedpoint.decode(whole, step, back)
    for row in (0, 6, 7, 8, 29, 30, 159, 160, 161, 298, 299):
        alone, own = fixedpoint.encode(x[row : row + 1], measure)
        assert torch.equal(alone[0], whole[row])
        assert torch.equal(own[0].view(torch.int32), step[row].view(torch.int32))
        found = fixedpoint.decode(alone, own, back)
        assert torch.equal(found[0].view(torch.int32), values[row].view(torch.int32))
    assert not whole[[7, 160]].any()
    assert whole[299].any()

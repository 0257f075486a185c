from __future__ import annotations

import pytest
import torch

from teegpu import ring
from teegpu.tee.shield import fixedpoint
from teegpu.tee.shield.facts import Facts


def facts_of(weight: torch.Tensor) -> tuple[torch.Tensor, Facts]:
    int8, scale = ring.quantise(weight)
    largest = float(int8.to(torch.float64).square().sum(-1).max().sqrt())
    return int8, Facts(("w",), weight.shape[1], weight.shape[0], scale, largest)


def test_a_product_comes_back() -> None:
    generator = torch.Generator().manual_seed(3)
    int8, facts = facts_of(torch.randn(48, 200, generator=generator))
    x = torch.randn(7, 200, generator=generator) * torch.logspace(-6, 6, 7)[:, None]
    x[2, 5] = 900.0 * float(x[2].abs().max())  # a massive activation
    whole, step = fixedpoint.encode(x, facts)
    assert whole.dtype == torch.int32
    # half a step, and what float32 loses of a value of 22 bits
    assert ((whole * step.to(torch.float64) - x).abs() <= step).all()
    found = fixedpoint.decode(ring.RingMatrix(int8).product(whole), step, facts)
    expected = x.to(torch.float64) @ (int8.to(torch.float64) * facts.scale[:, None].to(torch.float64)).t()
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(error.max()) < 1e-4


@pytest.mark.parametrize("columns", [1, 8, 576, 5632])
@pytest.mark.parametrize("noise", [0.0, 6.4])
def test_no_product_wraps_not_even_along_the_largest_row(columns: int, noise: float) -> None:
    """A token that is a multiple of the matrix's longest row makes Cauchy-Schwarz an equality."""
    weight = torch.full((2, columns), 127, dtype=torch.int8)
    facts = Facts(("w",), columns, 2, torch.ones(2), 127.0 * columns**0.5)
    whole, _ = fixedpoint.encode(torch.full((1, columns), 3.7), facts, noise)
    worst = whole.to(torch.int64) + round(noise * (1 + 12 / columns**0.5))  # the longest noise that there is room for
    total = int((worst @ weight.to(torch.int64).t()).abs().max())
    assert total < 2**31
    assert total > 2**30 or columns <= 8  # and the room is used


def test_zeros_and_tiny_rows_are_exact_or_zero() -> None:
    _, facts = facts_of(torch.eye(4))
    x = torch.zeros(3, 4)
    x[1, 0] = 1e-42
    x[2, 1] = 1e-20
    whole, step = fixedpoint.encode(x, facts)
    assert not whole[0].any()
    assert torch.isfinite(step).all()
    assert fixedpoint.decode(whole, step, facts)[0].eq(0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value: float) -> None:
    _, facts = facts_of(torch.eye(4))
    x = torch.ones(2, 4)
    x[1, 2] = value
    whole, step = fixedpoint.encode(x, facts)
    found = fixedpoint.decode(whole, step, facts)
    assert torch.isfinite(found[0]).all()
    assert not torch.isfinite(found[1]).any()


def test_a_matrix_of_zeros_has_room() -> None:
    facts = Facts(("w",), 16, 4, torch.ones(4), 0.0)
    whole, step = fixedpoint.encode(torch.ones(1, 16), facts)
    assert ((whole * step - 1).abs() < 1e-5).all()


def test_a_matrix_without_room_is_an_error() -> None:
    with pytest.raises(ValueError, match="room"):
        fixedpoint.room(Facts(("w",), 2**26, 1, torch.ones(1), 2.0**30), noise=100.0)

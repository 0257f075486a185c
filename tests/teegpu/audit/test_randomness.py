"""Uniform numbers raise no alarm, and small faults of a mask do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from teegpu.audit import randomness
from teegpu.audit.known import Truth
from tests.teegpu.audit.made import MadeView, uniform

ROWS, COLUMNS = 500, 256


def masked(change: Any = lambda mask: mask, seed: int = 0) -> MadeView:
    numbers = torch.Generator().manual_seed(200 + seed)
    return MadeView(lambda rows: rows + change(uniform(*rows.shape, numbers)), rows=ROWS, columns=COLUMNS)


@pytest.mark.parametrize("seed", range(5))
def test_uniform_masks_show_no_pattern(seed: int) -> None:
    view = masked(seed=seed)
    assert randomness.distribution(view).verdict == "nothing"
    assert randomness.neighbours(view).verdict == "nothing"


def test_a_mask_of_31_bits_is_found() -> None:
    assert randomness.distribution(masked(lambda mask: mask & 0x7FFFFFFF)).verdict == "leaks"


def test_a_bit_that_is_set_too_often_is_found() -> None:
    def lean(mask: torch.Tensor) -> torch.Tensor:
        often = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.02
        return torch.where(often, mask | 1, mask)

    plain = masked(lean)
    plain._sent = lambda rows, sent=plain._sent: sent(torch.zeros_like(rows))  # noise of its own would hide the bit
    assert randomness.distribution(plain).verdict == "leaks"


def test_a_mask_that_repeats_along_a_row_is_found() -> None:
    def repeated(mask: torch.Tensor) -> torch.Tensor:
        mask[:, 1::2] = mask[:, ::2]
        return mask

    finding = randomness.neighbours(masked(repeated))
    assert finding.verdict == "leaks"
    assert finding.detail.startswith("largest 0.5")  # every second pair of neighbours is one value


def known_of(rows: torch.Tensor) -> Any:
    """Of a model: what really enters its first layer."""
    return SimpleNamespace(entering_first=lambda _: rows)


def test_a_mask_too_small_to_hide_the_values_is_found() -> None:
    sent: list[torch.Tensor] = []
    numbers = torch.Generator().manual_seed(3)

    def small(rows: torch.Tensor) -> torch.Tensor:
        sent.append(rows.to(torch.float32))
        return rows * 2**12 + (uniform(*rows.shape, numbers) >> 1)

    view = MadeView(small, rows=ROWS, columns=COLUMNS)
    view.works("prompt")
    truth = Truth(list(range(ROWS)), [1], [], 0)
    assert randomness.correlation_with_plain(view, known_of(sent[0]), truth).verdict == "leaks"


def test_uniform_masks_do_not_go_with_the_values() -> None:
    sent: list[torch.Tensor] = []
    numbers = torch.Generator().manual_seed(4)

    def full(rows: torch.Tensor) -> torch.Tensor:
        sent.append(rows.to(torch.float32))
        return rows + uniform(*rows.shape, numbers)

    view = MadeView(full, rows=ROWS, columns=COLUMNS)
    view.works("prompt")
    truth = Truth(list(range(ROWS)), [1], [], 0)
    assert randomness.correlation_with_plain(view, known_of(sent[0]), truth).verdict == "nothing"


def test_few_values_are_not_judged() -> None:
    numbers = torch.Generator().manual_seed(5)
    view = MadeView(lambda rows: rows + uniform(*rows.shape, numbers), rows=4, columns=64)
    assert randomness.distribution(view).verdict == "not possible"
    assert randomness.neighbours(view).verdict == "not possible"

"""What lying servers do to an answer."""

from __future__ import annotations

import random

import pytest
import torch

from teegpu.audit import cheating
from tests.teegpu.audit.made import uniform

ROWS, COLUMNS = 6, 10


@pytest.mark.parametrize("kind", ["flip-bit", "top-bit", "zero", "swap-rows"])
def test_a_lie_is_what_it_is_called(kind: str) -> None:
    for seed in range(50):
        honest = uniform(ROWS, COLUMNS, torch.Generator().manual_seed(seed))
        frame = bytearray(honest.numpy().tobytes())
        cheating.spoil(kind, frame, ROWS, 4, random.Random(seed))
        told = torch.frombuffer(frame, dtype=torch.int32).view(ROWS, COLUMNS)
        difference = (told - honest).flatten()
        changed = difference[difference != 0]
        if kind == "flip-bit":
            assert len(changed) == 1
            assert int(changed[0]).bit_count() == 1 or (-int(changed[0])).bit_count() == 1
        elif kind == "top-bit":
            assert changed.tolist() == [-(2**31)]
        elif kind == "zero":
            assert not told.any()
        else:
            rows = {tuple(row) for row in honest.tolist()}
            assert {tuple(row) for row in told.tolist()} == rows
            assert (told != honest).any(-1).sum() == 2


def test_one_row_can_not_be_swapped() -> None:
    frame = bytearray(range(40))
    cheating.spoil("swap-rows", frame, 1, 4, random.Random(0))
    assert frame == bytearray(range(40))


def test_an_unknown_lie_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no lie 'fib'"):
        cheating.LyingServer("fib", layers=2)

"""Masks that were used twice are found, fresh ones raise no alarm."""

from __future__ import annotations

import pytest
import torch

from teegpu.audit import linking
from teegpu.audit.known import AGAIN, CHANGED, PROMPT, TRAINING, Truth
from tests.teegpu.audit.made import COLUMNS, ROWS, MadeView, uniform

SCENES = (PROMPT, AGAIN, CHANGED, TRAINING)


def fresh(seed: int) -> MadeView:
    numbers = torch.Generator().manual_seed(100 + seed)
    return MadeView(lambda rows: rows + uniform(*rows.shape, numbers))


@pytest.mark.parametrize("seed", range(5))
def test_fresh_masks_tell_nothing(seed: int) -> None:
    view = fresh(seed)
    truth = Truth(list(range(ROWS)), [1], list(range(ROWS)), ROWS // 2)
    found = [
        linking.masks_used_twice(view, SCENES),
        linking.equal_rows(view, SCENES),
        linking.same_prompt(view, truth, 1),
        linking.changed_token(view, truth, 1),
    ]
    assert [finding.verdict for finding in found] == ["nothing"] * 4


def test_a_mask_for_all_messages_is_found() -> None:
    mask = uniform(ROWS, COLUMNS, torch.Generator().manual_seed(5))
    finding = linking.masks_used_twice(MadeView(lambda rows: rows + mask), SCENES)
    assert finding.verdict == "leaks"
    assert finding.detail.startswith("1,344 pairs")  # 28 pairs of the 8 messages, for each of the 48 rows


def test_one_row_of_a_mask_used_twice_is_found() -> None:
    numbers = torch.Generator().manual_seed(6)
    kept: list[torch.Tensor] = []

    def sent(rows: torch.Tensor) -> torch.Tensor:
        mask = uniform(*rows.shape, numbers)
        kept.append(mask)
        if len(kept) == 8:
            mask[11] = kept[2][40]
        return rows + mask

    finding = linking.masks_used_twice(MadeView(sent), SCENES)
    assert finding.verdict == "leaks"
    assert finding.detail.startswith("1 pairs")


def test_rows_sent_twice_are_found() -> None:
    numbers = torch.Generator().manual_seed(7)
    kept: list[torch.Tensor] = []

    def sent(rows: torch.Tensor) -> torch.Tensor:
        kept.append(rows + uniform(*rows.shape, numbers))
        return kept[0] if len(kept) == 5 else kept[-1]

    finding = linking.equal_rows(MadeView(sent), SCENES)
    assert finding.verdict == "leaks"
    assert finding.detail.startswith(f"{ROWS} of")


def test_values_in_the_clear_are_not_taken_for_masks() -> None:
    finding = linking.masks_used_twice(MadeView(lambda rows: rows.to(torch.float32)), SCENES)
    assert finding.verdict == "not possible"

"""What tokens were chosen from, against the reference's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from teegpu.bench.logits import Listening, compare, save
from teegpu.tee.sampling import Sampler, SamplingOptions


def test_a_listening_sampler_draws_as_the_other_and_keeps_the_first_logits() -> None:
    options = SamplingOptions(temperature=1.0, seed=7)
    plain, listening = Sampler(options), Listening(Sampler(options), most=2)
    rows = torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    assert [plain(row, []) for row in rows] == [listening(row.clone(), []) for row in rows]
    assert [torch.equal(seen, row) for seen, row in zip(listening.seen, rows, strict=False)] == [True, True]


def test_equal_logits(tmp_path: Path) -> None:
    rows = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    save(tmp_path / "x.npy", rows)
    assert compare(tmp_path / "x.npy", list(rows)) == {
        "kl_nats": 0.0, "kl_nats_largest": 0.0, "top1_agreement": 1.0, "positions": 2,
    }  # fmt: skip


def test_after_another_token_nothing_is_compared_any_more(tmp_path: Path) -> None:
    even = torch.log(torch.tensor([0.5, 0.25, 0.25]))
    odd = torch.log(torch.tensor([0.25, 0.5, 0.25]))
    save(tmp_path / "x.npy", torch.stack([even, even, even]))
    found = compare(tmp_path / "x.npy", [even, odd, odd])
    kl = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert found["positions"] == 2
    assert found["top1_agreement"] == 0.5
    assert found["kl_nats"] == pytest.approx(kl / 2, rel=1e-6)
    assert found["kl_nats_largest"] == pytest.approx(kl, rel=1e-6)


def test_a_run_that_made_fewer_tokens(tmp_path: Path) -> None:
    rows = torch.eye(4)
    save(tmp_path / "x.npy", rows)
    assert compare(tmp_path / "x.npy", list(rows[:2]))["positions"] == 2

"""What a case's tokens were chosen from, held against what transformers chose its own from in fp32.

The reference is a file that its process writes and those of the cases read: the logits of each token that it made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from teegpu.bench.accuracy import Score
from teegpu.tee.sampling import Sampler

Accuracy = dict[str, float | int | None]


class Listening(Sampler):
    """Samples as ``sampler`` would, and keeps the logits of the first ``most`` tokens: a copy of each, and no more,
    since it is timed."""

    def __init__(self, sampler: Sampler, most: int) -> None:
        super().__init__(replace(sampler.options, seed=sampler.seed))
        self.seen: list[torch.Tensor] = []
        self._most = most

    def __call__(self, logits: torch.Tensor, context: Sequence[int]) -> int:
        if len(self.seen) < self._most:
            self.seen.append(logits.clone())
        return super().__call__(logits, context)


def save(path: Path, logits: torch.Tensor) -> None:
    """Writes ``logits``, (tokens, vocab) in fp32."""
    with path.open("wb") as file:
        np.save(file, logits.to(torch.float32).numpy(), allow_pickle=False)


def compare(path: Path, own: Sequence[torch.Tensor]) -> Accuracy:
    """``own``, (vocab,) for each token that was made in turn, against the file's.

    Greedy tokens follow from the logits. As long as both chose the same token, the next one was chosen after the same
    context, and counts: KL divergence in nats, top-1 agreement, and how many positions that were.
    """
    reference = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    count = 0
    for ours, theirs in zip(own, reference, strict=False):
        count += 1
        if int(ours.argmax()) != int(theirs.argmax()):
            break
    score = Score()
    score.add(
        torch.log_softmax(reference[:count].to(torch.float64), -1),
        torch.log_softmax(torch.stack(list(own[:count])).to(torch.float64), -1),
        torch.empty(0, dtype=torch.int64),
    )
    found = score.to_json()
    return {name: found[name] for name in ("kl_nats", "kl_nats_largest", "top1_agreement", "positions")}

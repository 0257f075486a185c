"""Decoding without what is kept between steps, to show what keeping it brings: without the KV cache, and without the
table of rotary angles. For the ladder alone."""

from __future__ import annotations

import torch

from teegpu.tee.decoder import Pass
from teegpu.tee.generate import Session
from teegpu.tee.products import drive
from teegpu.tee.rotary import RotaryTable


class WholeContextSession(Session):
    """Each step computes prompt and output so far anew, in one pass, and uses no keys and values of the step before."""

    def _decode_logits(self, context: list[int], drafts: list[int]) -> torch.Tensor:
        ids = [*context, *drafts]
        cache = self._cache
        cache.truncate(0)
        cache.reserve(len(ids))
        self._rotary.prepare(len(ids))
        work = Pass(torch.tensor(ids, dtype=torch.int64), 0, cache, "all" if drafts else "last")
        logits = drive(self._decode_decoder.forward(work))
        if logits is None:
            raise RuntimeError("a pass that was to give logits gave none")
        cache.advance(len(ids))
        return logits[-1 - len(drafts) :]


class AnglesAnew(RotaryTable):
    """Cosines and sines are computed whenever they are asked for: in each layer of each pass."""

    def at(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.arange(start, stop, dtype=torch.float32)[:, None] * self._frequencies
        return (angles.cos() * self._scaling)[:, None, :], (angles.sin() * self._scaling)[:, None, :]

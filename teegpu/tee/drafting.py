"""Guesses of a small model in the TEE: it says what it would say next, which costs no round trip, and one pass of the
model checks all of it. What is drawn does not depend on guesses, so output is unchanged, as with ``speculation``."""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Final

import torch

from teegpu.model.spec import ModelSpec
from teegpu.record.events import TEE
from teegpu.record.recorder import Recorder
from teegpu.remote.calls import drive
from teegpu.tee.decoder import Decoder, Span, Step, Want
from teegpu.tee.kv_cache import KVCache, Slabs
from teegpu.tee.rotary import Rotary

CHUNK: Final = 512
"""Tokens of a prompt that the small model reads at once."""


@dataclass(slots=True)
class Draft:
    """What the small model has of a sequence: keys and values of the tokens ``held``."""

    cache: KVCache
    held: list[int] = field(default_factory=list)

    def keep(self, tokens: Several[int]) -> None:
        """Forgets what does not stand at the beginning of ``tokens``, and the last of them: its logits are needed."""
        same = 0
        for mine, theirs in zip(self.held, tokens[:-1], strict=False):
            if mine != theirs:
                break
            same += 1
        del self.held[same:]
        self.cache.truncate(same)


class Drafter:
    """Guesses with ``decoder``, which computes in the TEE alone and records nothing; its time is ``DRAFT`` of
    ``recorder``. ``vocab_size``: tokens of the model that it guesses for; with the same tokenizer either may have rows
    for more."""

    def __init__(
        self, decoder: Decoder, spec: ModelSpec, rotary: Rotary, recorder: Recorder, *, vocab_size: int
    ) -> None:
        self._decoder = decoder
        self._spec = spec
        self._rotary = rotary
        self._record = recorder
        self._vocab_size = vocab_size
        self._slabs = Slabs(spec, shared=True, most=spec.max_positions)

    def begin(self) -> Draft:
        return Draft(KVCache(self._spec, 1, slabs=self._slabs))

    def guess(self, asked: Several[tuple[Draft, list[int], int]]) -> list[list[int]]:
        """For each draft, of the sequence with these tokens, that many that may come next; none where the small model's
        context ends before, or where it has no row for a token."""
        made: list[list[int]] = [[] for _ in asked]
        left = []
        for place, (draft, tokens, most) in enumerate(asked):
            if most <= 0 or len(tokens) + most > self._spec.max_positions:
                continue
            draft.keep(tokens)
            if max(tokens[len(draft.held) :]) < self._spec.vocab_size:
                left.append((place, draft, tokens, most))
        for _, draft, tokens, most in left:
            draft.cache.reserve(len(tokens) + most)
            while len(tokens) - len(draft.held) > CHUNK:
                self._read([(draft, tokens[len(draft.held) : len(draft.held) + CHUNK])], "none")
        left.sort(key=lambda one: (id(one[1].cache.slab), one[1].cache.slot))
        while left:
            rows = [(draft, [*tokens, *made[place]][len(draft.held) :]) for place, draft, tokens, _ in left]
            logits = self._read(rows, "last")
            assert logits is not None
            for (place, *_), token in zip(left, logits[:, : self._vocab_size].argmax(dim=-1).tolist(), strict=True):
                made[place].append(token)
            left = [one for one in left if len(made[one[0]]) < one[3]]
        self._record.lap(TEE, "DRAFT")
        return made

    def _read(self, rows: Several[tuple[Draft, list[int]]], want: Want) -> torch.Tensor | None:
        spans = []
        for draft, ids in rows:
            spans.append(Span(torch.tensor(ids, dtype=torch.int64), len(draft.held), draft.cache, want))
            draft.held += ids
        self._rotary.prepare(max(len(draft.held) for draft, _ in rows))
        logits = drive(self._decoder.forward(Step(spans)))
        for draft, _ in rows:
            draft.cache.advance(len(draft.held))
        return logits

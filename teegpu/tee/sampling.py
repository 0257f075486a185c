"""From logits to a token. The filters, and their order, are those of transformers' ``generate``."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from teegpu.errors import BadReplyError


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """``temperature`` 0 is greedy: then only ``repetition_penalty`` has an effect. ``top_k`` 0, ``top_p`` 1 and
    ``min_p`` 0 are off. ``seed`` None takes one from the operating system."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None


class Sampler:
    """Draws tokens. The same options and seed give the same tokens for the same logits.

    ``seed`` is the one in use, also when it was not given.
    """

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self.seed = secrets.randbits(63) if options.seed is None else options.seed
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, logits: torch.Tensor, context: Sequence[int]) -> int:
        """A token id for ``logits`` (vocab,) in fp32, after ``context``, the ids of prompt and output so far.

        Raises ``BadReplyError`` where nothing can be drawn: a server's values may be finite, and still so large that
        what is computed from them is not."""
        options = self.options
        if options.repetition_penalty != 1.0:
            logits = _penalise(logits, context, options.repetition_penalty)
        values = logits if options.temperature == 0.0 else self.probabilities(logits)
        if not math.isfinite(values.sum().item()):
            raise BadReplyError(
                "the next token's probabilities are not numbers: the server's results are false, or out of range (try "
                "--wire-dtype bf16, and bf16 or fp32 as the server's dtype)"
            )
        if options.temperature == 0.0:
            return int(values.argmax())
        return int(torch.multinomial(values, 1, generator=self._generator))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The distribution that is drawn from, (vocab,), zero where a filter has removed a token."""
        options = self.options
        logits = logits / options.temperature
        if 0 < options.top_k < logits.shape[-1]:
            smallest = torch.topk(logits, options.top_k).values[-1]
            logits = logits.masked_fill(logits < smallest, float("-inf"))
        if options.top_p < 1.0:
            ordered, order = torch.sort(logits)
            # What lies below the top_p mass goes; the likeliest token always stays.
            removed = torch.softmax(ordered, dim=-1).cumsum(dim=-1) <= 1.0 - options.top_p
            removed[-1] = False
            logits = logits.masked_fill(torch.zeros_like(removed).scatter(0, order, removed), float("-inf"))
        if options.min_p > 0.0:
            probabilities = torch.softmax(logits, dim=-1)
            logits = logits.masked_fill(probabilities < options.min_p * probabilities.max(), float("-inf"))
        return torch.softmax(logits, dim=-1)


def _penalise(logits: torch.Tensor, context: Sequence[int], penalty: float) -> torch.Tensor:
    """Repetition penalty of CTRL (Keskar et al. 2019): seen tokens' logits divided by it, or multiplied if negative."""
    seen = torch.tensor(sorted(set(context)), dtype=torch.int64)
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values < 0, values * penalty, values / penalty))

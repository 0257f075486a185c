"""From logits to a token. The filters, and their order, are those of transformers' ``generate``."""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from teegpu.errors import BadReplyError, UnmetError


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """``temperature`` 0 is greedy: then only ``repetition_penalty`` has an effect. ``top_k`` 0, ``top_p`` 1 and
    ``min_p`` 0 are off. ``seed`` None takes one from the operating system. ``presence_penalty`` and
    ``frequency_penalty`` are subtracted for tokens that were drawn, once and each time; ``bias`` (id, number) is added.
    ``vocabulary``: ids from it on are never drawn, as no tokenizer knows them. ``logprobs``: of how many of the
    likeliest tokens they are told, beside that of the one drawn; None: nothing is."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()
    vocabulary: int | None = None
    logprobs: int | None = None
    seed: int | None = None


class Constraint(Protocol):
    """What an answer has to be like."""

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` (vocab,) with -inf where the next token must not be."""

    def take(self, token: int) -> None:
        """``token`` was drawn."""


class Sampler:
    """Draws tokens, of those that ``constraint`` allows. The same options and seed give the same tokens for the same
    logits.

    ``seed`` is the one in use, also when it was not given. ``drawn`` is the latest token, its logarithmic probability
    and the likeliest ones with theirs, where ``options.logprobs`` asks for it.
    """

    def __init__(self, options: SamplingOptions, constraint: Constraint | None = None) -> None:
        self.options = options
        self._constraint = constraint
        self.seed = secrets.randbits(63) if options.seed is None else options.seed
        self._generator = torch.Generator().manual_seed(self.seed)
        self._counts: Counter[int] = Counter()
        self.drawn: tuple[int, float, list[tuple[int, float]]] | None = None

    def __call__(self, logits: torch.Tensor, context: Sequence[int]) -> int:
        """A token id for ``logits`` (vocab,) in fp32, after ``context``, the ids of prompt and output so far.

        Raises ``BadReplyError`` where nothing can be drawn: a server's values may be finite, and still so large that
        what is computed from them is not; ``UnmetError`` where ``constraint`` allows no token."""
        options = self.options
        raw = logits
        if options.repetition_penalty != 1.0:
            logits = _penalise(logits, context, options.repetition_penalty)
        logits = self._shifted(logits)
        if self._constraint is not None:
            logits = self._constraint.mask(logits)
            if bool(torch.isneginf(logits).all()):
                raise UnmetError("the answer can't be what was asked for: no token would go on with it")
        greedy = options.temperature == 0.0
        values = logits if greedy else self.probabilities(logits)
        if not math.isfinite((raw if greedy else values).sum().item()):
            raise BadReplyError(
                "the next token's probabilities are not numbers: weights, or a server's results, are false, or out of "
                "range (try --wire-dtype bf16, and bf16 or fp32 as the server's dtype)"
            )
        token = int(values.argmax() if greedy else torch.multinomial(values, 1, generator=self._generator))
        if self._constraint is not None:
            self._constraint.take(token)
        if options.presence_penalty or options.frequency_penalty:
            self._counts[token] += 1
        if options.logprobs is not None:
            self.drawn = _logprobs(raw[: options.vocabulary], token, options.logprobs)
        return token

    def _shifted(self, logits: torch.Tensor) -> torch.Tensor:
        """``logits`` with penalties and bias, and without ids that no tokenizer knows."""
        options, size = self.options, logits.shape[-1]
        shifts = {token: value for token, value in options.bias if token < size}
        for token, count in self._counts.items():
            penalty = options.presence_penalty + count * options.frequency_penalty
            shifts[token] = shifts.get(token, 0.0) - penalty
        if shifts:
            ids = torch.tensor(list(shifts), dtype=torch.int64)
            logits = logits.index_add(0, ids, torch.tensor(list(shifts.values())))
        if options.vocabulary is not None and options.vocabulary < size:
            logits = logits.clone()
            logits[options.vocabulary :] = float("-inf")
        return logits

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The distribution that is drawn from, (vocab,), zero where a filter has removed a token."""
        options = self.options
        scaled = logits / options.temperature
        if not math.isfinite(scaled.max().item()):  # so low a temperature leaves the likeliest alone
            scaled = logits.masked_fill(logits < logits.max(), float("-inf"))
        logits = scaled
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


def _logprobs(logits: torch.Tensor, token: int, count: int) -> tuple[int, float, list[tuple[int, float]]]:
    """Of the model's own distribution, before temperature and filters."""
    logprobs = torch.log_softmax(logits, dim=-1)
    top = torch.topk(logprobs, min(count, logprobs.shape[-1])) if count else None
    likeliest = [] if top is None else list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return token, float(logprobs[token]), likeliest

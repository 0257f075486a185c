"""From logits to a token. The filters, and their order, are those of transformers' ``generate``."""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
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
        self._bias: tuple[torch.Tensor, torch.Tensor] | None = None
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
        ids, values = (None, logits) if greedy else self._candidates(logits)
        if not math.isfinite((raw if greedy else values).sum().item()):
            raise BadReplyError(
                "the next token's probabilities are not numbers: weights, or a server's results, are false, or out of "
                "range (try --wire-dtype bf16, and bf16 or fp32 as the server's dtype)"
            )
        token = int(_numpy(values).argmax()) if greedy else self._draw(values)
        if ids is not None:
            token = int(ids[token])
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
        if options.bias:
            if self._bias is None:  # once: it may be as long as a request's body
                self._bias = _shifts({token: value for token, value in options.bias if token < size})
            logits = logits.index_add(0, *self._bias)
        if self._counts:
            once, each = options.presence_penalty, options.frequency_penalty
            logits = logits.index_add(0, *_shifts({t: -(once + count * each) for t, count in self._counts.items()}))
        if options.vocabulary is not None and options.vocabulary < size:
            logits = logits.clone()
            logits[options.vocabulary :] = float("-inf")
        return logits

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The distribution that is drawn from, (vocab,), zero where a filter has removed a token."""
        ids, probabilities = self._candidates(logits)
        return probabilities if ids is None else torch.zeros_like(logits).index_copy(0, ids, probabilities)

    def _candidates(self, logits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The ids that filters leave, in any order, and the probability of each. None: all of them.

        Each filter looks at those alone that are left: few, as a rule, where all would be sorted and summed for each
        token of each sequence."""
        options = self.options
        scaled = logits / options.temperature
        if not math.isfinite(_numpy(scaled).max()):  # so low a temperature leaves the likeliest alone
            scaled = logits.masked_fill(logits < logits.max(), float("-inf"))
        left, ids = scaled, None
        if 0 < options.top_k < logits.shape[-1]:
            ids = _those(left, float(torch.topk(left, options.top_k).values[-1]))
            left = left[ids]
        if options.top_p < 1.0:
            # What lies below the top_p mass goes; the likeliest token always stays. Who has less than an even share of
            # what goes is part of it: only the others have to be sorted.
            probabilities, below = torch.softmax(left, dim=-1), 1.0 - options.top_p
            others = _those(probabilities, below / left.shape[-1])
            ordered, order = torch.sort(probabilities[others])
            rest = probabilities.sum(dtype=torch.float64) - ordered.sum(dtype=torch.float64)
            gone = rest + ordered.cumsum(dim=-1, dtype=torch.float64) <= below
            gone[-1] = False
            others = others[order[~gone]]
            left, ids = left[others], others if ids is None else ids[others]
        if options.min_p > 0.0:
            probabilities = torch.softmax(left, dim=-1)
            others = _those(probabilities, options.min_p * float(probabilities.max()))
            left, ids = left[others], others if ids is None else ids[others]
        return ids, torch.softmax(left, dim=-1)

    def _draw(self, probabilities: torch.Tensor) -> int:
        """A place in ``probabilities``, by inversion: one random number, where ``torch.multinomial`` takes one for each
        place."""
        upto = probabilities.cumsum(dim=-1, dtype=torch.float64)
        point = upto[-1] * (1.0 - torch.rand((), dtype=torch.float64, generator=self._generator))  # above 0
        return int(torch.searchsorted(upto, point))


def _shifts(numbers: Mapping[int, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and what is added to the logit of each."""
    return torch.tensor(list(numbers), dtype=torch.int64), torch.tensor(list(numbers.values()), dtype=torch.float32)


def _numpy(values: torch.Tensor) -> npt.NDArray[np.float32]:
    """For what numpy does with one thread before torch has woken its own: a vocabulary is no more than that."""
    return values.numpy()


def _those(values: torch.Tensor, least: float) -> torch.Tensor:
    """Where ``values`` are at least ``least``, or no numbers at all: these are found later."""
    return torch.from_numpy(np.flatnonzero(~(_numpy(values) < np.float32(least))))


def _penalise(logits: torch.Tensor, context: Sequence[int], penalty: float) -> torch.Tensor:
    """Repetition penalty of CTRL (Keskar et al. 2019): seen tokens' logits divided by it, or multiplied if negative.

    Where that is beyond all numbers it is the largest: what is no number is a server's doing, never a penalty's."""
    seen = torch.tensor(sorted(set(context)), dtype=torch.int64)
    values = logits[seen]
    made = torch.where(values < 0, values * penalty, values / penalty).nan_to_num()
    return logits.index_copy(0, seen, torch.where(values.isfinite(), made, values))


def _logprobs(logits: torch.Tensor, token: int, count: int) -> tuple[int, float, list[tuple[int, float]]]:
    """Of the model's own distribution, before temperature and filters."""
    logprobs = torch.log_softmax(logits, dim=-1)
    top = torch.topk(logprobs, min(count, logprobs.shape[-1])) if count else None
    likeliest = [] if top is None else list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return token, float(logprobs[token]), likeliest

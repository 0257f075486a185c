"""From prompt ids to output ids: prefill in chunks, then decode, over one KV cache.

A ``Session`` answers one prompt after the other in one process. It keeps the keys and values of the last prompt, so one
that begins alike computes only what is new.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from teegpu.errors import PromptError
from teegpu.metrics.events import DECODE, PREFILL, TEE, Speculated
from teegpu.metrics.recorder import Recorder
from teegpu.metrics.traffic import chunk_count, chunk_edges
from teegpu.tee.decoder import Decoder, Pass, Turn, Want
from teegpu.tee.kv_cache import KVCache
from teegpu.tee.products import drive
from teegpu.tee.rotary import RotaryTable
from teegpu.tee.sampling import Sampler
from teegpu.tee.speculation import PromptLookup

OnToken = Callable[[int], bool]
"""Takes each token id as it is made; True ends the generation."""


@dataclass(slots=True)
class Generation:
    """What a prompt gave. ``finish_reason`` is ``stop`` (end token or the caller's wish), ``length`` or
    ``interrupted``; ``reused_tokens`` of the prompt were still in the KV cache."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "interrupted"
    prompt_tokens: int = 0
    reused_tokens: int = 0


class Session:
    """Generates with ``prefill`` and ``decode``, decoders that share ``rotary`` and ``cache`` (and may be one).

    ``overlap`` runs the chunks of a prompt as coroutines; ``set_overlapped`` is told when that begins and ends.
    ``prefix_bytes`` bounds the keys and values that are kept between prompts: 0 keeps none.
    """

    def __init__(
        self,
        prefill: Decoder,
        decode: Decoder,
        *,
        cache: KVCache,
        rotary: RotaryTable,
        recorder: Recorder,
        max_positions: int,
        chunk_tokens: int,
        overlap: bool = False,
        set_overlapped: Callable[[bool], None] = lambda _: None,
        speculate: int = 0,
        prefix_bytes: int = 0,
    ) -> None:
        self._prefill_decoder = prefill
        self._decode_decoder = decode
        self._cache = cache
        self._rotary = rotary
        self._record = recorder
        self._max_positions = max_positions
        self._chunk_tokens = chunk_tokens
        self._overlap = overlap
        self._set_overlapped = set_overlapped
        self._speculate = speculate
        self._prefix_bytes = prefix_bytes
        self._cached_ids: list[int] = []

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        sampler: Sampler,
        end_ids: Sequence[int] = (),
        on_token: OnToken = lambda _: False,
        result: Generation | None = None,
    ) -> Generation:
        """Up to ``max_tokens`` tokens after ``prompt``.

        ``result`` is filled as tokens are made, so an interrupted call leaves what there was. Raises ``PromptError``
        for an empty prompt and for one that is longer than the model's context."""
        done = result if result is not None else Generation()
        if not prompt:
            raise PromptError(
                "the prompt is empty: give one as an argument, on standard input, or with --prompt-tokens"
            )
        if len(prompt) > self._max_positions:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens, the model's context ends at {self._max_positions}: shorten it"
            )
        done.prompt_tokens = len(prompt)
        run = _Run(list(prompt), max_tokens, sampler, frozenset(end_ids), on_token, done)
        with torch.inference_mode():
            if max_tokens > 0 and self._prefill(run):
                self._decode(run)
            elif max_tokens <= 0:
                done.finish_reason = "length"
        return done

    # Prefill

    def _prefill(self, run: _Run) -> bool:
        """Computes the prompt and makes the first token. True when there is more to generate."""
        record = self._record
        reused = self._reuse(run.context)
        run.done.reused_tokens = reused
        expected = len(run.context) - reused
        record.begin(PREFILL, expected, chunk_count(expected, self._chunk_tokens))
        fresh = 0
        try:
            logits = self._prefill_logits(run.context, reused)
            fresh = expected
            return self._accept(run, logits)
        finally:
            record.end(fresh, passes=1)

    def _prefill_logits(self, prompt: list[int], reused: int) -> torch.Tensor:
        cache = self._cache
        cache.truncate(reused)
        self._cached_ids = prompt[:reused]
        cache.reserve(len(prompt))
        self._rotary.prepare(len(prompt))
        ids = torch.tensor(prompt, dtype=torch.int64)
        edges = chunk_edges(reused, len(prompt), self._chunk_tokens)
        passes: list[Pass] = []
        overlap = self._overlap and len(edges) > 2
        for chunk, (start, stop) in enumerate(pairwise(edges)):
            want: Want = "last" if stop == len(prompt) else "none"
            turn = Turn(passes[-1].turn if passes else None) if overlap else None
            passes.append(Pass(ids[start:stop], start, cache, want, chunk, turn))
        logits = self._overlapped(passes) if overlap else self._in_turn(passes)
        cache.advance(len(prompt))
        self._cached_ids = list(prompt)
        return logits

    def _in_turn(self, passes: list[Pass]) -> torch.Tensor:
        logits = None
        for work in passes:
            logits = drive(self._prefill_decoder.forward(work))
        return _present(logits)

    def _overlapped(self, passes: list[Pass]) -> torch.Tensor:
        async def run() -> torch.Tensor:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._prefill_decoder.forward(work)) for work in passes]
            return _present(tasks[-1].result())

        self._set_overlapped(True)
        try:
            return asyncio.run(run())
        except BaseExceptionGroup as group:
            # The first failure is the cause, the others are chunks that it took down.
            raise _first(group) from None
        finally:
            self._set_overlapped(False)

    def _reuse(self, prompt: list[int]) -> int:
        """How many leading tokens of ``prompt`` the cache holds already. The last one is always computed anew: its
        logits are needed."""
        if self._rotary.depends_on_length or self._cache.nbytes > self._prefix_bytes:
            return 0
        most = min(len(prompt) - 1, len(self._cached_ids), self._cache.length)
        same = 0
        while same < most and prompt[same] == self._cached_ids[same]:
            same += 1
        return same

    # Decode

    def _decode(self, run: _Run) -> None:
        record = self._record
        record.begin(DECODE, run.max_tokens - len(run.done.token_ids))
        made_before, passes = len(run.done.token_ids), 0
        try:
            lookup = PromptLookup(run.context) if self._speculate and not self._rotary.depends_on_length else None
            more = True
            while more:
                room = min(self._max_positions - len(run.context), run.max_tokens - len(run.done.token_ids) - 1)
                drafts = lookup.guess(min(self._speculate, room)) if lookup is not None and room > 0 else []
                logits = self._decode_logits(run.context, drafts)
                passes += 1
                more, made = self._accept_drafts(run, logits, drafts)
                if lookup is not None:
                    for token in made:
                        lookup.append(token)
        finally:
            record.end(len(run.done.token_ids) - made_before, passes)

    def _decode_logits(self, context: list[int], drafts: list[int]) -> torch.Tensor:
        """Logits after the last token of ``context`` and after each of ``drafts``, (1 + drafts, vocab)."""
        cache = self._cache
        start = len(context) - 1
        stop = len(context) + len(drafts)
        cache.reserve(stop)
        self._rotary.prepare(stop)
        ids = torch.tensor([context[-1], *drafts], dtype=torch.int64)
        logits = drive(self._decode_decoder.forward(Pass(ids, start, cache, "all" if drafts else "last")))
        cache.advance(stop)
        return _present(logits)

    def _accept_drafts(self, run: _Run, logits: torch.Tensor, drafts: list[int]) -> tuple[bool, list[int]]:
        """Draws tokens while the drafts agree with them. (whether there is more to generate, the tokens made)"""
        start = len(run.context)
        more = True
        accepted = 0
        for row in range(len(drafts) + 1):
            more = self._accept(run, logits[row : row + 1], announce=False)
            if row < len(drafts) and run.context[-1] == drafts[row]:
                accepted += 1
            else:
                break
            if not more:
                break
        made = run.context[start:]
        self._cache.truncate(len(run.context) - 1)
        self._cached_ids = run.context[:-1]
        if drafts:
            self._record.add(Speculated(len(drafts), accepted))
        self._record.tokens(len(made))
        return more, made

    def _accept(self, run: _Run, logits: torch.Tensor, announce: bool = True) -> bool:
        """Draws one token and hands it over. True when there is more to generate."""
        token = run.sampler(logits[-1], run.context)
        self._record.lap(TEE, "SAMPLING")
        run.context.append(token)
        done = run.done
        if token in run.end_ids:
            done.token_ids.append(token)
            done.finish_reason = "stop"
            more = False
        else:
            done.token_ids.append(token)
            more = not run.on_token(token)
            if not more:
                done.finish_reason = "stop"
            elif len(done.token_ids) >= run.max_tokens or len(run.context) > self._max_positions:
                done.finish_reason = "length"
                more = False
        if announce:
            self._record.tokens()
        return more


@dataclass(slots=True)
class _Run:
    """One prompt under way; ``context`` is the prompt and all that was generated."""

    context: list[int]
    max_tokens: int
    sampler: Sampler
    end_ids: frozenset[int]
    on_token: OnToken
    done: Generation


def _present(logits: torch.Tensor | None) -> torch.Tensor:
    if logits is None:
        raise RuntimeError("a pass that was to give logits gave none")
    return logits


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first plain exception in a (nested) group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error

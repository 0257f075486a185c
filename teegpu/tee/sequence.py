"""One request: its tokens, what it may still do, what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from teegpu.tee.drafting import Draft
from teegpu.tee.kv_cache import KVCache
from teegpu.tee.sampling import Sampler
from teegpu.tee.speculation import PromptLookup

OnToken = Callable[[int], bool]
"""Takes each token id as it is made; True ends the generation."""


@dataclass(slots=True)
class Generation:
    """What a prompt gave. ``finish_reason`` is ``stop`` (end token or the caller's wish), ``length`` or
    ``interrupted``; ``reused_tokens`` of the prompt were still in a KV cache."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "interrupted"
    prompt_tokens: int = 0
    reused_tokens: int = 0


@dataclass(slots=True)
class Times:
    """When a request was added, began to be read, and gave its first and its latest token; ns, 0: not yet."""

    added_ns: int = field(default_factory=time.perf_counter_ns)
    began_ns: int = 0
    first_ns: int = 0
    latest_ns: int = 0


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt and what is generated after it: up to ``max_tokens``, or one of ``end_ids``, or until ``on_token`` says
    so.

    ``tokens`` are the prompt and all that was made so far. ``cache`` holds keys and values of the first
    ``cache.length`` of them. ``namespace``: whose prefixes it may use. ``on_end`` is called once, when nothing more
    will come, with the error that ended it or None. ``cancelled`` may be set at any moment, from any thread.
    """

    tokens: list[int]
    max_tokens: int
    sampler: Sampler
    end_ids: Collection[int] = ()
    on_token: OnToken = lambda _: False
    on_end: Callable[[BaseException | None], None] = lambda _: None
    namespace: str = ""
    done: Generation = field(default_factory=Generation)
    times: Times = field(default_factory=Times)
    cancelled: bool = False
    ended: bool = False
    # What the engine knows of it.
    number: int = 0
    """How many came before it."""
    cache: KVCache | None = None
    edges: list[int] = field(default_factory=list)
    """Where the chunks end that are still to be read."""
    lookup: PromptLookup | None = None
    draft: Draft | None = None
    guesses: list[int] = field(default_factory=list)
    """Of the step under way."""

    def __post_init__(self) -> None:
        self.done.prompt_tokens = len(self.tokens)

    @property
    def made(self) -> int:
        """Tokens that were generated."""
        return len(self.done.token_ids)

    @property
    def reading(self) -> bool:
        """Whether there is more to compute before its next token than the token before."""
        return bool(self.edges)

    @property
    def held(self) -> KVCache:
        if self.cache is None:
            raise RuntimeError("a sequence that does not run has no keys and values")
        return self.cache

"""The rungs of ``teegpu bench ladder``: from one RPC for each product to what teegpu does now, one thing at a time.

The chain of the prefill, each rung with one thing more than the one before:

    per-op            one RPC for each product, lock step, fp32, tensors packed in one msgpack body (``bench.before``)
    batched           projections that share an input travel in one RPC
    raw-frames        tensors as frames of their own, without copies, in place of one packed body
    zstd              frames are compressed where the policy finds that it pays
    async             a transport with many requests in flight; the prompt is still one chunk
    attention         attention and embedding stay in the TEE
    fused             the server goes on past the norms: two RPCs a layer
    fp16              values of two bytes on the link
    chunks            the prompt in chunks that overlap
    int8              values of one byte on the link

**What async shows.** It lets requests be in flight together that do not need each other. Once projections are batched,
Q, K and V are one request, and every request of a layer needs the one before it: in the chain the rung stands where the
original had it, and can bring nothing but its own cost. What it brings by itself is seen beside the chain, where Q, K
and V, and gate and up, are still requests of their own: ``per-op-raw`` in lock step against ``per-op-async``. What the
chain gains from it comes with ``chunks``, which could not overlap without it.

**zstd** stays on from its rung on and is left to its policy: nothing is compressed where that would take longer than
sending, and never a frame below 64 KiB.

Of decode, over the fused plan in fp32:

    no-kv-cache       each step computes the whole context anew, and rotary angles in each layer (``bench.before``)
    kv-cache          keys and values are kept
    position-cache    the table of rotary angles is kept
    speculation       tokens are guessed from the context, and checked in one step

The baselines of both: ``local``, everything in the TEE, and ``transformers`` itself, in fp32 on all cores.

Every rung's server computes in fp32, so that all but those with fp16 and int8 make transformers' own tokens. With a
server that is there already (``--endpoint``) rungs of the packed codec are left out: no product's server knows it.

This module is pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from teegpu import facts
from teegpu.bench.cases import NO_KV_CACHE, NO_POSITION_CACHE, PACKED, TRANSFORMERS, Case
from teegpu.config import Config
from teegpu.errors import UsageError, nearest
from teegpu.fields import Value
from teegpu.model.spec import ModelSpec

Track = Literal["prefill", "beside", "decode", "baseline", "case"]
"""``prefill`` and ``decode`` are the chains, ``beside`` what the first one can't show, ``baseline`` has no server;
``case`` is no rung, but a case of the user's."""

TRACKS: tuple[Track, ...] = ("prefill", "beside", "decode", "baseline")

FEW_STEPS = 4
"""Decode steps of the rungs that are there for the prefill: over a slow link the first ones take seconds each."""

WHOLE_CONTEXT_STEPS = 2
"""Decode steps of the rung that computes the whole context in each."""

SPECULATE = 4


@dataclass(frozen=True)
class Rung:
    """``before`` names the rung that this one adds one thing to, ``adds`` says which. ``expected_seconds`` is what the
    document that this project started from expected, and nobody measured: a prefill of 1,024 tokens of TinyLlama-1.1B,
    22 layers, 200 RPCs. ``given``: the case itself, of one that the user wrote."""

    name: str
    label: str
    track: Track
    plan: str
    transport: str = ""
    wire: str = "fp32"
    overlap: bool = False
    speculate: int = 0
    ways: tuple[str, ...] = ()
    before: str = ""
    adds: str = ""
    expected_seconds: float | None = None
    given: Case | None = None

    @classmethod
    def of(cls, case: Case) -> Rung:
        """The rung beside the ladder that is ``case``."""
        return cls(case.label, case.label, "case", "", given=case)

    def case(self, base: Config, prompt_tokens: int, decode_tokens: int) -> Case:
        """The case to measure, with ``base`` as the settings in force. Nothing of the rung is left to them."""
        if self.given is not None:
            return self.given
        if self.name == TRANSFORMERS:
            return Case(self.label, {}, "fp32")
        given: dict[str, Value] = {
            "run.prefill_plan": self.plan,
            "run.decode_plan": self.plan,
            "run.speculate": self.speculate,
            # One chunk is the whole prompt; 0 has the runner cut it into chunks that overlap, where they can.
            "run.chunk_tokens": 0 if self.overlap else prompt_tokens,
            # The products themselves are what is measured, not hiding or checking them.
            "run.privacy": "none",
            "run.verify": "off",
        }
        if self.transport:
            given |= {"run.transport": self.transport, "run.wire_dtype": self.wire}
            if not base.run.endpoint:
                given["server.dtype"] = "fp32"
        return Case(self.label, given, ways=self.ways, decode_tokens=self.steps(decode_tokens))

    def steps(self, decode_tokens: int) -> int:
        """Tokens after the first, where ``decode_tokens`` are asked for."""
        if NO_KV_CACHE in self.ways:
            return min(decode_tokens, WHOLE_CONTEXT_STEPS)
        return min(decode_tokens, FEW_STEPS) if self.track in ("prefill", "beside") else decode_tokens


def _rungs() -> tuple[Rung, ...]:
    both, angles = (NO_KV_CACHE, NO_POSITION_CACHE), (NO_POSITION_CACHE,)
    z, p = facts.ZMQ_ZSTD.name, facts.PIPELINED_ZSTD.name
    return (
        Rung("per-op", "per-op, packed in msgpack", "prefill", "per-op", "zmq", ways=(PACKED,),
             expected_seconds=40.0),
        Rung("batched", "+ batched projections", "prefill", "batched", "zmq", ways=(PACKED,), before="per-op",
             adds="projections that share an input in one RPC", expected_seconds=22.0),
        Rung("raw-frames", "+ raw frames", "prefill", "batched", "zmq", before="batched",
             adds="tensors as frames, without copies"),
        Rung("zstd", "+ zstd", "prefill", "batched", z, before="raw-frames",
             adds="compression where it pays", expected_seconds=15.0),
        Rung("async", "+ async", "prefill", "batched", p, before="zstd",
             adds="many requests in flight", expected_seconds=8.0),
        Rung("attention", "+ attention in the TEE", "prefill", "attention", p, before="async",
             adds="no scores on the link"),
        Rung("fused", "+ fused", "prefill", "fused", p, before="attention",
             adds="the server goes on past the norms", expected_seconds=4.0),
        Rung("fp16", "+ fp16 on the link", "prefill", "fused", p, "fp16", before="fused",
             adds="values of two bytes"),
        Rung("chunks", "+ chunks that overlap", "prefill", "fused", p, "fp16", overlap=True, before="fp16",
             adds="link, server and runner at work at once"),
        Rung("int8", "+ int8 on the link", "prefill", "fused", p, "int8", overlap=True, before="chunks",
             adds="values of one byte"),
        Rung("per-op-raw", "per-op, raw frames", "beside", "per-op", "zmq", before="per-op",
             adds="tensors as frames, without copies"),
        Rung("per-op-async", "per-op, raw frames, async", "beside", "per-op", "pipelined", before="per-op-raw",
             adds="Q, K and V in flight together, gate and up too"),
        Rung("no-kv-cache", "without caches", "decode", "fused", "pipelined", overlap=True, ways=both),
        Rung("kv-cache", "+ KV cache", "decode", "fused", "pipelined", overlap=True, ways=angles,
             before="no-kv-cache", adds="keys and values are kept"),
        Rung("position-cache", "+ position cache", "decode", "fused", "pipelined", overlap=True, before="kv-cache",
             adds="rotary angles are kept"),
        Rung("speculation", "+ speculation", "decode", "fused", "pipelined", overlap=True, speculate=SPECULATE,
             before="position-cache", adds=f"up to {SPECULATE} tokens guessed from the context"),
        Rung("local", "local: all in the TEE", "baseline", facts.LOCAL.name, overlap=True),
        Rung(TRANSFORMERS, "transformers fp32", "baseline", TRANSFORMERS),
    )  # fmt: skip


RUNGS = {rung.name: rung for rung in _rungs()}


def chosen(text: str, *, endpoint: bool, decode_tokens: int) -> list[Rung]:
    """The rungs that ``text`` names, with commas, in the order of ``RUNGS``: names, or ``prefill``, ``decode``,
    ``beside``, ``baseline`` for all of a kind; empty: all. Without names, those that can't be measured are left out.

    ``endpoint``: the server is there already. Raises ``UsageError`` for an unknown name, and for one that can't be.
    """
    asked: set[str] = set()
    for name in (part.strip() for part in text.split(",")) if text else ():
        if name in TRACKS:
            asked |= {rung.name for rung in RUNGS.values() if rung.track == name and not _obstacle(rung, endpoint, 1)}
        elif name in RUNGS:
            if obstacle := _obstacle(RUNGS[name], endpoint, decode_tokens):
                raise UsageError(f"--rungs {name}: {obstacle}")
            asked.add(name)
        else:
            raise UsageError(
                f"--rungs: there is no rung '{name}'{nearest(name, [*RUNGS, *TRACKS])}; there are "
                f"{', '.join(RUNGS)}, and {', '.join(TRACKS)} for all of a kind"
            )
    possible = [rung for rung in RUNGS.values() if not _obstacle(rung, endpoint, decode_tokens)]
    found = [rung for rung in possible if not text or rung.name in asked]
    if not found:
        raise UsageError(f"--rungs {text}: with --decode-tokens 0 there is no decode to measure")
    return found


def _obstacle(rung: Rung, endpoint: bool, decode_tokens: int) -> str:
    """Why ``rung`` can't be measured; empty where it can."""
    if endpoint and PACKED in rung.ways:
        return "it needs a server that packs tensors in msgpack, which the one at --endpoint does not: leave one out"
    if rung.track == "decode" and not decode_tokens:
        return "with --decode-tokens 0 there is no decode to measure"
    return ""


def before(rung: Rung, measured: Sequence[str]) -> str:
    """The nearest rung below ``rung`` that is among ``measured``; empty where there is none."""
    name = rung.before
    while name and name not in measured:
        name = RUNGS[name].before
    return name


def has_expected_shape(spec: ModelSpec, prompt_tokens: int) -> bool:
    """Whether ``expected_seconds`` are of a model and a prompt like these: TinyLlama-1.1B's shape, 1,024 tokens."""
    shape = (spec.layers, spec.hidden_size, spec.intermediate_size, spec.heads, spec.kv_heads)
    return shape == (22, 2048, 5632, 32, 4) and prompt_tokens == 1024

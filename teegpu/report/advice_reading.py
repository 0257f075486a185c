"""A document as advice reads it: its figures by name, and what a phase would have taken with other settings.

A prediction starts from what was measured. The bytes that crossed are scaled by what the formulas of
``metrics.traffic`` say of the two settings, the work on both sides is the run's own, and ``metrics.predict`` puts them
together. Where the formulas do not even explain the run as it was, nothing is predicted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from teegpu import facts
from teegpu.record.events import DECODE, PREFILL
from teegpu.report import look
from teegpu.stats import predict, traffic
from teegpu.stats.linkestimate import LinkFigures
from teegpu.stats.predict import Link, Work
from teegpu.stats.traffic import Shape, Traffic
from transports.addresses import is_local

LOCAL: Final = facts.LOCAL.name

EXPLAINED: Final = (0.7, 1.4)
"""Between these shares of a phase's real time its prediction must lie, or the formulas miss something in it."""

INT8_SERIALIZATION: Final = 1.5
"""Serialization with int8 over that with fp16: 18 % of 1.17 s became 32 % of 1.15 s, network included, on loopback."""

TURNS_SLOWDOWN: Final = 1.25
"""What both sides together take longer where they compute at once and each wants all cores: chunks of 256 tokens took
1.05 to 1.35 times as long as one piece, on loopback and two cores."""

TEE_FLOPS_PER_THREAD: Final = 5e9
"""What one thread of the TEE computes at least where a run does not tell (attention that was left to a GPU)."""


def figure(source: Any, *path: str) -> float:
    """The number at ``path`` in a document, 0 where there is none."""
    for name in path:
        source = source.get(name) if isinstance(source, Mapping) else None
    if isinstance(source, bool) or not isinstance(source, int | float) or not math.isfinite(source):
        return 0.0
    return float(source)


@dataclass(frozen=True)
class Phase:
    """One phase of a document. Seconds are exclusive parts of its wall time; ``busy_…`` are sums over requests."""

    name: str
    plan: str
    overlaps: bool
    data: Mapping[str, Any]

    def __getattr__(self, name: str) -> float:
        """``tokens``, ``seconds``, ``tee_seconds``, …: the document's figures, ``busy_…`` those below ``busy``."""
        if name.startswith("busy_"):
            return figure(self.data, "busy", name.removeprefix("busy_"))
        if name.startswith("compression_"):
            return figure(self.data, "compression", name.removeprefix("compression_"))
        return figure(self.data, name)

    @property
    def remote(self) -> bool:
        return self.plan != LOCAL and self.rpc_calls > 0

    def op_seconds(self, *names: str) -> float:
        return sum(figure(self.data, "ops", name, "seconds") for name in names)


@dataclass(frozen=True)
class Change:
    """Other settings for a phase; None: as they were. ``crossing``: bytes that cross over bytes that there are, up and
    down; ``codec_seconds``: what both sides spend on that, added to each."""

    plan: str | None = None
    wire: str | None = None
    overlaps: bool | None = None
    chunk_tokens: int | None = None
    crossing: tuple[float, float] | None = None
    codec_seconds: tuple[float, float] = (0.0, 0.0)


class Reading:
    """What a document says, by the names that rules use. Nothing here raises, whatever is missing."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self.settings: Mapping[str, Any] = _mapping(document, "settings")
        self.server: Mapping[str, Any] = _mapping(document, "server")
        self.shape = Shape.of(_mapping(document, "model"))
        self.link = Link.of(LinkFigures.from_json(_mapping(document, "link")))
        self.transport = str(self.settings.get("transport", ""))
        self.carrier = facts.TRANSPORTS.get(self.transport)
        self.wire = str(self.settings.get("wire_dtype", ""))
        self.privacy = str(self.settings.get("privacy") or "none")
        self.prefill = self._phase(PREFILL)
        self.decode = self._phase(DECODE)

    @property
    def overlapping(self) -> bool:
        """Whether its transport can have many requests under way."""
        return self.carrier is not None and self.carrier.overlaps

    def _phase(self, name: str) -> Phase:
        data = _mapping(_mapping(self.document, "phases"), name)
        plan = str(self.settings.get(f"{name}_plan", ""))
        overlaps = self.overlapping and figure(data, "chunks") > 1
        return Phase(name, plan, overlaps and name == PREFILL, data)

    @property
    def phases(self) -> tuple[Phase, Phase]:
        return self.prefill, self.decode

    @cached_property
    def seconds(self) -> float:
        return self.prefill.seconds + self.decode.seconds

    @property
    def remote(self) -> bool:
        return self.prefill.remote or self.decode.remote

    @property
    def chunk_tokens(self) -> int:
        return int(figure(self.settings, "chunk_tokens"))

    @property
    def prompt_tokens(self) -> int:
        """Of one prompt, on average."""
        return round(self.prefill.tokens / max(1.0, self.prefill.passes))

    @property
    def cores(self) -> int:
        return int(figure(self.settings, "threads", "cores"))

    @property
    def takes_turns(self) -> bool:
        """Whether threads slept while they waited, so that runner and server could both have all cores."""
        return look.mapping(self.settings, "threads").get("shared") is True

    @property
    def runner_threads(self) -> int:
        return int(figure(self.settings, "threads", "runner"))

    @property
    def server_threads(self) -> int:
        return int(figure(self.server, "threads"))

    @property
    def server_on_cpu(self) -> bool:
        return self.server.get("device") == "cpu"

    @property
    def embedded(self) -> bool:
        """Whether the run started its server itself, so that nobody else uses it."""
        return self.server.get("embedded") is True

    @property
    def same_machine(self) -> bool:
        """Whether the server computes beside the runner: embedded, or at a local address."""
        if self.embedded:
            return True
        addresses = self.settings.get("endpoints") or ()
        return bool(addresses) and all(is_local(str(address).partition("#")[0]) for address in addresses)

    @property
    def shared_cores(self) -> bool:
        """Whether runner and server compute with more threads than there are cores for both."""
        threads = self.runner_threads + self.server_threads
        return self.same_machine and self.server_on_cpu and 0 < self.cores < threads

    def probed(self, phase: Phase, plan: str) -> float | None:
        """The seconds that ``phase`` would take with ``plan``, as the run itself measured before it began; None where
        it did not."""
        known = look.mapping(look.mapping(self.settings, "auto"), "predicted")
        each = figure(known, "decode_step_seconds" if phase.name == DECODE else "prefill_seconds", plan)
        if not each or not phase.tokens:
            return None
        if phase.name == DECODE:
            return each * max(1.0, phase.passes)
        tokens = figure(self.settings, "auto", "prompt_tokens")
        return each * phase.tokens / tokens if tokens else None

    # What would have been

    def saving(self, change: Change, *names: str) -> float | None:
        """Seconds that ``change`` saves over the phases ``names`` (both, where none is named); None where that can't be
        told of one of them. Less than zero where it costs time."""
        total = 0.0
        for phase in self.phases:
            if phase.remote and (not names or phase.name in names):
                seconds = self.predicted(phase, change)
                if seconds is None:
                    return None
                total += phase.seconds - seconds
        return total

    def bytes_share(self, change: Change) -> float:
        """The bytes that would cross the link with ``change``, over those that did."""
        before = after = 0
        for phase in self.phases:
            now, then = self._formula(phase, Change()), self._formula(phase, change)
            if phase.remote and now is not None and then is not None:
                sends = self._as_sent(phase, now, then, change)
                before += int(phase.bytes_up + phase.bytes_down)
                after += sends.bytes_up_with_headers + sends.bytes_down_with_headers
        return after / before if before else 1.0

    def predicted(self, phase: Phase, change: Change) -> float | None:
        """The seconds of ``phase`` with other settings, or None where the run does not tell enough."""
        link = self.link
        if link is None or not phase.remote or not phase.seconds:
            return None
        now, then = self._formula(phase, Change()), self._formula(phase, change)
        if now is None or then is None or not now.rpc_calls:
            return None
        overlaps = phase.overlaps if change.overlaps is None else change.overlaps
        sent, sends = self._as_sent(phase, now, now, Change()), self._as_sent(phase, now, then, change)
        work = self._work(phase)
        changed = self._changed(phase, work, change, sent, sends)
        chunks = int(phase.chunks)
        if change.chunk_tokens and phase.name == PREFILL:
            chunks = traffic.chunk_count(self.prompt_tokens, change.chunk_tokens)
        if phase.overlaps:
            explained = predict.overlapped(sent, link, work, int(phase.chunks)).seconds / phase.seconds
            if not EXPLAINED[0] <= explained <= EXPLAINED[1]:
                return None
            return predict.overlapped(sends, link, changed, chunks).seconds / explained
        link = self._calibrated(phase, sent, link)
        if overlaps and chunks > 1:
            return predict.overlapped(sends, link, changed, chunks).seconds
        return predict.lock_step(sends, link, changed).seconds

    def _calibrated(self, phase: Phase, sent: Traffic, link: Link) -> Link:
        """The link as this phase, in lock step, really had it: with what each round cost beyond the RTT, or quicker
        than its figures by a factor."""
        expected = link.up_seconds(sent) + link.down_seconds(sent) + sent.rounds * link.rtt_seconds
        if phase.network_seconds >= expected or not phase.network_seconds:
            return replace(link, overhead_seconds=(phase.network_seconds - expected) / max(1, sent.rounds))
        quicker = expected / phase.network_seconds
        return Link(
            link.rtt_seconds / quicker, link.up_bytes_per_second * quicker, link.down_bytes_per_second * quicker
        )

    def _formula(self, phase: Phase, change: Change) -> Traffic | None:
        """What the formulas say that ``phase`` sends."""
        shape, plan, wire = self.shape, change.plan or phase.plan, change.wire or self.wire
        if shape is None or plan not in facts.PLANS or wire not in facts.WIRE_DTYPES or not self.prompt_tokens:
            return None
        overlaps = change.overlaps if change.overlaps is not None else self.overlapping
        passes = max(1, int(phase.passes))
        if phase.name == DECODE:
            return traffic.decode(shape, plan, wire, passes=passes, start=self.prompt_tokens, overlaps=overlaps)
        chunk = change.chunk_tokens or self.chunk_tokens or self.prompt_tokens
        one = traffic.prefill(
            shape, plan, wire, tokens=self.prompt_tokens, chunk_tokens=max(1, chunk), overlaps=overlaps
        )
        return one.times(passes)

    def _as_sent(self, phase: Phase, now: Traffic, then: Traffic, change: Change) -> Traffic:
        """``then`` scaled by what was really sent over what the formulas say of it, headers included."""
        up, down = phase.bytes_up, phase.bytes_down
        if change.crossing is not None:
            up = figure(phase.data, "compression", "raw_bytes_up") * change.crossing[0]
            down = figure(phase.data, "compression", "raw_bytes_down") * change.crossing[1]
        up *= then.bytes_up_with_headers / now.bytes_up_with_headers
        down *= then.bytes_down_with_headers / now.bytes_down_with_headers
        calls = phase.rpc_calls * then.rpc_calls / now.rpc_calls
        return Traffic(
            round(calls),
            round(then.rounds * phase.rpc_calls / now.rpc_calls),
            round(up - round(calls) * traffic.HEADER_BYTES_UP),
            round(down - round(calls) * traffic.HEADER_BYTES_DOWN),
        )

    def _work(self, phase: Phase) -> Work:
        # In lock step the server's share is what was waited for, so that the parts are those of the wall.
        gpu, serialization = phase.busy_gpu_seconds, phase.busy_server_serialization_seconds
        if not phase.overlaps:
            gpu, serialization = phase.gpu_seconds, phase.server_seconds
        share = 1.0 if self.shared_cores else 0.0
        if self.takes_turns and not phase.overlaps:  # what overlapping would cost is not in its times yet
            share *= TURNS_SLOWDOWN
        return Work(
            phase.tee_seconds,
            phase.serialization_seconds,
            phase.other_seconds,
            gpu,
            serialization,
            runner_share=share,
            server_share=share,
        )

    def _changed(self, phase: Phase, work: Work, change: Change, now: Traffic, then: Traffic) -> Work:
        tee, gpu = work.tee, work.gpu
        ours, theirs = work.serialization, work.server_serialization
        more = then.rpc_calls - now.rpc_calls
        if change.plan is not None:
            scale = (then.bytes_up + then.bytes_down) / max(1, now.bytes_up + now.bytes_down)
            ours, theirs = ours * scale, theirs * scale
            if self.shape is not None:
                fused = facts.plan(change.plan).fused - facts.plan(phase.plan).fused
                gpu *= self.shape.fused_work**fused
            if facts.plan(phase.plan).remote_attention and not facts.plan(change.plan).remote_attention:
                moved = phase.op_seconds("MATMUL", "MATMUL@gpu")
                gpu = max(0.0, gpu - moved)
                tee += moved if self.server_on_cpu else self._attention_seconds(phase)
        elif change.wire is not None:
            small = predict.INT8_SECONDS_PER_RPC / 2 * then.rpc_calls
            if facts.wire_dtype(change.wire).group:
                ours, theirs = ours * INT8_SERIALIZATION + small, theirs * INT8_SERIALIZATION + small
            elif facts.wire_dtype(self.wire).group:
                ours, theirs = max(ours / 2, ours - small), max(theirs / 2, theirs - small)
        work = replace(
            work,
            tee=tee,
            gpu=gpu,
            serialization=max(0.0, ours + change.codec_seconds[0]),
            server_serialization=max(0.0, theirs + change.codec_seconds[1]),
        )
        return work if change.plan is not None else work.with_rpc_calls(more)

    def _attention_seconds(self, phase: Phase) -> float:
        """Attention in the TEE, computed at a rate that any processor reaches: QKᵀ and AV over the positions seen."""
        shape = self.shape
        if shape is None:
            return 0.0
        prompt = self.prompt_tokens
        positions = phase.tokens * (prompt / 2 if phase.name == PREFILL else prompt + phase.tokens / 2)
        return 4 * shape.q * shape.layers * positions / (TEE_FLOPS_PER_THREAD * max(1, self.runner_threads))

    @property
    def largest_frame_bytes(self) -> int:
        """Of the prefill: what the compression's minimum is held against."""
        shape = self.shape
        if shape is None or self.wire not in facts.WIRE_DTYPES:
            return 0
        tokens = min(self.chunk_tokens or self.prompt_tokens, self.prompt_tokens)
        return traffic.frame_bytes("gate_up", (max(1, tokens), 2 * shape.intermediate), self.wire)


def _mapping(source: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = source.get(name)
    return found if isinstance(found, Mapping) else {}

"""The rules of advice. Each looks at one thing in a run, and says what to change and by how much, or nothing.

A rule is a function of a ``Reading`` that yields ``Advice``. What it claims must follow from this run's figures, from
the formulas of ``metrics.predict``, or from a measurement in ``docs/`` that its text names. Rules about the computation
on both sides are in ``advice_compute``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from teegpu import facts
from teegpu.record.events import PREFILL
from teegpu.report.advice_reading import Change, Phase, Reading, figure
from teegpu.stats.traffic import AUTO_CHUNK_TOKENS, LOCK_STEP_CHUNK_TOKENS
from teegpu.units import human_bytes, human_seconds
from transports.base import COMPRESSED_FROM_BYTES

MIN_SHARE: Final = 0.05
MIN_SECONDS: Final = 0.02
"""A saving of less, as a share of the run or in seconds, is within the noise of two runs."""


@dataclass(frozen=True)
class Advice:
    """``settings``: what to change and to what, by dotted key, the most telling first. ``saving_seconds`` is 0 where
    the advice says something worth knowing that can't be put into seconds."""

    id: str
    text: str
    settings: dict[str, str]
    saving_seconds: float
    evidence: dict[str, Any] = field(default_factory=dict)


Rule = Callable[[Reading], Iterator[Advice]]


def worth(run: Reading, saving: float | None) -> bool:
    return saving is not None and saving >= max(MIN_SECONDS, MIN_SHARE * run.seconds)


def percent(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def retries(run: Reading) -> Advice | None:
    """What there is to say of a run in which requests were lost: how long it would have taken otherwise is not known,
    so nothing can be predicted from it."""
    counts = {phase.name: int(figure(phase.data, "rpc_retries")) for phase in run.phases}
    lost = sum(counts.values())
    if not lost:
        return None
    text = (
        f"{lost:,} request{'s were' if lost > 1 else ' was'} lost and sent again. The time that this took counts as "
        "network, so no other advice is given on this run: look at its notes, and run it again."
    )
    return Advice("retries", text, {}, 0.0, {"rpc_retries": counts})


STALL_SECONDS: Final = 0.5
STALL_SHARE: Final = 0.1
STALL_TIMES: Final = 20.0
"""A request is a stall where it took so long, so large a share of its phase, and so many times what nearly all others
took."""


def stalls(run: Reading) -> list[tuple[Phase, float]]:
    """The phases in which one request took as long as hundreds, and what it took more than others. Requests that
    overlap wait for each other, so there nothing can be told."""
    found = []
    for phase in run.phases:
        worst = figure(phase.data, "rpc_latency", "max_seconds")
        usual = figure(phase.data, "rpc_latency", "p95_seconds")
        least = max(STALL_SECONDS, STALL_SHARE * phase.seconds, STALL_TIMES * usual)
        if phase.remote and not phase.overlaps and worst >= least:
            found.append((phase, worst - usual))
    return found


def stalled(found: list[tuple[Phase, float]]) -> Advice:
    """What there is to say of a run that stood still: it is in nothing else that is said of it."""
    phase, lost = max(found, key=lambda each: each[1])
    text = (
        f"One request of {phase.rpc_calls:,.0f} in {phase.name} took {human_seconds(lost)} more than the others, "
        f"{percent(lost, phase.seconds)} of the phase: the server, the link or this machine stood still. What is said "
        "below leaves that out."
    )
    evidence = {f"{phase.name}_seconds": seconds for phase, seconds in found}
    return Advice("stall", text, {}, sum(seconds for _, seconds in found), evidence)


def without(document: Mapping[str, Any], found: list[tuple[Phase, float]]) -> dict[str, Any]:
    """``document`` as if the stalls had not been: taken off the phase, and off that part of it that is largest, where
    they were counted."""
    phases = dict(document["phases"])
    for phase, seconds in found:
        data = dict(phase.data)
        part = max(("network_seconds", "gpu_seconds", "server_seconds"), key=lambda name: figure(data, name))
        for name in ("seconds", part):
            data[name] = max(0.0, figure(data, name) - seconds)
        phases[phase.name] = data
    return {**document, "phases": phases}


# How a layer is cut into requests


def plan(run: Reading) -> Iterator[Advice]:
    """``fused`` in place of a plan with more rounds, or with scores on the link."""
    for phase in run.phases:
        if not phase.remote or phase.plan == facts.FUSED.name:
            continue
        saving = run.saving(Change(plan=facts.FUSED.name), phase.name)
        if saving is None or not worth(run, saving):
            continue
        evidence = {
            "rpc_calls": int(phase.rpc_calls),
            "rtt_seconds": run.link.rtt_seconds if run.link else None,
            "bytes_up": int(phase.bytes_up),
            "bytes_down": int(phase.bytes_down),
            "network_seconds": phase.network_seconds,
        }
        settings = {f"run.{phase.name}_plan": facts.FUSED.name}
        if facts.plan(phase.plan).remote_attention and _mostly_bytes(run, phase):
            text = (
                f"In {phase.name} the plan {phase.plan} sends attention scores over the link, "
                f"{human_bytes(phase.bytes_up + phase.bytes_down)} in all. With fused, attention stays in the TEE and "
                f"{phase.name} would take about {human_seconds(phase.seconds - saving)}."
            )
            yield Advice("plan-scores", text, settings, saving, evidence)
        else:
            text = (
                f"{phase.name.capitalize()} made {phase.rpc_calls:,.0f} RPC calls with the plan {phase.plan}, and "
                f"{percent(phase.network_seconds, phase.seconds)} of its time was the network. fused needs two a layer."
            )
            yield Advice("plan-rounds", text, settings, saving, evidence)


def _mostly_bytes(run: Reading, phase: Phase) -> bool:
    """Whether the link carried longer than it made the rounds wait."""
    link = run.link
    if link is None:
        return False
    carried = phase.bytes_up / link.up_bytes_per_second + phase.bytes_down / link.down_bytes_per_second
    return carried > phase.rpc_calls * link.rtt_seconds


# How values travel


def wire_dtype(run: Reading) -> Iterator[Advice]:
    """fp16 in place of fp32: half the bytes, at an error that is far below what computing in bf16 costs."""
    if run.wire != facts.FP32.name:
        return
    # A server that computes in bf16 rounds to it anyway: fp16 would keep no more, and round twice.
    rounded = str(run.server.get("dtype")).removesuffix(facts.INT8_WEIGHTS) == facts.BF16.name
    narrow = facts.BF16.name if rounded else facts.FP16.name
    saving = run.saving(Change(wire=narrow))
    if saving is not None and worth(run, saving):
        nbytes = sum(phase.bytes_up + phase.bytes_down for phase in run.phases)
        text = f"With the wire dtype fp32 {human_bytes(nbytes)} crossed the link; {narrow} halves that. " + (
            "The server computes in bf16, and so rounds to it anyway."
            if rounded
            else "It is not exact, but near: KL 2.3e-05 to fp32 on SmolLM2."
        )
        evidence = {"bytes": int(nbytes), "network_seconds": _network(run)}
        yield Advice("wire-dtype", text, {"run.wire_dtype": narrow}, saving, evidence)


def wire_int8(run: Reading) -> Iterator[Advice]:
    """int8 where even two bytes a value hold the run up. Never without what it costs."""
    if run.wire not in (facts.FP16.name, facts.BF16.name):
        return
    saving = run.saving(Change(wire=facts.INT8.name))
    if saving is not None and worth(run, saving):
        nbytes = sum(phase.bytes_up + phase.bytes_down for phase in run.phases)
        less = 1.0 - run.bytes_share(Change(wire=facts.INT8.name))
        text = (
            f"The link carried {human_bytes(nbytes)}, and int8 would take {less:.0%} off. It is lossy: on SmolLM2 "
            "KL 6e-3, and one likeliest token in 27 is another one (docs/accuracy.md)."
        )
        evidence = {"bytes": int(nbytes), "network_seconds": _network(run)}
        yield Advice("wire-int8", text, {"run.wire_dtype": facts.INT8.name}, saving, evidence)


def _network(run: Reading) -> float:
    return sum(phase.network_seconds for phase in run.phases)


# Compression


EXPECTED_CROSSING: Final = {
    "fp32": (0.85, 0.85), "bf16": (0.75, 0.75), "fp16": (0.944, 0.724), "int8": (0.8, 0.8),
}  # fmt: skip
"""Bytes after compression over those before, up and down, on SmolLM2's activations: fp16 as docs/benchmarks.md has it
(200 Mbit/s), the others a little worse than samples of single frames were."""

CODEC_BYTES_PER_SECOND: Final = 0.5e9
"""What zstd with a byte shuffle reaches on one core at least, each way."""


def compression_off(run: Reading) -> Iterator[Advice]:
    """Compression that took longer than it saved."""
    if run.carrier is None or not run.carrier.compresses:
        return
    spent = sum(phase.compression_seconds for phase in run.phases)
    saving = 0.0
    for phase in run.phases:
        if not phase.remote or not phase.compression_seconds:
            continue
        codec = phase.compression_seconds
        saved = run.saving(Change(crossing=(1.0, 1.0), codec_seconds=(-codec, -codec)), phase.name)
        if saved is None:
            return
        saving += saved
    if worth(run, saving):
        saved_bytes = sum(phase.compression_saved_bytes_up + phase.compression_saved_bytes_down for phase in run.phases)
        plain = run.transport.removesuffix("+zstd")
        text = (
            f"Compression took the runner {human_seconds(spent)} and saved {human_bytes(max(0.0, saved_bytes))}, which "
            f"this link carries in less. Without it ({plain}) the run would be shorter."
        )
        evidence = {"compression_seconds": spent, "saved_bytes": int(saved_bytes)}
        yield Advice("compression-off", text, {"run.transport": plain}, saving, evidence)


def compression_on(run: Reading) -> Iterator[Advice]:
    """Compression that would pay."""
    phase = run.prefill
    if not phase.remote or run.carrier is None or run.carrier.compresses or not run.carrier.sockets:
        return
    frame = run.largest_frame_bytes
    if frame < COMPRESSED_FROM_BYTES:
        return
    crossing = EXPECTED_CROSSING[run.wire]
    codec = (phase.bytes_up + phase.bytes_down) / CODEC_BYTES_PER_SECOND
    saving = run.saving(Change(crossing=crossing, codec_seconds=(codec, codec)), PREFILL)
    if saving is None or not worth(run, saving):
        return
    text = (
        f"On a link as slow as this, compression pays: SmolLM2's activations in {run.wire} shrink to "
        f"{crossing[0]:.0%} up and {crossing[1]:.0%} down. It loses nothing."
    )
    evidence = {"largest_frame_bytes": frame, "expected_crossing": list(crossing)}
    yield Advice("compression-on", text, {"run.transport": run.carrier.compressing.name}, saving, evidence)


# How requests overlap


CHUNKS: Final = (64, 128, 256, 512)


def overlap(run: Reading) -> Iterator[Advice]:
    """Chunks under way together, where one request after the other was sent."""
    phase = run.prefill
    carrier = run.carrier
    if not phase.remote or carrier is None or carrier.overlaps or not carrier.sockets:
        return
    if run.prompt_tokens <= AUTO_CHUNK_TOKENS:
        return
    saving = run.saving(Change(overlaps=True, chunk_tokens=AUTO_CHUNK_TOKENS), PREFILL)
    if saving is None or not worth(run, saving):
        return
    transport = carrier.overlapping.name
    settings = {"run.transport": transport}
    if run.chunk_tokens < LOCK_STEP_CHUNK_TOKENS:
        settings["run.chunk_tokens"] = "0"
    text = (
        f"In prefill the link was idle while both sides computed, and they while it carried: {run.transport} has one "
        f"request under way. With {transport} the chunks of the prompt overlap, and prefill would take about "
        f"{human_seconds(phase.seconds - saving)} in place of {human_seconds(phase.seconds)}."
    )
    evidence = {
        "network_seconds": phase.network_seconds,
        "gpu_seconds": phase.gpu_seconds,
        "tee_seconds": phase.tee_seconds,
        "serialization_seconds": phase.serialization_seconds,
    }
    yield Advice("overlap", text, settings, saving, evidence)


def chunk_size(run: Reading) -> Iterator[Advice]:
    """A chunk so small that requests are mostly overhead, or so large that nothing overlaps."""
    phase, now = run.prefill, run.chunk_tokens
    if not phase.remote or not now or (now >= run.prompt_tokens and not run.overlapping):
        return
    overlapping = run.overlapping
    best: tuple[float, int] | None = None
    for chunk in CHUNKS if overlapping else (LOCK_STEP_CHUNK_TOKENS,):
        if not overlapping or chunk < run.prompt_tokens:
            change = Change(overlaps=overlapping, chunk_tokens=chunk)
            saving = run.saving(change, PREFILL) if not now / 2 < chunk < now * 2 else None
            if saving is not None and (best is None or saving > best[0]):
                best = (saving, chunk)
    if best is None or not worth(run, best[0]):
        return
    saving, chunk = best
    value = "0" if not overlapping or chunk == AUTO_CHUNK_TOKENS else str(chunk)
    if chunk > now:
        text = (
            f"Chunks of {now} tokens made {phase.rpc_calls:,.0f} RPC calls of the prefill. With "
            f"{'as few chunks as memory allows' if not overlapping else f'{chunk} tokens'} there are fewer to wait for."
        )
        name = "chunk-too-small"
    else:
        text = (
            f"With {now} tokens a chunk the prompt made {phase.chunks:.0f}, so that little could overlap. Chunks of "
            f"{chunk} keep link, server and runner at work together."
        )
        name = "chunk-too-large"
    evidence = {"chunk_tokens": now, "chunks": int(phase.chunks), "rpc_calls": int(phase.rpc_calls)}
    yield Advice(name, text, {"run.chunk_tokens": value}, saving, evidence)


# What the link's other end does


def server_queue(run: Reading) -> Iterator[Advice]:
    """Requests that waited at the server although they were alone in their connection: others use it. An embedded one
    is nobody else's: what waits there waits for cores."""
    if run.embedded:
        return
    waited = sum(phase.busy_queue_seconds for phase in run.phases if phase.remote and not phase.overlaps)
    if worth(run, waited):
        calls = sum(phase.rpc_calls for phase in run.phases if not phase.overlaps)
        text = (
            f"Requests waited {human_seconds(waited)} in the server's queue, {human_seconds(waited / calls)} each, "
            "though this run had one under way at a time: the server works for others too. Use another one."
        )
        evidence = {"queue_seconds": waited, "rpc_calls": int(calls)}
        yield Advice("server-queue", text, {"run.endpoints": "another server"}, waited, evidence)


RULES: Final[tuple[Rule, ...]] = (
    plan, wire_dtype, wire_int8, compression_off, compression_on, overlap, chunk_size, server_queue,
)  # fmt: skip

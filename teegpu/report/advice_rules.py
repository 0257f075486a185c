"""The rules of advice. Each looks at one thing in a run, and says what to change and by how much, or nothing.

A rule is a function of a ``Reading`` that yields ``Advice``. What it claims must follow from this run's figures, from
the formulas of ``metrics.predict``, or from a measurement in ``docs/`` that its text names. Rules about the computation
on both sides are in ``advice_compute``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from teegpu.metrics.chooser import AUTO_CHUNK_TOKENS, LOCK_STEP_CHUNK_TOKENS
from teegpu.metrics.events import PREFILL
from teegpu.metrics.traffic import SCORES_ON_LINK
from teegpu.report.advice_reading import OVERLAPPING, Change, Phase, Reading, figure
from teegpu.units import human_bytes, human_seconds

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


# How a layer is cut into requests


def plan(run: Reading) -> Iterator[Advice]:
    """``fused`` in place of a plan with more rounds, or with scores on the link."""
    for phase in run.phases:
        if not phase.remote or phase.plan == "fused":
            continue
        saving = run.saving(Change(plan="fused"), phase.name)
        if saving is None or not worth(run, saving):
            continue
        evidence = {
            "rpc_calls": int(phase.rpc_calls),
            "rtt_seconds": run.link.rtt_seconds if run.link else None,
            "bytes_up": int(phase.bytes_up),
            "bytes_down": int(phase.bytes_down),
            "network_seconds": phase.network_seconds,
        }
        settings = {f"run.{phase.name}_plan": "fused"}
        if phase.plan in SCORES_ON_LINK and _mostly_bytes(run, phase):
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
    if run.wire != "fp32":
        return
    saving = run.saving(Change(wire="fp16"))
    if saving is not None and worth(run, saving):
        nbytes = sum(phase.bytes_up + phase.bytes_down for phase in run.phases)
        text = (
            f"With the wire dtype fp32 {human_bytes(nbytes)} crossed the link; fp16 halves that. It is not exact, but "
            "near: KL 2.3e-05 to fp32 on SmolLM2."
        )
        evidence = {"bytes": int(nbytes), "network_seconds": _network(run)}
        yield Advice("wire-dtype", text, {"run.wire_dtype": "fp16"}, saving, evidence)


def wire_int8(run: Reading) -> Iterator[Advice]:
    """int8 where even two bytes a value hold the run up. Never without what it costs."""
    if run.wire not in ("fp16", "bf16"):
        return
    saving = run.saving(Change(wire="int8"))
    if saving is not None and worth(run, saving):
        nbytes = sum(phase.bytes_up + phase.bytes_down for phase in run.phases)
        less = 1.0 - run.bytes_share(Change(wire="int8"))
        text = (
            f"The link carried {human_bytes(nbytes)}, and int8 would take {less:.0%} off. It is lossy: on SmolLM2 "
            "KL 6e-3, and one likeliest token in 27 is another one (docs/accuracy.md)."
        )
        evidence = {"bytes": int(nbytes), "network_seconds": _network(run)}
        yield Advice("wire-int8", text, {"run.wire_dtype": "int8"}, saving, evidence)


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

SMALLER_MINIMUM: Final = 65536


def compression_off(run: Reading) -> Iterator[Advice]:
    """Compression that took longer than it saved."""
    if not run.transport.endswith("+zstd"):
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
    """Compression that would pay, and the minimum that keeps it from the frames of a chunk."""
    phase = run.prefill
    compresses = run.transport.endswith("+zstd")
    if not phase.remote or run.transport not in ("zmq", "zmq+zstd", "pipelined", "pipelined+zstd"):
        return
    minimum, frame = _minimum(run), run.largest_frame_bytes
    if frame < SMALLER_MINIMUM or (compresses and (phase.compression_compressed_bytes or frame >= minimum)):
        return
    crossing = EXPECTED_CROSSING[run.wire]
    codec = (phase.bytes_up + phase.bytes_down) / CODEC_BYTES_PER_SECOND
    saving = run.saving(Change(crossing=crossing, codec_seconds=(codec, codec)), PREFILL)
    if saving is None or not worth(run, saving):
        return
    settings = {} if compresses else {"run.transport": f"{run.transport}+zstd"}
    if frame < minimum:
        settings["compression.min_bytes"] = str(SMALLER_MINIMUM)
    evidence = {"largest_frame_bytes": frame, "min_bytes": minimum, "expected_crossing": list(crossing)}
    if compresses:
        text = (
            f"Nothing was compressed: the largest frame of a chunk has {human_bytes(frame)}, and compression.min_bytes "
            f"is {human_bytes(minimum)}. With {human_bytes(SMALLER_MINIMUM)} on both sides the link would carry less."
        )
        yield Advice("compression-min-bytes", text, settings, saving, evidence)
        return
    also = f", with compression.min_bytes {SMALLER_MINIMUM} on both sides" if frame < minimum else ""
    text = (
        f"On a link as slow as this, compression pays{also}: SmolLM2's activations in {run.wire} shrink to "
        f"{crossing[0]:.0%} up and {crossing[1]:.0%} down. It loses nothing."
    )
    yield Advice("compression-on", text, settings, saving, evidence)


def _minimum(run: Reading) -> int:
    compression = run.settings.get("compression")
    value = compression.get("min_bytes") if isinstance(compression, dict) else None
    return value if isinstance(value, int) else 2**20


# How requests overlap


CHUNKS: Final = (64, 128, 256, 512)


def overlap(run: Reading) -> Iterator[Advice]:
    """Chunks under way together, where one request after the other was sent."""
    phase = run.prefill
    if not phase.remote or run.transport not in ("zmq", "zmq+zstd") or run.prompt_tokens <= AUTO_CHUNK_TOKENS:
        return
    saving = run.saving(Change(overlaps=True, chunk_tokens=AUTO_CHUNK_TOKENS), PREFILL)
    if saving is None or not worth(run, saving):
        return
    transport = run.transport.replace("zmq", OVERLAPPING)
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
    if not phase.remote or not now or (now >= run.prompt_tokens and not run.transport.startswith(OVERLAPPING)):
        return
    overlapping = run.transport.startswith(OVERLAPPING)
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
    """Requests that waited at the server although they were alone in their connection: others use it."""
    waited = sum(phase.busy_queue_seconds for phase in run.phases if phase.remote and not phase.overlaps)
    if worth(run, waited):
        calls = sum(phase.rpc_calls for phase in run.phases if not phase.overlaps)
        text = (
            f"Requests waited {human_seconds(waited)} in the server's queue, {human_seconds(waited / calls)} each, "
            "though this run had one under way at a time: the server works for others too. Use another one."
        )
        evidence = {"queue_seconds": waited, "rpc_calls": int(calls)}
        yield Advice("server-queue", text, {"run.endpoints": "another server"}, waited, evidence)


CURVE_BYTES_PER_SECOND: Final = 0.5e9
CURVE_RANGE: Final = (0.5, 1.6)
"""Shares of that rate between which a connection counts as held up by its encryption."""


def curve(run: Reading) -> Iterator[Advice]:
    """One core encrypts one connection, and that is what the link was as fast as."""
    phase, link = run.prefill, run.link
    if run.settings.get("encrypted") is not True or not phase.remote or link is None:
        return
    busier, rate = max((phase.bytes_up, link.up_bytes_per_second), (phase.bytes_down, link.down_bytes_per_second))
    low, high = (share * CURVE_BYTES_PER_SECOND for share in CURVE_RANGE)
    # Half of it, if two connections carried it, but not below what the rest of the prefill takes.
    saving = min(busier / rate, phase.network_seconds) / 2
    if not low <= rate <= high or not worth(run, saving):
        return
    text = (
        f"The encrypted connection moved {rate / 1e9:.2f} GB/s. One core encrypts about 0.5 GB/s, so that is the limit "
        "and not the network: a second server in run.endpoints, used in turn, has a connection and a core of its own."
    )
    evidence = {"bytes_per_second": rate, "network_seconds": phase.network_seconds}
    yield Advice("curve", text, {"run.spread": "round-robin"}, saving, evidence)


RULES: Final[tuple[Rule, ...]] = (
    plan, wire_dtype, wire_int8, compression_off, compression_on, overlap, chunk_size, server_queue, curve,
)  # fmt: skip

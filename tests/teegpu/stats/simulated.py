"""Runs that never took place: the events that a runner, a link and a server with known speeds would have recorded.

Each of the four places (runner, up, server, down) does one thing after the other, in the order in which it comes.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from teegpu.record import events as ev
from teegpu.stats import traffic
from teegpu.stats.document import document
from teegpu.stats.summary import Summary
from teegpu.stats.traffic import Shape

SMOLLM2 = Shape(layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152)
SMALL = Shape(layers=6, hidden=512, intermediate=1408, heads=8, kv_heads=4, head_dim=64, vocab=8192)


@dataclass
class Speeds:
    """What takes how long. ``tee`` and ``gpu`` are seconds per token and request, ``encode`` seconds per MiB on each
    side of the runner, ``handing_over`` what a request costs on the way beyond the link itself. ``late`` is the most
    that a reply is noticed late."""

    rtt: float = 0.005
    up: float = 125e6
    down: float = 125e6
    tee: float = 4e-6
    gpu: float = 8e-6
    encode: float = 5e-4
    server_encode: float = 5e-4
    queue: float = 0.0
    handing_over: float = 0.0
    late: float = 0.0
    seed: int = 0


@dataclass
class Clocked:
    """Events with a clock that begins at ``at``, in seconds."""

    speeds: Speeds
    at: float = 10.0
    events: list[ev.Event] = field(default_factory=list)
    request_id: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.speeds.seed)

    def lap(self, until: float, part: str, op: str, layer: int, chunk: int = 0, request_id: int = 0) -> None:
        self.events.append(ev.Lap(ns(self.at), ns(until), part, op, layer, chunk, request_id))
        self.at = until

    def run(self, chunks: list[list[tuple[int, int]]], tokens: list[int], ratio: float = 1.0) -> None:
        """``chunks`` of requests (bytes up, bytes down), all under way together; each request needs the reply to the
        one before it. ``ratio``: bytes that cross, of those that there are."""
        speeds = self.speeds
        free = {"up": 0.0, "server": 0.0, "down": 0.0}
        ready: list[tuple[float, int, int, ev.Rpc | None]] = [(self.at, chunk, 0, None) for chunk in range(len(chunks))]
        heapq.heapify(ready)
        while ready:
            arrived, chunk, index, rpc = heapq.heappop(ready)
            n = tokens[chunk]
            layer = max(0, index - 1) // 2
            if rpc is not None:
                self.events.append(rpc)
                self.lap(max(self.at, arrived), ev.WAIT, "WAIT", layer, chunk, rpc.request_id)
                self.lap(self.at + rpc.raw_bytes_down / 2**20 * speeds.encode, ev.SERIALIZATION, "DECODE", layer, chunk)
            if index == len(chunks[chunk]):
                continue
            up, down = chunks[chunk][index]
            self.lap(self.at + n * speeds.tee, ev.TEE, "ATTENTION", layer, chunk)
            self.request_id += 1
            encoded = self.at + up / 2**20 * speeds.encode
            self.lap(encoded, ev.SERIALIZATION, "SEND", layer, chunk, self.request_id)
            reply = self._request(n, up, down, ratio, free, layer, chunk)
            heapq.heappush(ready, (reply.received_ns / 1e9, chunk, index + 1, reply))

    def _request(
        self, n: int, up: int, down: int, ratio: float, free: dict[str, float], layer: int, chunk: int
    ) -> ev.Rpc:
        speeds, sent = self.speeds, self.at
        crossing_up, crossing_down = round(up * ratio), round(down * ratio)
        free["up"] = max(sent, free["up"]) + crossing_up / speeds.up
        arrived = free["up"] + speeds.rtt / 2 + speeds.handing_over / 2
        began = max(arrived + speeds.queue, free["server"])
        decode, compute, encode = up / 2**20 * speeds.server_encode, n * speeds.gpu, down / 2**20 * speeds.server_encode
        free["server"] = began + decode + compute + encode
        free["down"] = max(free["server"], free["down"]) + crossing_down / speeds.down
        received = free["down"] + speeds.rtt / 2 + speeds.handing_over / 2 + self.random.uniform(0, speeds.late)
        return ev.Rpc(
            self.request_id, "q", layer, chunk, ns(sent), ns(received), crossing_up, crossing_down, up, down, 0.0,
            began - arrived, decode, compute, encode, {"LINEAR": (3, compute)},
            compressed_bytes=up + down if ratio < 1 else 0, tried_bytes=up + down if ratio < 1 else 0,
        )  # fmt: skip


def ns(seconds: float) -> int:
    return round(seconds * 1e9)


def requests(shape: Shape, plan: str, wire: str, n: int, start: int, want: traffic.Want) -> Iterator[tuple[int, int]]:
    for up, down, _ in traffic.messages(shape, plan, wire, tokens=n, start=start, want=want):
        yield up + traffic.HEADER_BYTES_UP, down + traffic.HEADER_BYTES_DOWN


def simulate(
    *,
    shape: Shape = SMALL,
    speeds: Speeds | None = None,
    plan: str = "fused",
    decode_plan: str | None = None,
    wire: str = "fp16",
    transport: str = "pipelined",
    prompt: int = 512,
    made: int = 0,
    chunk_tokens: int = 128,
    ratio: float = 1.0,
) -> list[ev.Event]:
    """The events of a run: a prefill of ``prompt`` tokens and ``made`` steps of decode."""
    clock = Clocked(speeds or Speeds())
    sizes = [stop - start for start, stop in pairwise(traffic.chunk_edges(0, prompt, chunk_tokens))]
    clock.events.append(ev.PhaseBegan(ns(clock.at), ev.PREFILL, prompt, len(sizes)))
    chunks = [
        list(requests(shape, plan, wire, n, sum(sizes[:at]), "last" if at == len(sizes) - 1 else "none"))
        for at, n in enumerate(sizes)
    ]
    if plan == "local":
        clock.lap(clock.at + prompt * clock.speeds.tee * shape.layers, ev.TEE, "LINEAR", 0)
    elif transport.startswith("pipelined"):
        clock.run(chunks, sizes, ratio)
    else:
        for chunk, n in zip(chunks, sizes, strict=True):
            clock.run([chunk], [n], ratio)
    clock.lap(clock.at + 1e-5, ev.TEE, "SAMPLING", ev.NO_LAYER)
    clock.events += [ev.TokensMade(ns(clock.at), 1), ev.PhaseEnded(ns(clock.at), ev.PREFILL, prompt, 1)]
    if made:
        clock.events.append(ev.PhaseBegan(ns(clock.at), ev.DECODE, made))
        for step in range(made):
            if (decode_plan or plan) == "local":
                clock.lap(clock.at + clock.speeds.tee * shape.layers, ev.TEE, "LINEAR", 0)
            else:
                clock.run([list(requests(shape, decode_plan or plan, wire, 1, prompt + step, "last"))], [1], ratio)
            clock.lap(clock.at + 1e-5, ev.TEE, "SAMPLING", ev.NO_LAYER)
            clock.events.append(ev.TokensMade(ns(clock.at), 1))
        clock.events.append(ev.PhaseEnded(ns(clock.at), ev.DECODE, made, made))
    return clock.events


def model_of(shape: Shape) -> dict[str, Any]:
    return {
        "name": "simulated",
        "digest": "d" * 64,
        "layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "parameters": shape.layers * shape.layer_values + shape.vocab * shape.hidden,
    }


def run(
    *,
    shape: Shape = SMALL,
    speeds: Speeds | None = None,
    plan: str = "fused",
    decode_plan: str | None = None,
    wire: str = "fp16",
    transport: str = "pipelined",
    chunk_tokens: int = 128,
    settings: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
    measured_link: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """The document of a simulated run. Its link is given, or with ``measured_link`` only what its requests tell."""
    speeds = speeds or Speeds()
    summary = Summary()
    summary.add(
        simulate(
            shape=shape, speeds=speeds, plan=plan, decode_plan=decode_plan, wire=wire, transport=transport,
            chunk_tokens=chunk_tokens, **more,
        )
    )  # fmt: skip
    link = {
        "rtt_seconds": speeds.rtt,
        "bandwidth_up_bytes_per_second": speeds.up if math.isfinite(speeds.up) else None,
        "bandwidth_down_bytes_per_second": speeds.down if math.isfinite(speeds.down) else None,
    }
    remote = plan != "local" or decode_plan not in (None, "local")
    return document(
        run_id="20260101-000000-abcdef",
        status="complete",
        started_at="2026-01-01T00:00:00.000+00:00",
        model=model_of(shape),
        settings={
            "prefill_plan": plan,
            "decode_plan": decode_plan or plan,
            "transport": transport,
            "wire_dtype": wire,
            "chunk_tokens": chunk_tokens,
            "endpoints": ["tcp://10.0.0.7:5555"] if remote else [],
            "link": "",
            "link_figures": None if measured_link or not remote else link,
            "compression": {"level": 1},
            "threads": {"runner": 8, "server": None, "cores": 8},
            "speculate": 0,
        }
        | (settings or {}),
        tee={"kind": "none", "attested": False},
        server={"device": "cuda", "dtype": "bf16", "threads": 1, "embedded": False} | (server or {}) if remote else {},
        summary=summary,
        outputs=(),
    )

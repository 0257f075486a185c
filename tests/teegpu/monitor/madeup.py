"""Made-up runs: the events of a run as a runner would record them, with times that are chosen and not measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from teegpu.record import events as ev

MS = 1_000_000
BEGAN = 5_000 * MS


@dataclass
class Clock:
    at: int = BEGAN

    def pass_(self, nanoseconds: int) -> tuple[int, int]:
        start = self.at
        self.at += nanoseconds
        return start, self.at


@dataclass
class Script:
    """How long things take, in nanoseconds."""

    layers: int = 30
    prompt: int = 1024
    chunks: int = 8
    overlapped: bool = True
    tokens: int = 48
    expected: int = 128
    tee: int = MS // 5
    link: int = MS // 2
    gpu: int = MS // 4
    text: tuple[str, ...] = ()


class MadeUp:
    """Writes events. ``prefill()``, ``token()``, ``end()`` in any order that a runner could have."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or Script()
        self.clock = Clock()
        self.events: list[ev.Event] = []
        self._request = 0
        self._phase = ev.PREFILL
        self.tokens = 0

    def _lap(self, ns: int, part: str, op: str, layer: int, chunk: int, request: int = 0) -> None:
        start, end = self.clock.pass_(ns)
        self.events.append(ev.Lap(start, end, part, op, layer, chunk, request))

    def send(self, layer: int, chunk: int) -> tuple[int, int]:
        self._request += 1
        self._lap(30_000, ev.SERIALIZATION, "ENCODE", layer, chunk)
        self._lap(20_000, ev.SERIALIZATION, "SEND", layer, chunk, self._request)
        return self._request, self.clock.at

    def receive(self, sent: tuple[int, int], layer: int, chunk: int, rows: int, endpoint: int = 0) -> None:
        request, at = sent
        wobble = (request * 7919 % 13 - 6) * 10_000 + (400_000 if layer == 17 else 0)
        end = max(self.clock.at, at + self.script.link + self.script.gpu + wobble)
        gpu = self.script.gpu / 1e9
        self.events.append(
            ev.Rpc(
                request, "z+gate+up", layer, chunk, at, end, 2_400 * rows, 8_300 * rows, 2_400 * rows, 8_300 * rows,
                0.0, 20e-6, 15e-6, gpu, 15e-6,
                {"LINEAR": (3, gpu * 0.9), "LM_HEAD" if layer < 0 else "ADD": (1, gpu * 0.1)}, endpoint=endpoint,
            )
        )  # fmt: skip
        self._lap(end - self.clock.at, ev.WAIT, "WAIT", layer, chunk, request)
        self._lap(40_000, ev.SERIALIZATION, "DECODE", layer, chunk)

    def tee(self, layer: int, chunk: int, rows: int = 1) -> None:
        share = self.script.tee // 5
        for op in ("RMSNORM", "ROTARY", "KV_CACHE", "ATTENTION", "SILU"):
            self._lap(share if op != "ATTENTION" else share + rows * 100, ev.TEE, op, layer, chunk)

    def layer(self, layer: int, chunk: int, rows: int) -> None:
        for _ in range(2):
            self.tee(layer, chunk, rows)
            self.receive(self.send(layer, chunk), layer, chunk, rows)

    def begin_prefill(self) -> None:
        self._phase = ev.PREFILL
        self.events.append(ev.PhaseBegan(self.clock.at, ev.PREFILL, self.script.prompt, self.script.chunks))

    def prefill(self, upto: int | None = None) -> None:
        """``upto``: stop after that many layers (of every chunk), with requests in flight."""
        script = self.script
        self.begin_prefill()
        self._lap(MS, ev.TEE, "EMBEDDING", -1, 0)
        rows = script.prompt // script.chunks
        last = script.layers if upto is None else upto
        if script.overlapped and script.chunks > 1:
            self._staggered(last, rows)
        else:
            for chunk in range(script.chunks):
                for layer in range(last):
                    self.layer(layer, chunk, rows)
        if upto is not None:
            return
        self._lap(MS // 10, ev.TEE, "SAMPLING", -1, 0)
        self._tokens(1)
        self.end(script.prompt)

    def _staggered(self, last: int, rows: int) -> None:
        """Chunk c is at layer s - c in step s: while one is sent, those before it are on their way."""
        chunks, layers = self.script.chunks, self.script.layers
        whole = last == layers
        flying: dict[int, tuple[tuple[int, int], int]] = {}
        for step in range(last + (chunks if whole else 0)):
            for chunk in range(chunks):
                layer = step - chunk
                if chunk in flying:
                    sent, at = flying.pop(chunk)
                    self.receive(sent, at, chunk, rows)
                if 0 <= layer < layers:
                    self.tee(layer, chunk, rows)
                    flying[chunk] = (self.send(layer, chunk), layer)

    def begin_decode(self) -> None:
        self._phase = ev.DECODE
        self.events.append(ev.PhaseBegan(self.clock.at, ev.DECODE, self.script.expected))

    def token(self) -> None:
        for layer in range(self.script.layers):
            self.layer(layer, 0, 1)
        self._lap(MS // 10, ev.TEE, "SAMPLING", -1, 0)
        self._tokens(1)

    def _tokens(self, count: int) -> None:
        if self.tokens < len(self.script.text):
            self.events.append(ev.TextMade(self.clock.at, self.script.text[self.tokens]))
        self.events.append(ev.TokensMade(self.clock.at, count))
        self.tokens += count

    def sample(self) -> None:
        seconds = (self.clock.at - BEGAN) / 1e9
        self.events.append(ev.Sampled(self.clock.at, 412 << 20, 701 << 20, 1.3 * seconds))

    def note(self, text: str) -> None:
        self.events.append(ev.Noted(self.clock.at, text))

    def lose(self, reason: str = "ConnectionLostError", times: int = 1) -> None:
        for _ in range(times):
            request, _ = self.send(3, 0)
            self.clock.pass_(200 * MS)
            self.events.append(ev.Retried(self.clock.at, request, 3, 0, 0, reason))

    def end(self, tokens: int, passes: int = 1) -> None:
        self._lap(10_000, ev.OTHER, "OTHER", -1, 0)
        self.events.append(ev.PhaseEnded(self.clock.at, self._phase, tokens, passes))

    def decode(self, tokens: int | None = None, *, ends: bool = True) -> None:
        count = self.script.tokens if tokens is None else tokens
        self.begin_decode()
        for number in range(count):
            if number % 8 == 0:
                self.sample()
            self.token()
        if ends:
            self.end(count, count)


def meta(script: Script | None = None, **changes: Any) -> dict[str, Any]:
    script = script or Script()
    return {
        "schema": "teegpu.meta/1",
        "id": "20260101-120000-abc123",
        "pid": 1,
        "started_at": "2026-01-01T12:00:00.000+00:00",
        "clock": {"perf_counter_ns": BEGAN, "unix_ns": 1_767_268_800_000_000_000},
        "model": {"name": "smollm2-135m", "digest": "d", "architecture": "llama", "layers": script.layers,
                  "hidden_size": 576, "parameters": 134_515_008},
        "settings": {"prefill_plan": "fused", "decode_plan": "fused", "transport": "pipelined", "wire_dtype": "fp16",
                     "chunk_tokens": 128, "endpoints": [], "link": "rtt=5ms,bandwidth=1gbit",
                     "threads": {"runner": 1, "server": 1, "cores": 2}, "max_tokens": 128, "speculate": 0},
        "tee": {"kind": "none", "attested": False},
        "server": {"device": "cpu", "dtype": "bf16", "version": "0.1.0", "threads": 1, "embedded": True},
        "note": "",
        **changes,
    }  # fmt: skip


@dataclass
class Reader:
    """Gives events as ``teegpu.record.run.EventReader`` does."""

    run: Recorded
    damage: list[str] = field(default_factory=list)
    truncated: bool = False
    at: int = 0
    closed: bool = False

    def read(self, limit: int | None = None) -> list[ev.Event]:
        events = self.run.list[self.at : None if limit is None else self.at + limit]
        self.at += len(events)
        return events

    def close(self) -> None:
        self.closed = True


@dataclass
class Recorded:
    """A run as ``teegpu.record.run.RunFolder`` shows it; ``list`` and ``status`` may change while it is watched."""

    list: list[ev.Event]
    status: str = "running"
    about: dict[str, Any] = field(default_factory=meta)
    result: dict[str, Any] | None = None
    id: str = "20260101-120000-abc123"
    path: Path = Path("nowhere")
    readers: list[Reader] = field(default_factory=list)

    def meta(self) -> dict[str, Any]:
        return self.about

    def events(self) -> Reader:
        self.readers.append(Reader(self))
        return self.readers[-1]

    def document(self) -> dict[str, Any]:
        return self.result or {"schema": "teegpu.report/1", "status": self.status}


def whole_run(script: Script | None = None) -> Iterator[list[ev.Event]]:
    """A run in pieces, as a watcher would get them."""
    made = MadeUp(script)
    made.prefill()
    yield made.events
    made.events = []
    made.begin_decode()
    for _ in range(made.script.tokens):
        made.token()
        yield made.events
        made.events = []
    made.end(made.script.tokens, made.script.tokens)
    yield made.events

"""What the monitor shows at one moment: immutable, made by ``teegpu.monitor.state``, drawn by everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol

from teegpu.report import facts, look

RUNNING: Final = "running"
COMPLETE: Final = "complete"
INTERRUPTED: Final = "interrupted"
FAILED: Final = "failed"
STARTING: Final = "starting"
"""There is no record yet: the model is being loaded."""

ENDED: Final = frozenset({COMPLETE, INTERRUPTED, FAILED})


class Exclusive(Protocol):
    """Totals that have the parts of a time: those of a phase, or of a layer."""

    tee_seconds: float
    serialization_seconds: float
    network_seconds: float
    server_seconds: float
    gpu_seconds: float
    other_seconds: float


class Parts(NamedTuple):
    """Exclusive parts of the runner's time, in seconds (or in seconds per something), in the order of
    ``report.parts.PARTS``."""

    tee: float = 0.0
    serialization: float = 0.0
    network: float = 0.0
    server: float = 0.0
    gpu: float = 0.0
    other: float = 0.0

    @classmethod
    def of(cls, total: Exclusive) -> Parts:
        return cls(
            total.tee_seconds,
            total.serialization_seconds,
            total.network_seconds,
            total.server_seconds,
            total.gpu_seconds,
            total.other_seconds,
        )

    @property
    def total(self) -> float:
        return sum(self)

    @property
    def communication(self) -> float:
        return self.serialization + self.network

    @property
    def communication_share(self) -> float:
        total = self.total
        return self.communication / total if total else 0.0

    def divided(self, by: float) -> Parts:
        return Parts(*(value / by for value in self)) if by else self

    def plus(self, other: Parts) -> Parts:
        return Parts(*(a + b for a, b in zip(self, other, strict=True)))


NO_TIME: Final = Parts()


@dataclass(frozen=True, slots=True)
class PhaseView:
    """One phase over all prompts so far, and how far the one that is running has come.

    ``tokens`` and ``expected`` are of the running (or last) one: in decode ``expected`` is the most that will be made.
    ``fraction`` and ``seconds_left`` are estimates, None where there is nothing to estimate from.
    """

    name: str
    running: bool = False
    passes: int = 0
    tokens: int = 0
    expected: int = 0
    chunks: int = 1
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    fraction: float | None = None
    seconds_left: float | None = None
    parts: Parts = NO_TIME
    rpc_calls: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    raw_bytes_up: int = 0
    raw_bytes_down: int = 0
    compression_seconds: float = 0.0
    queue_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class LayerView:
    """``now``: the pass that is running, or the last one as far as that has not come. ``mean``: per pass of the phase.
    ``worst``: no other layer's mean is longer."""

    layer: int
    now: Parts
    mean: Parts
    worst: bool = False


@dataclass(frozen=True, slots=True)
class OpView:
    phase: str
    name: str
    where: str
    count: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ChunkView:
    """Where a chunk of the prompt is: ``place`` is ``waiting``, ``tee``, ``up``, ``gpu``, ``down`` or ``done``.

    What happens between sending and receiving is not seen: ``up``, ``gpu`` and ``down`` are estimated.
    """

    chunk: int
    layer: int
    place: str


@dataclass(frozen=True, slots=True)
class EndpointView:
    address: str
    rpc_calls: int
    bytes_up: int
    bytes_down: int
    retries: int


@dataclass(frozen=True, slots=True)
class Moment:
    """A stretch of the run's time: its parts, and what it moved. ``seconds`` is its length."""

    at_seconds: float
    seconds: float
    parts: Parts
    bytes_up: float
    bytes_down: float
    tokens: float
    rpc_calls: float

    @property
    def moved(self) -> tuple[float, float, float, float]:
        return self.bytes_up, self.bytes_down, self.tokens, self.rpc_calls


@dataclass(frozen=True, slots=True)
class Note:
    at_seconds: float
    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while a run goes on, fit for a terminal. ``how``: the work is split, in a few words.
    ``remote``: something is computed elsewhere, as far as that is known. ``keys``: None where the record says nothing
    of them. ``serves``: several at once, with room for ``sequences`` and ``kv_room`` bytes of keys and values."""

    run_id: str = ""
    how: tuple[str, ...] = ()
    layers: int = 0
    remote: bool = True
    privacy: str = ""
    transport: str = ""
    endpoints: tuple[str, ...] = ()
    keys: bool | None = None
    device: str = ""
    dtype: str = ""
    server_threads: int = 0
    runner_threads: int = 0
    tee_kind: str = ""
    attested: bool = False
    note: str = ""
    serves: bool = False
    sequences: int = 0
    kv_room: int = 0

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Facts:
        """What a record's ``meta`` says, and defaults for what it does not: it may be another version's."""
        settings, server = look.mapping(meta, "settings"), look.mapping(meta, "server")
        keys = look.at(settings, "encrypted")
        kind = look.text(meta, "tee", "kind")
        return cls(
            run_id=look.text(meta, "id"),
            how=tuple(facts.setup(meta)) if meta else (),
            layers=int(look.amount(meta, "model", "layers")),
            remote=facts.remote(meta),
            privacy=facts.privacy(meta),
            transport=look.text(settings, "transport"),
            endpoints=tuple(look.lines(settings, "endpoints")),
            keys=keys if isinstance(keys, bool) else None,
            device=look.text(server, "device"),
            dtype=look.text(server, "dtype"),
            server_threads=int(look.amount(server, "threads") or look.amount(settings, "threads", "server")),
            runner_threads=int(look.amount(settings, "threads", "runner")),
            tee_kind="" if kind == "none" else kind,
            attested=look.at(meta, "tee", "attested") is True,
            note=look.text(meta, "note"),
            serves=bool(look.mapping(settings, "capacity")),
            sequences=int(look.amount(settings, "capacity", "sequences")),
            kv_room=int(look.amount(settings, "capacity", "kv_bytes")),
        )


NO_FACTS: Final = Facts()


@dataclass(frozen=True, slots=True)
class Spread:
    """Of durations, in seconds; None where there was none."""

    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


@dataclass(frozen=True, slots=True)
class RequestView:
    """A request under way: ``state`` is ``waiting``, ``reading`` or ``generating``, ``read`` and ``made`` are tokens.
    ``ttft_seconds``: None before its first token, ``rate``: tokens a second since."""

    number: int
    state: str
    prompt_tokens: int
    read: int
    made: int
    max_tokens: int
    seconds: float
    ttft_seconds: float | None
    rate: float


@dataclass(frozen=True, slots=True)
class ServingView:
    """A run that serves several at once. ``sequences`` and ``kv_room`` (bytes) are what there is room for, 0: as much
    as comes. ``load``: (running, waiting) over time, means of stretches."""

    sequences: int
    kv_room: int
    running: int
    reading: int
    waiting: int
    kv_bytes: int
    arrived: int
    ended: int
    failed: int
    queue: Spread
    ttft: Spread
    itl: Spread
    requests: tuple[RequestView, ...]
    load: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Latency:
    """Of the calls of the phase (``calls`` of them), in seconds. ``histogram``: (up to so many seconds, how many)."""

    calls: int = 0
    median: float = 0.0
    p95: float = 0.0
    largest: float = 0.0
    histogram: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """``seconds``: the run's age, from its first event. ``phase``: the running one, or the last one, or nothing.

    ``retrying``: a request was lost and no reply has come since. ``text_known``: the generated text is at hand (it is
    not in a record, unless the user wants it there); ``text_private``: it is, and not from the record. ``behind``: the
    record holds more than has been read so far.
    """

    number: int = 0
    status: str = STARTING
    error: str = ""
    seconds: float = 0.0
    facts: Facts = NO_FACTS
    phase: str = ""
    prompt: int = 0
    prefill: PhaseView = PhaseView("prefill")
    decode: PhaseView = PhaseView("decode")
    ttft_seconds: float | None = None
    tpot_median_seconds: float | None = None
    layer: int = -1
    layers: tuple[LayerView, ...] = ()
    layers_phase: str = ""
    now: Parts = NO_TIME
    ops: tuple[OpView, ...] = ()
    chunks: tuple[ChunkView, ...] = ()
    history: tuple[Moment, ...] = ()
    focus: int = 0
    layer_history: tuple[Parts, ...] = ()
    layer_history_passes: int = 1
    latency: Latency = Latency()
    rpc_calls: int = 0
    rpcs_per_token: float = 0.0
    per_op_calls: int = 0
    up_rate: float = 0.0
    down_rate: float = 0.0
    token_rate: float = 0.0
    in_flight: int = 0
    retries: int = 0
    retrying: str = ""
    endpoints: tuple[EndpointView, ...] = ()
    runner_bytes: int = 0
    runner_peak_bytes: int = 0
    server_bytes: int = 0
    runner_cores: float | None = None
    notes: tuple[Note, ...] = ()
    advice: tuple[str, ...] = ()
    text: str = ""
    text_known: bool = False
    text_private: bool = False
    tokens: int = 0
    events: int = 0
    serving: ServingView | None = None
    behind: bool = False
    replay: str = ""
    """How a finished run is being replayed, for people: ``×4``, ``paused``; empty for a live one."""
    document: dict[str, Any] | None = field(default=None, compare=False)
    """The finished run's ``teegpu.report/1``, once there is one."""

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def current(self) -> PhaseView:
        return self.decode if self.phase == "decode" else self.prefill

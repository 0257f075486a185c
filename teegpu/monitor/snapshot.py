"""What the monitor shows at one moment: immutable, made by ``teegpu.monitor.state``, drawn by everything else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

RUNNING: Final = "running"
COMPLETE: Final = "complete"
INTERRUPTED: Final = "interrupted"
FAILED: Final = "failed"
STARTING: Final = "starting"
"""There is no record yet: the model is being loaded."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Exclusive parts of the runner's time, in seconds (or in seconds per something)."""

    tee: float = 0.0
    serialization: float = 0.0
    network: float = 0.0
    server: float = 0.0
    gpu: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        return self.tee + self.serialization + self.network + self.server + self.gpu + self.other

    @property
    def communication(self) -> float:
        return self.serialization + self.network

    @property
    def communication_share(self) -> float:
        total = self.total
        return self.communication / total if total else 0.0

    @property
    def bars(self) -> tuple[float, ...]:
        """In the order of ``draw.PARTS``."""
        return (self.tee, self.serialization, self.network, self.server, self.gpu, self.other)

    def divided(self, by: float) -> Parts:
        return Parts(*(value / by for value in self.bars)) if by else self


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
    parts: Parts = Parts()
    rpc_calls: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    raw_bytes_up: int = 0
    raw_bytes_down: int = 0
    compression_seconds: float = 0.0
    queue_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


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


@dataclass(frozen=True, slots=True)
class Note:
    at_seconds: float
    text: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while a run goes on: from the record's ``meta.json``."""

    run_id: str = ""
    started_at: str = ""
    model: str = ""
    layers: int = 0
    parameters: int = 0
    prefill_plan: str = ""
    decode_plan: str = ""
    transport: str = ""
    wire_dtype: str = ""
    privacy: str = "none"
    verified: bool = False
    link: str = ""
    endpoints: tuple[str, ...] = ()
    keys: bool | None = None
    embedded: bool = False
    device: str = ""
    dtype: str = ""
    server_threads: int | None = None
    runner_threads: int | None = None
    tee_kind: str = "none"
    attested: bool = False
    note: str = ""
    chunk_tokens: int = 0
    speculate: int = 0
    max_tokens: int = 0

    @property
    def plan(self) -> str:
        if self.decode_plan in ("", self.prefill_plan):
            return self.prefill_plan
        return f"{self.prefill_plan} / {self.decode_plan}"


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
    not in a record, unless the user wants it there). ``behind``: the record holds more than has been read so far.
    """

    number: int = 0
    status: str = STARTING
    error: str = ""
    seconds: float = 0.0
    facts: Facts = Facts()
    phase: str = ""
    prompt: int = 0
    prefill: PhaseView = PhaseView("prefill")
    decode: PhaseView = PhaseView("decode")
    ttft_seconds: float | None = None
    tpot_median_seconds: float | None = None
    layer: int = -1
    layers: tuple[LayerView, ...] = ()
    layers_phase: str = ""
    now: Parts = Parts()
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
    tokens: int = 0
    events: int = 0
    behind: bool = False
    replay: str = ""
    """How a finished run is being replayed, for people: ``×4``, ``paused``; empty for a live one."""
    document: dict[str, Any] | None = field(default=None, compare=False)
    """The finished run's ``teegpu.report/1``, once there is one."""

    @property
    def ended(self) -> bool:
        return self.status in (COMPLETE, INTERRUPTED, FAILED)

    @property
    def current(self) -> PhaseView:
        return self.decode if self.phase == "decode" else self.prefill

    @property
    def parts(self) -> Parts:
        """Of the whole run."""
        return Parts(*(a + b for a, b in zip(self.prefill.parts.bars, self.decode.parts.bars, strict=True)))

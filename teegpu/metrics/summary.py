"""Events to numbers. Pure: no clock, no I/O. Takes events as they come and keeps sums, so its memory stays bounded."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from teegpu.metrics import events as ev

MAX_SAMPLES = 100_000
"""Token times that are kept for the median and p95: more than any context holds."""


@dataclass(slots=True)
class OpTotal:
    """``where`` is ``tee`` or ``gpu``; ``seconds`` of a ``gpu`` operation are the server's busy time.

    A phase has operations by name; should one name run in both places, the second is kept as ``NAME@where``.
    """

    where: str
    count: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class LayerTotal:
    tee_seconds: float = 0.0
    serialization_seconds: float = 0.0
    network_seconds: float = 0.0
    server_seconds: float = 0.0
    gpu_seconds: float = 0.0


@dataclass(slots=True)
class BusyTotal:
    """Sums over requests, which may overlap: not parts of any wall time."""

    round_trip_seconds: float = 0.0
    network_seconds: float = 0.0
    queue_seconds: float = 0.0
    server_serialization_seconds: float = 0.0
    gpu_seconds: float = 0.0
    compression_seconds: float = 0.0


@dataclass(slots=True)
class PhaseTotal:
    """One phase. ``seconds`` = tee + serialization + wait + other; wait = network + server + gpu, as exposed.

    ``server_seconds`` are the server's queue and its own serialization, ``gpu_seconds`` its computation; of both, the
    share for which the runner waited.
    """

    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0
    tee_seconds: float = 0.0
    serialization_seconds: float = 0.0
    wait_seconds: float = 0.0
    other_seconds: float = 0.0
    network_seconds: float = 0.0
    server_seconds: float = 0.0
    gpu_seconds: float = 0.0
    rpc_calls: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    raw_bytes_up: int = 0
    raw_bytes_down: int = 0
    tried_bytes: int = 0
    compressed_bytes: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    busy: BusyTotal = field(default_factory=BusyTotal)
    ops: dict[str, OpTotal] = field(default_factory=dict)
    layers: dict[int, LayerTotal] = field(default_factory=dict)

    @property
    def communication_share(self) -> float:
        """Serialization and network as a fraction of the wall time."""
        return (self.serialization_seconds + self.network_seconds) / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Summary:
    """Adds events up. Give its ``add`` to a recorder as a sink.

    ``ttft_seconds``: from the start of the first prompt's prefill to its first token, or None before that.
    ``tpot_seconds``: the time of each later output token since the one before it, the first of each prompt left out.
    A phase's ``seconds``, ``tokens`` and ``passes`` are there when it has ended.
    """

    def __init__(self) -> None:
        self.phases: dict[str, PhaseTotal] = {}
        self.ttft_seconds: float | None = None
        self.tpot_seconds: list[float] = []
        self._last_token_ns: int | None = None
        self._phase: PhaseTotal | None = None
        self._began_ns = 0
        self._prompt_began_ns = 0
        self._rpcs: dict[int, ev.Rpc] = {}

    def add(self, events: Iterable[ev.Event]) -> None:
        for event in events:
            if isinstance(event, ev.Lap):
                self._lap(event)
            elif isinstance(event, ev.Rpc):
                self._rpc(event)
            elif isinstance(event, ev.TokensMade):
                self._tokens(event)
            elif isinstance(event, ev.PhaseBegan):
                self._began_ns = event.at_ns
                if event.phase == ev.PREFILL:
                    self._prompt_began_ns = event.at_ns
                    self._last_token_ns = None
                self._phase = self.phases.setdefault(event.phase, PhaseTotal())
            elif self._phase is None:
                continue
            elif isinstance(event, ev.PhaseEnded):
                self._phase.tokens += event.tokens
                self._phase.passes += event.passes
                self._phase.seconds += (event.at_ns - self._began_ns) / 1e9
                self._phase = None
                self._rpcs.clear()
            elif isinstance(event, ev.Speculated):
                self._phase.drafted_tokens += event.drafted
                self._phase.accepted_tokens += event.accepted

    def _lap(self, lap: ev.Lap) -> None:
        phase = self._phase
        if phase is None:
            return
        seconds = (lap.end_ns - lap.start_ns) / 1e9
        layer = phase.layers.setdefault(lap.layer, LayerTotal()) if lap.layer >= 0 else None
        if lap.part == ev.TEE:
            phase.tee_seconds += seconds
            total = _operation(phase, lap.op, "tee")
            total.count += 1
            total.seconds += seconds
            if layer:
                layer.tee_seconds += seconds
        elif lap.part == ev.SERIALIZATION:
            phase.serialization_seconds += seconds
            if layer:
                layer.serialization_seconds += seconds
        elif lap.part == ev.WAIT:
            phase.wait_seconds += seconds
            self._wait(phase, layer, lap, seconds)
        else:
            phase.other_seconds += seconds

    def _wait(self, phase: PhaseTotal, layer: LayerTotal | None, lap: ev.Lap, seconds: float) -> None:
        rpc = self._rpcs.pop(lap.request_id, None)
        server, gpu = exposed(lap, rpc) if rpc is not None else (0.0, 0.0)
        network = max(0.0, seconds - server - gpu)
        phase.server_seconds += server
        phase.gpu_seconds += gpu
        phase.network_seconds += network
        if layer:
            layer.server_seconds += server
            layer.gpu_seconds += gpu
            layer.network_seconds += network

    def _rpc(self, rpc: ev.Rpc) -> None:
        phase = self._phase
        if phase is None:
            return
        self._rpcs[rpc.request_id] = rpc
        phase.rpc_calls += 1
        phase.bytes_up += rpc.bytes_up
        phase.bytes_down += rpc.bytes_down
        phase.raw_bytes_up += rpc.raw_bytes_up
        phase.raw_bytes_down += rpc.raw_bytes_down
        phase.tried_bytes += rpc.tried_bytes
        phase.compressed_bytes += rpc.compressed_bytes
        queue, decode, compute, encode = server_parts(rpc)
        round_trip = (rpc.received_ns - rpc.sent_ns) / 1e9
        phase.busy.round_trip_seconds += round_trip
        phase.busy.queue_seconds += queue
        phase.busy.server_serialization_seconds += decode + encode
        phase.busy.gpu_seconds += compute
        phase.busy.network_seconds += max(0.0, round_trip - queue - decode - compute - encode)
        phase.busy.compression_seconds += rpc.compression_seconds
        # As with the parts: the operations can't have taken longer than the computation that they are.
        claimed = sum(seconds for _, seconds in rpc.operations.values())
        scale = compute / claimed if claimed > compute else 1.0
        for name, (count, seconds) in rpc.operations.items():
            total = _operation(phase, name, "gpu")
            total.count += count
            total.seconds += seconds * scale

    def _tokens(self, event: ev.TokensMade) -> None:
        """Tokens that arrive together share the time since those before them equally."""
        if self._last_token_ns is None:
            if self.ttft_seconds is None:
                self.ttft_seconds = (event.at_ns - self._prompt_began_ns) / 1e9
        elif event.tokens and len(self.tpot_seconds) < MAX_SAMPLES:
            each = (event.at_ns - self._last_token_ns) / 1e9 / event.tokens
            self.tpot_seconds.extend([each] * event.tokens)
        self._last_token_ns = event.at_ns

    def tpot_percentile(self, fraction: float) -> float | None:
        """The ``fraction`` quantile (0.5: the median) of the seconds per output token, or None before the second."""
        samples = sorted(self.tpot_seconds)
        if not samples:
            return None
        if fraction == 0.5:
            return statistics.median(samples)
        return samples[min(len(samples) - 1, round(fraction * (len(samples) - 1)))]


def _operation(phase: PhaseTotal, name: str, where: str) -> OpTotal:
    total = phase.ops.setdefault(name, OpTotal(where))
    return total if total.where == where else phase.ops.setdefault(f"{name}@{where}", OpTotal(where))


def server_parts(rpc: ev.Rpc) -> tuple[float, float, float, float]:
    """(queue, decode, compute, encode) seconds as the server claims them, scaled down where they exceed the round trip:
    the server is not trusted, and its clock is not ours."""
    parts = (rpc.queue_seconds, rpc.decode_seconds, rpc.compute_seconds, rpc.encode_seconds)
    claimed = sum(parts)
    round_trip = max(0.0, (rpc.received_ns - rpc.sent_ns) / 1e9)
    if claimed <= round_trip:
        return parts
    scale = round_trip / claimed
    return parts[0] * scale, parts[1] * scale, parts[2] * scale, parts[3] * scale


def exposed(lap: ev.Lap, rpc: ev.Rpc) -> tuple[float, float]:
    """How much of a wait fell on the server's (queue + serialization, computation) for the request that ended it.

    The request's time is laid out as link up, queue, decode, compute, encode, link down; the two link parts share what
    the server did not claim in proportion to their bytes, since the clocks of the two sides are not compared. The wait
    is then intersected with that line. A lock-step wait covers all of it, an overlapped one only its end.
    """
    queue, decode, compute, encode = server_parts(rpc)
    network = (rpc.received_ns - rpc.sent_ns) / 1e9 - (queue + decode + compute + encode)
    nbytes = rpc.bytes_up + rpc.bytes_down
    at = network * (rpc.bytes_up / nbytes if nbytes else 0.5)
    waited_from = (lap.start_ns - rpc.sent_ns) / 1e9
    waited_to = (lap.end_ns - rpc.sent_ns) / 1e9
    server = gpu = 0.0
    for seconds, is_gpu in ((queue, False), (decode, False), (compute, True), (encode, False)):
        overlap = max(0.0, min(at + seconds, waited_to) - max(at, waited_from))
        at += seconds
        if is_gpu:
            gpu += overlap
        else:
            server += overlap
    return server, gpu

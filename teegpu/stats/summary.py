"""Events to numbers. Pure: no clock, no I/O. Takes events as they come and keeps sums, so its memory stays bounded.

It can be asked at any time: while a run goes on, or at the end of a log that breaks off, a phase has what there was up
to its last event, and its parts add up to that.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from teegpu.record import events as ev
from teegpu.stats.linkestimate import LinkEstimator
from teegpu.stats.requests import Requests
from teegpu.stats.totals import EndpointTotal, LayerTotal, OpTotal, PhaseTotal

_OF_REQUESTS = (ev.Stepped, ev.Arrived, ev.Admitted, ev.GaveWay, ev.Left)

MAX_SAMPLES = 100_000
"""Token times that are kept for the median and p95: more than any context holds."""

MAX_WAITED_FOR = 4096
"""Requests whose wait has not been seen yet. A window holds far fewer; a damaged log may hold any number."""

MAX_NAMES = 4096
"""Layers, operations and servers that are told apart: more than any run has. What a damaged log names beyond that is
counted in the sums only."""


@dataclass(slots=True)
class PeakMemory:
    """The most that was sampled, in bytes; 0: never sampled, or not known."""

    runner_bytes: int = 0
    server_bytes: int = 0


class Summary:
    """Adds events up. Give its ``add`` to a recorder as a sink.

    ``ttft_seconds``: from the start of the first prompt's prefill to its first token, or None before that.
    ``tpot_seconds``: the time of each later output token since the one before it, the first of each prompt left out.
    ``generated_tokens``: all that reached the user. ``endpoints``: by the index of the server. ``link``: what the calls
    of servers tell about the link. ``requests``: of an engine that serves several at once.

    A phase's ``seconds`` reach to the last event; its ``tokens`` and ``passes`` are exact when it has ended, and count
    what was handed to the user before.
    """

    def __init__(self) -> None:
        self.phases: dict[str, PhaseTotal] = {}
        self.endpoints: dict[int, EndpointTotal] = {}
        self.memory = PeakMemory()
        self.link = LinkEstimator()
        self.requests = Requests()
        self.ttft_seconds: float | None = None
        self.tpot_seconds: list[float] = []
        self.generated_tokens = 0
        self._last_token_ns: int | None = None
        self._prompt_began_ns = 0
        self._rpcs: dict[int, ev.Rpc] = {}
        # Of the phase under way: what it is, what it had before, where its clock stands.
        self._phase: PhaseTotal | None = None
        self._name = ""
        self._expected_tokens = 0
        self._counted_tokens = 0
        self._counted_passes = 0
        self._at_ns = 0

    def add(self, events: Iterable[ev.Event]) -> None:
        for event in events:
            if isinstance(event, ev.Lap):
                self._lap(event)
            elif isinstance(event, ev.Rpc):
                self._rpc(event)
            elif isinstance(event, ev.TokensMade):
                self._tokens(event)
            elif isinstance(event, ev.Sampled):
                self.memory.runner_bytes = max(self.memory.runner_bytes, event.runner_bytes)
                self.memory.server_bytes = max(self.memory.server_bytes, event.server_bytes)
            elif isinstance(event, ev.PhaseBegan):
                self._begin(event)
            elif isinstance(event, _OF_REQUESTS):
                self.requests.add(event)
            elif self._phase is None:
                continue
            elif isinstance(event, ev.PhaseEnded):
                self._end(self._phase, event)
            elif isinstance(event, ev.Speculated):
                self._phase.drafted_tokens += event.drafted
                self._phase.accepted_tokens += event.accepted
            elif isinstance(event, ev.Retried):
                self._phase.rpc_retries += 1
                self._endpoint(event.endpoint).retries += 1

    # Phases

    def _begin(self, event: ev.PhaseBegan) -> None:
        """A phase that is still open ends where its last event left it: the end of it was lost."""
        self._at_ns = event.at_ns
        if event.phase == ev.PREFILL:
            self._prompt_began_ns = event.at_ns
            self._last_token_ns = None
        self._name = event.phase
        self._phase = self.phases.setdefault(event.phase, PhaseTotal())
        self._phase.chunks = max(self._phase.chunks, event.chunks)
        self._expected_tokens = event.tokens
        self._counted_tokens = self._counted_passes = 0
        self._rpcs.clear()

    def _end(self, phase: PhaseTotal, event: ev.PhaseEnded) -> None:
        if event.phase == self._name:
            self._pass_to(phase, event.at_ns)
            phase.tokens += event.tokens - self._counted_tokens
            phase.passes += event.passes - self._counted_passes
        else:  # the beginning of that phase was lost, and its time with it
            lost = self.phases.setdefault(event.phase, PhaseTotal())
            lost.tokens += event.tokens
            lost.passes += event.passes
        self._phase = None
        self._rpcs.clear()

    def _pass_to(self, phase: PhaseTotal, at_ns: int) -> None:
        """Moves the clock of the phase on. Time that no lap covers (the log has lost them) is ``other``."""
        if at_ns <= self._at_ns:
            return
        seconds = (at_ns - self._at_ns) / 1e9
        phase.seconds += seconds
        phase.other_seconds += seconds
        phase.outside.other_seconds += seconds
        self._at_ns = at_ns

    # Laps

    def _lap(self, lap: ev.Lap) -> None:
        phase = self._phase
        if phase is None:
            return
        if lap.start_ns != self._at_ns:
            # Not where the last one ended: laps were lost, or the clock went backwards. No instant counts twice.
            self._pass_to(phase, lap.start_ns)
            lap = lap._replace(start_ns=self._at_ns, end_ns=max(lap.end_ns, self._at_ns))
        seconds = max(0, lap.end_ns - lap.start_ns) / 1e9
        self._at_ns = max(self._at_ns, lap.end_ns)
        phase.seconds += seconds
        layer = _layer(phase, lap.layer)
        if lap.part == ev.TEE:
            phase.tee_seconds += seconds
            layer.tee_seconds += seconds
            total = _operation(phase, lap.op, "tee")
            total.count += 1
            total.seconds += seconds
        elif lap.part == ev.SERIALIZATION:
            phase.serialization_seconds += seconds
            layer.serialization_seconds += seconds
        elif lap.part == ev.WAIT:
            phase.wait_seconds += seconds
            self._wait(phase, layer, lap, seconds)
        else:
            phase.other_seconds += seconds
            layer.other_seconds += seconds

    def _wait(self, phase: PhaseTotal, layer: LayerTotal, lap: ev.Lap, seconds: float) -> None:
        rpc = self._rpcs.pop(lap.request_id, None)
        server = gpu = 0.0
        if rpc is not None:
            server, gpu = exposed(lap, rpc)
            if seconds > 0.0:
                self.link.waited(rpc.received_ns)
        network = max(0.0, seconds - server - gpu)
        phase.server_seconds += server
        phase.gpu_seconds += gpu
        phase.network_seconds += network
        layer.server_seconds += server
        layer.gpu_seconds += gpu
        layer.network_seconds += network

    # Requests

    def _rpc(self, rpc: ev.Rpc) -> None:
        phase = self._phase
        if phase is None:
            return
        self._rpcs[rpc.request_id] = rpc
        if len(self._rpcs) > MAX_WAITED_FOR:
            del self._rpcs[next(iter(self._rpcs))]
        phase.rpc_calls += 1
        phase.bytes_up += rpc.bytes_up
        phase.bytes_down += rpc.bytes_down
        phase.raw_bytes_up += rpc.raw_bytes_up
        phase.raw_bytes_down += rpc.raw_bytes_down
        phase.tried_bytes += rpc.tried_bytes
        phase.compressed_bytes += rpc.compressed_bytes
        endpoint = self._endpoint(rpc.endpoint)
        endpoint.rpc_calls += 1
        endpoint.bytes_up += rpc.bytes_up
        endpoint.bytes_down += rpc.bytes_down
        queue, decode, compute, encode = server_parts(rpc)
        round_trip = max(0, rpc.received_ns - rpc.sent_ns) / 1e9
        network = max(0.0, round_trip - queue - decode - compute - encode)
        phase.latencies.add(round_trip)
        phase.busy.round_trip_seconds += round_trip
        phase.busy.queue_seconds += queue
        phase.busy.server_serialization_seconds += decode + encode
        phase.busy.gpu_seconds += compute
        phase.busy.network_seconds += network
        phase.busy.compression_seconds += rpc.compression_seconds
        self.link.add(rpc, network)
        # As with the parts: the operations can't have taken longer than the computation that they are.
        claimed = sum(seconds for _, seconds in rpc.operations.values())
        scale = compute / claimed if claimed > compute else 1.0
        for name, (count, seconds) in rpc.operations.items():
            total = _operation(phase, name, "gpu")
            total.count += count
            total.seconds += seconds * scale

    def _endpoint(self, index: int) -> EndpointTotal:
        known = self.endpoints.get(index)
        if known is not None:
            return known
        if len(self.endpoints) >= MAX_NAMES:
            return EndpointTotal()
        return self.endpoints.setdefault(index, EndpointTotal())

    # Tokens

    def _tokens(self, event: ev.TokensMade) -> None:
        """Tokens that arrive together share the time since those before them equally."""
        self._count(event.tokens)
        self.generated_tokens += event.tokens
        if self._last_token_ns is None:
            if self.ttft_seconds is None:
                self.ttft_seconds = max(0, event.at_ns - self._prompt_began_ns) / 1e9
        elif event.tokens and len(self.tpot_seconds) < MAX_SAMPLES and not self.requests:
            each = max(0, event.at_ns - self._last_token_ns) / 1e9 / event.tokens
            self.tpot_seconds.extend([each] * event.tokens)
        self._last_token_ns = event.at_ns

    def _count(self, made: int) -> None:
        """What a phase has done so far, in case that its end is never told: a token ends the prompt's prefill."""
        phase = self._phase
        if phase is None or (self._name == ev.PREFILL and self._counted_passes):
            return
        tokens = self._expected_tokens if self._name == ev.PREFILL else made
        phase.tokens += tokens
        phase.passes += 1
        self._counted_tokens += tokens
        self._counted_passes += 1

    def tpot_percentile(self, fraction: float) -> float | None:
        """The ``fraction`` quantile (0.5: the median) of the seconds per output token, or None before the second."""
        samples = sorted(self.tpot_seconds)
        if not samples:
            return None
        if fraction == 0.5:
            return statistics.median(samples)
        return samples[min(len(samples) - 1, round(fraction * (len(samples) - 1)))]


def _layer(phase: PhaseTotal, layer: int) -> LayerTotal:
    """The totals of ``layer``, or of what belongs to none."""
    known = phase.layers.get(layer)
    if known is not None:
        return known
    if layer < 0 or len(phase.layers) >= MAX_NAMES:
        return phase.outside
    return phase.layers.setdefault(layer, LayerTotal())


def _operation(phase: PhaseTotal, name: str, where: str) -> OpTotal:
    total = phase.ops.get(name)
    if total is None:
        if len(phase.ops) >= MAX_NAMES:
            return OpTotal(where)
        total = phase.ops[name] = OpTotal(where)
    return total if total.where == where else phase.ops.setdefault(f"{name}@{where}", OpTotal(where))


# What a wait was for: the server's claims, held against what the runner saw, laid over the wait


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

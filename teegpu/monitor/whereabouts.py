"""Where the run is: its layer, its requests in flight, and each chunk of an overlapped prefill. Pure."""

from __future__ import annotations

from typing import Final

from teegpu.monitor.snapshot import ChunkView
from teegpu.record import events as ev

_SMOOTHING: Final = 0.1
"""Weight of the latest request in the estimates of a request's length and the server's share of it."""

MAX_IN_FLIGHT: Final = 100_000
"""Requests that are remembered as on their way: no transport has so many, but an event log may be damaged."""


class Whereabouts:
    """Is told of every lap and reply. ``layer``: the one of the latest lap, -1 outside of the layers."""

    def __init__(self) -> None:
        self.layer = -1
        self._flying: dict[int, ev.Lap] = {}
        self._latest: dict[int, ev.Lap] = {}
        self._chunks = 1
        self._by_chunk = False
        self._round_trip_ns = 0.0
        self._server_share = 0.5

    def begin(self, at_ns: int, prefill: bool, chunks: int) -> None:  # noqa: ARG002 (the phase's begin is a border)
        self.clear()
        self._by_chunk = prefill
        self._chunks = chunks

    def clear(self) -> None:
        self.layer = -1
        self._flying.clear()
        self._latest.clear()

    def pass_ended(self) -> None:
        self.layer = -1

    @property
    def in_flight(self) -> int:
        return len(self._flying)

    def lap(self, lap: ev.Lap) -> None:
        self.layer = lap.layer
        if lap.op == "SEND":
            if len(self._flying) >= MAX_IN_FLIGHT:
                self._flying.clear()
            self._flying[lap.request_id] = lap
        if self._by_chunk and lap.layer >= 0:
            self._latest[lap.chunk] = lap

    def answered(self, rpc: ev.Rpc) -> None:
        self._flying.pop(rpc.request_id, None)
        length = rpc.received_ns - rpc.sent_ns
        if length <= 0:
            return
        at_server = rpc.queue_seconds + rpc.decode_seconds + rpc.compute_seconds + rpc.encode_seconds
        share = min(1.0, at_server * 1e9 / length)
        if not self._round_trip_ns:
            self._round_trip_ns, self._server_share = length, share
        self._round_trip_ns += _SMOOTHING * (length - self._round_trip_ns)
        self._server_share += _SMOOTHING * (share - self._server_share)

    def lost(self, request_id: int) -> None:
        self._flying.pop(request_id, None)

    def progress(self, layers: int) -> float:
        """How much of a prefill is done, 0 to 1: the layers that its chunks have come to."""
        if not layers:
            return 0.0
        reached = sum(lap.layer for lap in self._latest.values())
        return min(1.0, reached / (layers * self._chunks))

    def chunks(self, now_ns: int, layers: int) -> tuple[ChunkView, ...]:
        """Where each chunk of a prefill in several chunks is; empty otherwise."""
        if not self._by_chunk or self._chunks < 2:
            return ()
        sent: dict[int, ev.Lap] = {lap.chunk: lap for lap in self._flying.values()}
        return tuple(self._chunk(number, sent.get(number), now_ns, layers) for number in range(self._chunks))

    def _chunk(self, number: int, sent: ev.Lap | None, now_ns: int, layers: int) -> ChunkView:
        latest = self._latest.get(number)
        layer = latest.layer if latest is not None else 0
        if sent is not None:
            return ChunkView(number, layer, self._place(now_ns - sent.end_ns))
        if latest is None:
            return ChunkView(number, 0, "waiting")
        # The last layer of a chunk whose logits nobody wants ends at its keys and values.
        if layer >= layers - 1 and latest.op == "KV_CACHE" and number < self._chunks - 1:
            return ChunkView(number, layer, "done")
        return ChunkView(number, layer, "tee")

    def _place(self, flown_ns: int) -> str:
        """Link up, server or link down, by how long a request has been on its way and where one usually is then."""
        link = (1.0 - self._server_share) / 2
        done = flown_ns / self._round_trip_ns if self._round_trip_ns else 0.0
        if done < link:
            return "up"
        return "gpu" if done < 1.0 - link else "down"

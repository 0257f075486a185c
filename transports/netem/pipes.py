"""The two pipes of an emulated link, its clock, and what travels. No system calls but the reading of the time."""

from __future__ import annotations

import math
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from random import Random

BUFFER_SECONDS = 0.010
CHUNK_SECONDS = 0.001  # of the rate: finer costs processor time, coarser holds a small message behind a large one
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 2 * 1024, 256 * 1024
UNLIMITED_QUEUE_BYTES = 64 * 2**20  # held per connection and direction where no rate bounds it
# The most that is taken off the delay for waking up, on the relay's side and on the receiver's together.
MAX_WAKE_SECONDS = 0.000_3
# A sleeping processor wakes late, by 50 us to 500 us, and mostly by the same. Each pipe learns by how much and gets up
# that much earlier. It follows the median: the steps are bounded, so that one preemption does not move it far.
MAX_LEAD_SECONDS, LEAD_GAIN, LEAD_STEP_SECONDS = 0.000_5, 0.25, 0.000_02


class Clock:
    """Seconds of the link's own time, which stands still during a stall."""

    def __init__(self) -> None:
        self._lost = 0.0
        self._stalled_at: float | None = None
        self._stalled_until = 0.0

    def now(self) -> float:
        real = time.monotonic()
        if self._stalled_at is None:
            return real - self._lost
        if real < self._stalled_until:
            return self._stalled_at - self._lost
        self._lost += self._stalled_until - self._stalled_at
        self._stalled_at = None
        return real - self._lost

    @property
    def stall_left_seconds(self) -> float:
        return 0.0 if self._stalled_at is None else max(0.0, self._stalled_until - time.monotonic())

    def stall(self, seconds: float) -> None:
        """Stand still from now on for ``seconds``; 0 ends a stall."""
        self.now()  # ends a stall that is over
        real = time.monotonic()
        if self._stalled_at is None:
            self._stalled_at = real
        self._stalled_until = real + seconds


@dataclass(slots=True)
class Pipe:
    """One direction of the link. ``bytes_per_second`` is ``inf`` where there is no limit."""

    bytes_per_second: float
    delay_seconds: float
    jitter_seconds: float
    wake_seconds: float = 0.0
    """What passes from a byte's arrival until it is read, at the relay and then at the receiver: off the delay."""
    random: Random = field(default_factory=lambda: Random(0))
    queue: deque[tuple[float, Stream, memoryview | bytes | None]] = field(default_factory=deque)
    free_at: float = 0.0
    last_delivery_at: float = 0.0
    bytes_read: int = 0
    lead_seconds: float = 0.0
    paused: bool = False
    spare: list[bytearray] = field(default_factory=list)
    """Chunks to read into: fresh ones would cost a page fault per 4 KiB."""

    @property
    def chunk_bytes(self) -> int:
        return int(min(max(self.bytes_per_second * CHUNK_SECONDS, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES))

    @property
    def stream_limit_bytes(self) -> int:
        """The bandwidth-delay product and the buffer: what one connection may have inside."""
        if math.isinf(self.bytes_per_second):
            return UNLIMITED_QUEUE_BYTES
        seconds = self.delay_seconds + self.jitter_seconds + BUFFER_SECONDS
        return int(self.bytes_per_second * seconds) + 2 * self.chunk_bytes

    def is_full(self, now: float) -> bool:
        """Whether the serialiser has enough to do. With hysteresis, so that chunks are read in runs."""
        ahead_seconds = self.free_at - now
        self.paused = ahead_seconds > (BUFFER_SECONDS / 2 if self.paused else BUFFER_SECONDS)
        return self.paused

    def push(self, now: float, stream: Stream, data: memoryview | bytes | None) -> None:
        """Queue ``data`` (None: the end of the stream) as read at ``now``."""
        size = 0 if data is None else len(data)
        self.free_at = max(now, self.free_at) + size / self.bytes_per_second
        delay = self.delay_seconds
        if self.jitter_seconds:
            delay += self.random.uniform(-self.jitter_seconds, self.jitter_seconds)
        delivery_at = max(self.free_at + max(0.0, delay - self.wake_seconds), self.last_delivery_at)
        self.last_delivery_at = delivery_at
        self.bytes_read += size
        stream.held_bytes += size
        self.queue.append((delivery_at, stream, data))

    def learn(self, late_seconds: float) -> None:
        """Adjust the lead to a delivery that was late (or early, if negative) by that much."""
        step = min(max(LEAD_GAIN * late_seconds, -LEAD_STEP_SECONDS), LEAD_STEP_SECONDS)
        self.lead_seconds = min(max(self.lead_seconds + step, 0.0), MAX_LEAD_SECONDS, self.delay_seconds)


@dataclass(slots=True)
class Stream:
    """One direction of one connection."""

    pipe: Pipe
    connection: Connection
    source: socket.socket
    sink: socket.socket
    limit_bytes: int
    held_bytes: int = 0
    """Read and not yet sent: in the pipe and in ``due``."""
    due: deque[memoryview | bytes | None] = field(default_factory=deque)
    """Delivered by the pipe, not yet taken by the sink's socket."""
    ended: bool = False
    finished: bool = False


@dataclass(eq=False, slots=True)
class Connection:
    client: socket.socket
    server: socket.socket
    connecting: bool
    streams: list[Stream] = field(default_factory=list)
    closed: bool = False

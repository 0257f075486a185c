"""What arrives at a client, looked after in a thread of its own: while its user computes, and while it is idle, too.

zmq gathers a whole message before it hands over any of it, and has no bound for that. A server that means harm could
fill our memory at any moment, whatever was asked: with a message without end, or with frames without content, which
have 2 bytes on the link and take 64 in zmq. So a connection is ended where

- more bytes have arrived since the last whole message than all that was asked for can have (the kernel counts them);
- while a message is unfinished the process grows by more than its bytes explain, and zmq's thread has worked on them as
  long as only many small frames take. (The process may grow for reasons of its own, and zmq's thread may be slow; both
  at once, in one message, is a sign. With keys a frame has 33 bytes more, and takes less than twice what it has.)

Over ipc the kernel counts no bytes; a socket's file lets in nobody but its own user.
"""

from __future__ import annotations

import contextlib
import socket as sockets
import threading
import time
from collections.abc import Sequence

from transports.sockets import FRAMING_BYTES, cut, duplicate, received_bytes, resident_bytes

LOOK_SECONDS = 0.05

STRAY_BYTES = 2**20
"""Beyond what was asked for."""

GROWTH_BYTES = 32 * 2**20
"""Of the process beyond the bytes of an unfinished message."""

WORK_SECONDS_PER_BYTE = 8e-9
"""Of zmq's threads. Large frames took 0.6 ns a byte, frames of 2 bytes 42, of 6 bytes 16, of 18 bytes 5."""

_LOOKS = 3
"""A request may be sent, and its reply arrive, while one is taken."""


class Inflow:
    """The connection behind one client's socket. ``awaited_bytes`` may still come for requests in flight,
    ``owed_bytes`` for those that were given up: the client sets both. Neither may come from who is not ``proven``.
    ``threads`` are those of the client's zmq context. ``excess`` says why the connection was ended, and ``hostile``
    whether that can have no other cause."""

    def __init__(self, threads: Sequence[int]) -> None:
        self.awaited_bytes = 0
        self.owed_bytes = 0
        self.proven = True
        self.excess = ""
        self.hostile = False
        self._clocks = [(~thread << 3) | 6 for thread in threads]  # a thread's time on the processor, to Linux
        self._lock = threading.Lock()
        """Of the socket: closed by one thread and used by another, its number could be that of a new one."""
        self._socket: sockets.socket | None = None
        self._settled = True
        self._settled_bytes = 0
        self._then: tuple[int, float] | None = None

    def connected(self, fd: int) -> None:
        """The connection has the descriptor ``fd``. A duplicate is kept: that number may come to mean another one."""
        self.close()
        with contextlib.suppress(OSError):  # it has ended already
            socket = duplicate(fd)
            if received_bytes(socket) is None:
                socket.close()
                return
            self._socket = socket
            _watch.add(self)

    @property
    def counts(self) -> bool:
        """Whether the kernel tells its bytes."""
        return self._socket is not None

    def settle(self) -> None:
        """A whole message was handed over: what is still to come is counted from here."""
        self._settled = False

    def unfinished(self) -> int:
        """Bytes that have come since the last whole message; 0 where nobody counts them."""
        socket = self._socket
        if not self._settled:
            self._settled = True
            self._settled_bytes = (received_bytes(socket) if socket else None) or 0
            self._then = None
        received = received_bytes(socket) if socket else None
        return 0 if received is None else received - self._settled_bytes

    def look(self) -> None:
        """Ends the connection where too much comes."""
        with self._lock:
            self._look()

    def _look(self) -> None:
        unfinished = 0
        for _ in range(_LOOKS):
            # This first: a reply that is read in between takes away what it was allowed.
            asked = self.awaited_bytes + self.owed_bytes if self.proven else 0
            allowed = asked + STRAY_BYTES
            unfinished = self.unfinished()
            if unfinished <= allowed:
                break
        else:
            self._end("sends more than the answer to all that it was asked can be", hostile=True)
            return
        if unfinished <= FRAMING_BYTES:
            self._then = None
            return
        resident, worked = resident_bytes(), self._worked()
        if self._then is None:
            self._then = (resident, worked)
            return
        grown, worked = resident - self._then[0], worked - self._then[1]
        if grown > unfinished + GROWTH_BYTES and worked > unfinished * WORK_SECONDS_PER_BYTE:
            self._end("sends a reply that takes far more memory than it has bytes", hostile=False)

    def _worked(self) -> float:
        """Seconds on a processor of zmq's threads."""
        seconds = 0.0
        for clock in list(self._clocks):
            try:
                seconds += time.clock_gettime(clock)
            except OSError:  # of a thread that has ended: it was not zmq's, and what it has worked goes
                self._clocks.remove(clock)
                self._then = None
        return seconds

    def _end(self, excess: str, *, hostile: bool) -> None:
        self.excess, self.hostile = excess, hostile
        socket, self._socket = self._socket, None
        if socket is not None:
            cut(socket)
            socket.close()

    def close(self) -> None:
        """Forget the connection. May be called twice."""
        with self._lock:
            socket, self._socket = self._socket, None
            if socket is not None:
                socket.close()


class _Watch:
    """The thread, while there is something to look after."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inflows: list[Inflow] = []
        self._thread: threading.Thread | None = None

    def add(self, inflow: Inflow) -> None:
        with self._lock:
            if inflow not in self._inflows:
                self._inflows.append(inflow)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="teegpu-inflow", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            for inflow in self._inflows:
                inflow.look()
            with self._lock:
                self._inflows = [inflow for inflow in self._inflows if inflow.counts]
                if not self._inflows:
                    self._thread = None
                    return


_watch = _Watch()

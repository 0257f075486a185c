"""The process behind an emulated link: bytes in, bytes out, later.

Each direction of the link is one pipe (``pipes``), shared by all its connections: a serialiser that works
at the link's rate, then a delay. A chunk that is read at time t leaves the serialiser at ``max(t, free) + size / rate``
and is delivered one delay later; ``free`` is that first sum for the chunk before. All of these are absolute times, so a
late wake-up delays what was due then and nothing after it. Chunks are read up to ``BUFFER_SECONDS`` ahead of the
serialiser, which covers late wake-ups as well and stands for the queue of a real network card; what is beyond that
stays in the sender's socket, which is how the sender feels the link.

One thread, one epoll. The clock of the link stands still while it is stalled.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transports import addresses
from transports.errors import BadAddressError
from transports.netem.pipes import BUFFER_SECONDS, MAX_WAKE_SECONDS, Clock, Connection, Pipe, Stream

SPARE_CHUNKS = 64
WAKE_TRIES, MAX_IDLE_SECONDS = 15, 0.005
PARENT_CHECK_SECONDS = 1.0
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close at once, and tell the peer


def resolve(text: str, *, listening: bool = False) -> tuple[int, tuple[Any, ...] | str]:
    """The socket family and address of ``tcp://host:port`` or ``ipc:///path``. Raises ``BadAddressError``."""
    address = addresses.parse(text, listening=listening)
    if address.scheme == "ipc":
        return socket.AF_UNIX, address.path
    if address.scheme != "tcp":
        raise BadAddressError(f"'{text}': a link runs between processes: use tcp://host:port or ipc:///path")
    host = "0.0.0.0" if address.host == "*" else address.host.removeprefix("[").removesuffix("]")
    try:
        found = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise BadAddressError(f"'{text}': cannot resolve the host: {error}") from error
    # A server on "localhost" mostly means 127.0.0.1, whichever of the two the resolver names first.
    family, _, _, _, value = min(found, key=lambda one: one[0] != socket.AF_INET)
    return family, value


def measured_wake_seconds(idle_seconds: float) -> float:
    """How long after a byte's arrival a process that has waited for it for ``idle_seconds`` has it, as the median.

    It depends on the machine (30 us to 200 us), and on a virtual one grows with the wait. Takes 15 x ``idle_seconds``.
    """
    near, far = socket.socketpair()

    def send() -> None:
        for _ in range(WAKE_TRIES):
            time.sleep(idle_seconds)
            near.sendall(struct.pack("d", time.monotonic()))

    with near, far:
        sender = threading.Thread(target=send, name="relay-wake", daemon=True)
        sender.start()
        waits: list[float] = []
        for _ in range(WAKE_TRIES):
            select.select([far], [], [])
            (sent_at,) = struct.unpack("d", far.recv(8))
            waits.append(time.monotonic() - sent_at)
        sender.join()
    return statistics.median(waits)


@dataclass(slots=True)
class Listener:
    socket: socket.socket
    target_family: int
    target: tuple[Any, ...] | str
    path: str | None


class Relay:
    """Carries bytes between listening addresses and their targets. ``run`` returns when ``command`` returns False.

    ``command`` is called when ``command_fd`` is readable, and at least every ``PARENT_CHECK_SECONDS``
    (``command(readable)``).
    """

    def __init__(
        self, up_bytes_per_second: float, down_bytes_per_second: float, rtt_seconds: float, jitter_seconds: float
    ) -> None:
        delay = rtt_seconds / 2
        wake_seconds = min(2 * measured_wake_seconds(min(delay, MAX_IDLE_SECONDS)), MAX_WAKE_SECONDS) if delay else 0.0
        self.up = Pipe(up_bytes_per_second, delay, jitter_seconds, wake_seconds)
        self.down = Pipe(down_bytes_per_second, delay, jitter_seconds, wake_seconds)
        self.clock = Clock()
        self.connections: set[Connection] = set()
        self.accepted = 0
        self.is_cut = False
        self._listeners: dict[int, Listener] = {}
        self._epoll = select.epoll()
        self._masks: dict[int, int] = {}
        self._by_fd: dict[int, tuple[Connection, Stream, Stream]] = {}  # connection, what it reads, what it writes

    # -- addresses and chaos -------------------------------------------------------------------------------------------

    def listen(self, address: str, target: str) -> str:
        """Relay from ``address`` to ``target``; returns the address with its real port. Raises ``BadAddressError``."""
        family, where = resolve(address, listening=True)
        target_family, target_where = resolve(target)
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family != socket.AF_UNIX:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(where)
            listening.listen(128)
            listening.setblocking(False)
        except OSError as error:
            listening.close()
            raise BadAddressError(f"cannot listen on '{address}': {error.strerror or error}; choose another") from error
        path = where if isinstance(where, str) else None
        self._listeners[listening.fileno()] = Listener(listening, target_family, target_where, path)
        self._epoll.register(listening.fileno(), select.EPOLLIN)
        if path is not None:
            return address
        host, port = listening.getsockname()[:2]
        return f"tcp://{addresses.at(host, port)}"

    def drop(self) -> int:
        """Reset every connection; returns how many there were. New ones are accepted, unless the link is cut."""
        count = len(self.connections)
        for connection in list(self.connections):
            self._close(connection, reset=True)
        return count

    def close(self) -> None:
        self.drop()
        for listener in self._listeners.values():
            listener.socket.close()
            if listener.path is not None:
                with contextlib.suppress(OSError):
                    os.unlink(listener.path)
        self._epoll.close()

    # -- the loop ------------------------------------------------------------------------------------------------------

    def run(self, command_fd: int, command: Callable[[bool], bool]) -> None:
        checked_at = time.monotonic()
        while True:
            stall_seconds = self.clock.stall_left_seconds
            if stall_seconds > 0.0:
                watched, timeout = [command_fd], stall_seconds
            else:
                watched, timeout = [self._epoll.fileno(), command_fd], self._deliver_due()
            # epoll's own time-out has a resolution of a millisecond, that of select is the kernel's best
            ready = select.select(watched, [], [], min(timeout, PARENT_CHECK_SECONDS))[0]
            commanded = command_fd in ready
            if commanded or time.monotonic() - checked_at > PARENT_CHECK_SECONDS:
                checked_at = time.monotonic()
                if not command(commanded):
                    return
            if len(ready) > commanded and self.clock.stall_left_seconds <= 0.0:
                for fd, events in self._epoll.poll(0):
                    self._handle(fd, events)

    def _deliver_due(self) -> float:
        """Deliver what is due, open or shut what must be; seconds until the next delivery."""
        next_at = math.inf
        now = self.clock.now()
        for pipe in (self.up, self.down):
            queue, until = pipe.queue, now + pipe.lead_seconds
            if queue and queue[0][0] <= until:
                pipe.learn(now - queue[0][0])
            while queue and queue[0][0] <= until:
                _, stream, data = queue.popleft()
                if not stream.connection.closed:
                    stream.due.append(data)
                    if len(stream.due) == 1 and not stream.connection.connecting:
                        self._send(stream)
            if queue:
                next_at = min(next_at, queue[0][0] - pipe.lead_seconds)
        for pipe in (self.up, self.down):
            if pipe.is_full(now):
                next_at = min(next_at, pipe.free_at - BUFFER_SECONDS / 2)
        for connection in self.connections:
            self._watch(connection)
        return max(0.0, next_at - self.clock.now())

    def _handle(self, fd: int, events: int) -> None:
        if fd in self._listeners:
            self._accept(self._listeners[fd])
            return
        if fd not in self._by_fd:
            return  # closed by an earlier event of this round
        connection, reads, writes = self._by_fd[fd]
        if connection.connecting and fd == connection.server.fileno():
            if connection.server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._close(connection, reset=True)
                return
            connection.connecting = False
        if events & select.EPOLLOUT and writes.due:
            self._send(writes)
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and not connection.closed:
            self._read(reads)

    def _accept(self, listener: Listener) -> None:
        try:
            client, _ = listener.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.01)  # the backlog keeps it; do not spin until a descriptor is free
                return
            raise
        if self.is_cut:
            _reset(client)
            return
        try:
            server = socket.socket(listener.target_family, socket.SOCK_STREAM)
        except OSError:
            _reset(client)  # out of descriptors: this client may try again, the others go on
            return
        for end in (client, server):
            end.setblocking(False)
            if end.family != socket.AF_UNIX:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        failed = server.connect_ex(listener.target)
        if failed not in (0, errno.EINPROGRESS):
            server.close()
            _reset(client)
            return
        self.accepted += 1
        connection = Connection(client, server, connecting=failed != 0)
        up = Stream(self.up, connection, client, server, self.up.stream_limit_bytes)
        down = Stream(self.down, connection, server, client, self.down.stream_limit_bytes)
        connection.streams = [up, down]
        self.connections.add(connection)
        self._by_fd[client.fileno()] = (connection, up, down)
        self._by_fd[server.fileno()] = (connection, down, up)

    def _read(self, stream: Stream) -> None:
        """Read one chunk, unless the pipe is full. One at a time, so that connections take turns."""
        pipe = stream.pipe
        now = self.clock.now()
        if stream.ended or stream.held_bytes >= stream.limit_bytes or pipe.is_full(now):
            return
        chunk = pipe.spare.pop() if pipe.spare else bytearray(pipe.chunk_bytes)
        try:
            size = stream.source.recv_into(chunk)
        except BlockingIOError:
            pipe.spare.append(chunk)
            return
        except OSError:
            size = 0  # the source reset the connection: what it sent before is still delivered, then it ends
        if size == 0:
            stream.ended = True
            pipe.push(now, stream, None)
        elif size <= len(chunk) // 4:
            pipe.push(now, stream, bytes(memoryview(chunk)[:size]))
        else:
            pipe.push(now, stream, memoryview(chunk)[:size])
            return
        pipe.spare.append(chunk)

    def _send(self, stream: Stream) -> None:
        """Give the sink's socket what is due, as far as it takes it."""
        due, spare = stream.due, stream.pipe.spare
        try:
            while due:
                data = due[0]
                if data is None:
                    stream.sink.shutdown(socket.SHUT_WR)
                    stream.finished = True
                    due.clear()
                    if all(other.finished for other in stream.connection.streams):
                        self._close(stream.connection)
                    return
                sent = stream.sink.send(data)
                stream.held_bytes -= sent
                if sent < len(data):
                    due[0] = memoryview(data)[sent:]
                    return
                due.popleft()
                if isinstance(data, memoryview) and isinstance(data.obj, bytearray) and len(spare) < SPARE_CHUNKS:
                    spare.append(data.obj)
        except BlockingIOError:
            return
        except OSError:
            self._close(stream.connection, reset=True)

    def _watch(self, connection: Connection) -> None:
        """Ask epoll for what each end is needed for. An end that is needed for nothing is not registered at all: it
        would report a hang-up for ever."""
        for end in (connection.client, connection.server):
            fd = end.fileno()
            _, reads, writes = self._by_fd[fd]
            mask = 0
            if not reads.ended and not reads.pipe.paused and reads.held_bytes < reads.limit_bytes:
                mask = select.EPOLLIN
            if (connection.connecting and end is connection.server) or (writes.due and not connection.connecting):
                mask |= select.EPOLLOUT
            before = self._masks.get(fd, 0)
            if mask == before:
                continue
            if mask == 0:
                self._epoll.unregister(fd)
            elif before == 0:
                self._epoll.register(fd, mask)
            else:
                self._epoll.modify(fd, mask)
            self._masks[fd] = mask

    def _close(self, connection: Connection, reset: bool = False) -> None:
        if connection.closed:
            return
        connection.closed = True
        self.connections.discard(connection)
        for end in (connection.client, connection.server):
            fd = end.fileno()
            if self._masks.pop(fd, 0):
                self._epoll.unregister(fd)
            del self._by_fd[fd]
            if reset:
                _reset(end)
            else:
                end.close()


def _reset(end: socket.socket) -> None:
    if end.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    end.close()

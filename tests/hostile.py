"""GPU servers that mean harm, to test a runner against.

``HostileServer`` is a real server behind a bare ROUTER socket, which answers as it should until a script says
otherwise: a script gets an honest reply and gives what is sent in its place. ``CutLine`` is a TCP relay in front of any
server that ends the stream to the runner at a given byte, or lets it trickle.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgpack
import zmq

from teegpu.gpu.server import GpuServer
from transports import envelope
from transports.base import Incoming

Parts = list[bytes]


@dataclass
class Honest:
    """The reply that is due: the transport's ``request_id``, the wire's ``header`` (unpacked) and its ``frames``.
    ``before`` are the replies before it, as they were sent."""

    request_id: int
    header: list[Any]
    frames: list[bytes]
    before: list[Parts] = field(default_factory=list)

    @property
    def parts(self) -> Parts:
        return self.sealed(msgpack.packb(self.header), *self.frames)

    def sealed(self, *frames: bytes, request_id: int | None = None) -> Parts:
        """``frames`` behind an envelope that is right for them."""
        number = self.request_id if request_id is None else request_id
        return [envelope.pack(number, [len(frame) for frame in frames]), *frames]

    def with_header(self, position: int, value: object) -> Parts:
        """The reply with another field in its header: 0 version, 1 kind, 2 id, 3 and 4 the body."""
        header = list(self.header)
        header[position] = value
        return self.sealed(msgpack.packb(header), *self.frames)

    @property
    def table(self) -> list[list[Any]]:
        """``[[register, shape, wire dtype], …]``"""
        rows: list[list[Any]] = msgpack.unpackb(self.header[4])
        return rows

    def with_table(self, table: object, *frames: bytes) -> Parts:
        header = [*self.header[:4], msgpack.packb(table)]
        return self.sealed(msgpack.packb(header), *(frames or self.frames))


Script = Callable[[Honest], Iterable[Parts]]
"""The messages to send in place of an honest reply. One that waits between them is a generator."""


class HostileServer:
    """Answers with what ``server`` says, and the reply with number ``at`` as ``script`` says (0: the first, a welcome);
    without ``once``, all replies from then on."""

    def __init__(self, server: GpuServer, script: Script, *, at: int, once: bool = True) -> None:
        self._server, self._script, self._at, self._once = server, script, at, once
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self.address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._ended = threading.Event()
        self.replies = 0
        self._thread = threading.Thread(target=self._serve, name="hostile server")
        self._thread.start()

    def _serve(self) -> None:
        sent: list[Parts] = []
        while not self._ended.is_set():
            if not self._socket.poll(20):
                continue
            client, head, *frames = self._socket.recv_multipart()
            request_id = envelope.peek_request_id(head)
            assert request_id is not None
            incoming = Incoming(
                [memoryview(bytearray(frame)) for frame in frames], client, None, time.perf_counter_ns()
            )
            first, *rest = [bytes(frame) for frame in self._server.answer(incoming).frames]
            honest = Honest(request_id, msgpack.unpackb(first), rest, sent)
            number, self.replies = self.replies, self.replies + 1
            spoilt = number == self._at if self._once else number >= self._at
            for message in self._script(honest) if spoilt else [honest.parts]:
                if self._ended.is_set():
                    break
                self._socket.send_multipart([client, *message])
            sent.append(honest.parts)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._context.destroy(linger=0)


class CutLine:
    """Relays TCP connections to ``target`` (tcp://…). In the first ``connections`` of them, the stream to the client
    ends after ``cut`` bytes: the connection is closed, or with ``stall`` nothing more comes, or with ``drip_seconds``
    the rest comes a byte at a time. ``seen`` is what went to the client of the first one."""

    def __init__(
        self,
        target: str,
        cut: int | None,
        *,
        stall: bool = False,
        connections: int = 1,
        drip_seconds: float = 0.0,
    ) -> None:
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self._cut, self._stall, self._left, self._drip = cut, stall, connections, drip_seconds
        self.seen = bytearray()
        self.accepted = 0
        self._over = threading.Event()
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def _start(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                cut = self._cut if self.accepted < self._left else None
                first, self.accepted = self.accepted == 0, self.accepted + 1
                self._start(self._up, near, far)
                self._start(self._down, far, near, cut, first)

    def _up(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(1 << 16):
                far.sendall(data)
        _shut(far)

    def _down(self, far: socket.socket, near: socket.socket, cut: int | None, first: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while True:
                room = None if cut is None else cut - passed
                if room == 0:
                    self._cut_off(far, near)
                    return
                data = far.recv(1 << 16 if room is None else min(room, 1 << 16))
                if not data:
                    break
                passed += len(data)
                if first:
                    self.seen += data
                near.sendall(data)
        _shut(near)

    def _cut_off(self, far: socket.socket, near: socket.socket) -> None:
        if self._drip:
            while (data := far.recv(1)) and not self._over.wait(self._drip):
                near.sendall(data)
        elif self._stall:
            self._over.wait()
        _shut(near)
        _shut(far)

    def close(self) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._open:
            _shut(each)
        for thread in self._threads:
            thread.join()
        for each in self._open:
            each.close()


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def positions(stream: bytes, messages: int) -> Iterator[int]:
    """One position of each class in ``stream``, what a ZMTP server sent to a client: within the greeting, within the
    handshake, and for every frame of the first ``messages`` messages before it, in its header, and in the middle and at
    the end of its content."""
    yield from (0, 1, 10, 11, 12, 63)
    at, left = 64, messages
    while at < len(stream) and left:
        flags = stream[at]
        size = 9 if flags & 2 else 2
        length = int.from_bytes(stream[at + 1 : at + size], "big")
        yield from (at, at + 1, at + size + length // 2, at + size + max(length - 1, 0))
        at += size + length
        if not flags & 4 and not flags & 1:  # no command, and the last frame of its message
            left -= 1
    yield at

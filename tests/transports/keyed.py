"""Peers of a link with keys that do by hand what the product's client does: over zmq, and over a bare TCP socket."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from transports.noise import Initiator
from transports.sealing import PROTOCOL, Session
from transports.security import ClientKeys

WAIT_SECONDS = 10.0
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00PLAIN" + bytes(15) + b"\x00" + bytes(31)
MORE, LARGE, COMMAND = 1, 2, 4


class SealedDealer:
    """A bare DEALER socket that has proved its key."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, keys: ClientKeys) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVTIMEO, int(WAIT_SECONDS * 1000))
        exchange = Initiator(keys.own.secret, keys.server.raw, PROTOCOL)
        self.socket.setsockopt(zmq.PLAIN_USERNAME, PROTOCOL)
        self.socket.setsockopt(zmq.PLAIN_PASSWORD, exchange.write())
        self.socket.connect(address)
        self.socket.send(b"")
        _, sending, receiving = exchange.read(self.socket.recv())
        self.session = Session(sending, receiving)
        self.send_multipart([])
        assert self.recv_multipart() == []

    def send_multipart(self, parts: Sequence[bytes]) -> None:
        self.socket.send_multipart(self.session.seal(parts))

    def recv_multipart(self) -> list[bytes]:
        frames = [memoryview(bytearray(frame)) for frame in self.socket.recv_multipart()]
        return [bytes(part) for part in self.session.open(frames)]

    def close(self) -> None:
        self.socket.close(0)


def command(body: bytes) -> bytes:
    if len(body) < 256:
        return bytes([COMMAND, len(body)]) + body
    return bytes([COMMAND | LARGE]) + struct.pack(">Q", len(body)) + body


def hello(name: bytes, message: bytes) -> bytes:
    """PLAIN's command with a user name and a password."""
    return command(b"\x05HELLO" + bytes([len(name)]) + name + bytes([len(message)]) + message)


def initiate(**properties: bytes) -> bytes:
    """PLAIN's command with what a peer says of itself. ``_`` stands for ``-``."""
    all_of_them = {"Socket-Type": b"DEALER"} | {name.replace("_", "-"): value for name, value in properties.items()}
    told = b"".join(
        bytes([len(name)]) + name.encode() + struct.pack(">I", len(value)) + value
        for name, value in all_of_them.items()
    )
    return command(b"\x08INITIATE" + told)


def framed(frames: Sequence[bytes]) -> bytes:
    """A message as ZMTP has it."""
    made = b""
    for index, each in enumerate(frames):
        flags = MORE * (index < len(frames) - 1)
        if len(each) < 256:
            made += bytes([flags, len(each)]) + each
        else:
            made += bytes([flags | LARGE]) + struct.pack(">Q", len(each)) + each
    return made


class Wire:
    """A TCP connection, read frame by frame."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        end.settimeout(WAIT_SECONDS)

    def take(self, count: int) -> bytes:
        got = b""
        while len(got) < count:
            part = self.end.recv(count - len(got))
            if not part:
                raise ConnectionError("the connection ended")
            got += part
        return got

    def frame(self) -> tuple[int, bytes, bytes]:
        """The next frame: its flags, its content, and all of it as it came."""
        head = self.take(2)
        if head[0] & LARGE:
            head += self.take(7)
            length = int.from_bytes(head[1:], "big")
        else:
            length = head[1]
        content = self.take(length)
        return head[0], content, head + content

    def message(self) -> list[bytes]:
        """The next message, commands before it left out."""
        frames: list[bytes] = []
        while True:
            flags, content, _ = self.frame()
            if not flags & COMMAND:
                frames.append(content)
                if not flags & MORE:
                    return frames

    def ended(self) -> bool:
        """Waits for the end of the connection, whatever comes before it."""
        try:
            while self.end.recv(65536):
                pass
        except ConnectionResetError:
            pass
        return True


UP, DOWN = "up", "down"


class Relay:
    """Stands between clients and the server at ``target``, with a thread for each direction of each connection."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("tcp://").rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._begin(self._accept)

    def pass_on(self, way: str, source: socket.socket, sink: socket.socket, number: int) -> None:
        """Hands on what comes of one direction, ``UP`` to the server or ``DOWN``, of the connection ``number``, from 0
        on. An ``OSError`` is its end."""
        raise NotImplementedError

    def _begin(self, work: Callable[..., None], *args: object) -> None:
        self._threads.append(threading.Thread(target=work, args=args))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            for number in itertools.count():
                near, far = self._listener.accept()[0], socket.create_connection(self._target)
                self._open += [near, far]
                self._begin(self._pass, UP, near, far, number)
                self._begin(self._pass, DOWN, far, near, number)

    def _pass(self, *connection: Any) -> None:
        with contextlib.suppress(OSError):
            self.pass_on(*connection)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._open:
            each.close()


class RawPeer(Wire):
    """A client of a server with keys, as far as zmq's own handshake goes, with ``first`` in place of a message of
    ``noise``."""

    def __init__(self, place: tuple[str, int], first: bytes, *, name: bytes = PROTOCOL, **properties: bytes) -> None:
        super().__init__(socket.create_connection(place))
        self.end.sendall(GREETING)
        self.take(64)
        self.end.sendall(hello(name, first))
        _, self.answer, _ = self.frame()
        if self.answer == b"\x07WELCOME":
            self.end.sendall(initiate(**properties))
            self.frame()

    def send(self, *frames: bytes) -> None:
        self.end.sendall(framed(frames))

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.end.close()

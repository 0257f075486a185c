"""What is fuzzed of a connection's beginning: bytes on the socket of a server, with keys and without, where zmq's
greeting, its handshake and the first message belong. Each ends, and whoever means well is served meanwhile. Of links
with keys also both messages of the exchange, and what a peer that has keys may seal."""

from __future__ import annotations

import itertools
import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import transports
from tests.fuzz.world import join, split
from transports import ClientOptions, Message, ServerOptions, envelope, security
from transports.errors import SealError
from transports.noise import Cipher, Initiator, Responder
from transports.sealing import LARGE_BYTES, PROTOCOL, Session
from transports.security import ClientKeys, ServerKeys

SECONDS = 20.0
MOST_BYTES = 2**16
SETTLE = 64
_PAIRS = [security.pair_of(bytes([number]) * 32) for number in (1, 2)]


class Echo:
    """A server that is up for as long as the process, and a client of it that means well."""

    def __init__(self, *, keyed: bool) -> None:
        server, client = _PAIRS
        options = ServerOptions(max_message_bytes=MOST_BYTES, max_client_bytes=4 * MOST_BYTES, max_clients=64)
        asking = ClientOptions()
        if keyed:
            folder = Path(tempfile.mkdtemp(prefix="teegpu-fuzz-"))
            path = folder / "alice.pub"
            path.write_text(client.public.text)
            path.chmod(0o644)
            options = replace(options, keys=ServerKeys(server, folder))
            asking = ClientOptions(keys=ClientKeys(client, server.public))
        self.server = transports.listen("tcp://127.0.0.1:0", options)
        host, _, port = self.server.address.removeprefix("tcp://").rpartition(":")
        self.place = host, int(port)
        self.thread = threading.Thread(target=self._answer, daemon=True)
        self.thread.start()
        self.client = transports.connect("zmq", self.server.address, asking)
        self.well()

    def _answer(self) -> None:
        while True:
            incoming = self.server.next()
            if incoming is not None:
                self.server.reply(incoming, Message(incoming.frames[:4]))

    def well(self) -> None:
        assert bytes(self.client.request(Message([b"well"]), timeout_seconds=SECONDS).frames[0]) == b"well"
        assert self.thread.is_alive()
        assert self.server.load.connections <= SETTLE


@cache
def _echo(keyed: bool) -> Echo:
    return Echo(keyed=keyed)


_peers = itertools.count()


def _connect(place: tuple[str, int]) -> socket.socket:
    """From one of many addresses: ports of one are used up faster than the kernel gives them back."""
    number = next(_peers)
    source = f"127.1.{number >> 8 & 255}.{number % 254 + 1}"
    return socket.create_connection(place, SECONDS, source_address=(source, 0))


def greeting(data: bytes) -> str:
    """Byte 0: whether there are keys, and whether a part is waited for; then pieces, each behind its length in two
    bytes. Whatever comes, the connection ends once no more comes, and the others are served."""
    how = data[0] if data else 0
    echo = _echo(bool(how & 1))
    received = 0
    with _connect(echo.place) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for piece in split(data[1:]):
                peer.sendall(piece)
                if how & 2 and not received:
                    received = len(peer.recv(2**16))
            peer.shutdown(socket.SHUT_WR)
            while part := peer.recv(2**16):
                received += len(part)
        except TimeoutError:
            raise AssertionError("the server keeps a connection that has ended") from None
        except OSError:  # it ended the connection first
            pass
    echo.well()
    return "greeted" if received < 66 else "went on"


_ONCE = [bytes([number]) * 32 for number in (3, 4)]
_SESSION_KEY = bytes([5]) * 32
_LARGE = b"a large frame"
"""Stands for one, which would have no room among others."""


def exchange(data: bytes) -> str:
    """Byte 0: what the rest is. The first message, the second one, or frames of a message, which are sealed first, as
    by a peer that has the keys."""
    server, client = _PAIRS
    how, rest = (data[0] if data else 0) % 3, data[1:]
    try:
        if how == 0:
            responder = Responder(server.secret, PROTOCOL, ephemeral=_ONCE[0])
            responder.read(rest)
            assert responder.client == client.public.raw  # nobody else's can be made without a secret key
            return "taken"
        if how == 1:
            initiator = Initiator(client.secret, server.public.raw, PROTOCOL, ephemeral=_ONCE[1])
            initiator.write()
            initiator.read(rest)
            return "taken"
        sealing, session = Cipher(_SESSION_KEY), Session(bytes(32), _SESSION_KEY)
        frames = [bytes(LARGE_BYTES) if frame == _LARGE else frame for frame in split(rest)]
        parts = session.open([memoryview(bytearray(sealing.seal(frame))) for frame in frames])
        assert sum(map(len, parts)) <= sum(map(len, frames))
        return "opened"
    except SealError as error:
        return "refused" if str(error).isprintable() else "unfit for a line"


TARGETS: dict[str, Callable[[bytes], str]] = {"greeting": greeting, "exchange": exchange}


def _greeting(mechanism: bytes, minor: int = 0) -> bytes:
    return b"\xff" + bytes(8) + b"\x7f\x03" + bytes([minor]) + mechanism.ljust(20, b"\0") + bytes(32)


def _command(body: bytes) -> bytes:
    return b"\x04" + bytes([len(body)]) + body if len(body) < 256 else b"\x06" + struct.pack(">Q", len(body)) + body


def _frame(body: bytes, flags: int) -> bytes:
    return bytes([flags, len(body)]) + body


def seeds() -> dict[str, list[bytes]]:
    """For each target, what is right, or was under an older protocol."""
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    identity = b"\x08Identity" + struct.pack(">I", 3) + b"abc"
    server, client = _PAIRS
    begins = Initiator(client.secret, server.public.raw, PROTOCOL, ephemeral=_ONCE[1])
    first = begins.write()
    answers = Responder(server.secret, PROTOCOL, ephemeral=_ONCE[0])
    answers.read(first)
    second, *_ = answers.write()
    hello = b"\x05HELLO" + bytes([len(PROTOCOL)]) + PROTOCOL + bytes([len(first)]) + first
    initiate = b"\x08INITIATE" + ready.removeprefix(b"\x05READY")
    ping = b"\x04PING\x00\x10" + b"ctx"
    asked = _frame(envelope.pack(1, [4]), 1) + _frame(b"well", 0)
    made = [
        (0, [_greeting(b"NULL"), _command(ready), asked]),
        (2, [_greeting(b"NULL", 1), _command(ready + identity), asked + _command(ping) + asked]),
        (0, [_greeting(b"NULL"), _command(ready), _frame(envelope.pack(1, [4]), 1)]),
        (0, [_greeting(b"PLAIN"), _command(b"\x05HELLO\x01a\x01b")]),
        (3, [_greeting(b"PLAIN"), _command(hello), _command(initiate), _frame(b"", 0)]),
        (1, [_greeting(b"PLAIN"), _command(hello), _command(initiate), _frame(b"", 0), _frame(bytes(34), 0)]),
        (1, [_greeting(b"CURVE"), _command(b"\x05HELLO\x01\x00" + bytes(72 + 32 + 8 + 80))]),
        (1, [_greeting(b"NULL"), _command(ready), asked]),
        (1, [b"\xff" + bytes(8) + b"\x7f\x01\x05" + b"\0\0" + _frame(b"x", 0)]),
        (0, [b"\x01\x00" + _frame(b"x", 0)]),
    ]
    messages = [
        [struct.pack("<H", 0)],
        [struct.pack("<HQQ", 2, 5, 0) + b"hello"],
        [struct.pack("<HQQQ", 3, 2, LARGE_BYTES, 1) + b"abc", _LARGE],
    ]
    return {
        "greeting": [bytes([how]) + join(pieces) for how, pieces in made],
        "exchange": [b"\x00" + first, b"\x01" + second, *[b"\x02" + join(each) for each in messages]],
    }

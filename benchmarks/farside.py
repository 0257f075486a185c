"""``python -m benchmarks.farside``: the far sides of ``rpc`` and ``transports``, in a process of their own.

A *mirror* is a server of the product's transports that answers with as many bytes as its first frame asks for; an
*echo* is a bare zmq socket that answers with frames of given sizes, which the first byte of a message chooses. Large
frames are lent to zmq and not copied, as the product's are.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zmq

import transports
from teegpu.bench import child
from teegpu.errors import ConnectionFailedError
from transports import security
from transports.base import FrameKind, Message, Server, ServerOptions
from transports.security import ServerKeys
from transports.sockets import has_message, send_parts

LENGTH = struct.Struct("<Q")

_BLOCK_BYTES = 16 * 2**20
"""Longer payloads repeat themselves, farther apart than zstd looks at the levels that are meant for a link."""
_KIND = FrameKind("payload", 2)
_ANSWER_MS = 10_000
_NO_LIMIT = 0


@lru_cache(maxsize=16)
def payload(size: int) -> bytes:
    """``size`` bytes of random fp16 values. Zeros would show a compression that no activations give."""
    values = np.random.default_rng(0).standard_normal(min(size, _BLOCK_BYTES) // 2 + 1, dtype=np.float32)
    block = values.astype(np.float16).tobytes()
    return (block * (size // len(block) + 1))[:size]


def question(size: int) -> Message:
    """A message with ``size`` bytes of payload that asks for as many."""
    return Message([LENGTH.pack(size), payload(size)], (FrameKind("length"), _KIND))


class Echo:
    """The near side of a bare echo. ``sizes`` are (frame sizes up, frame sizes down) in bytes for each number.

    ``reach`` makes of the far side's address where to connect. ``keys``: with zmq's CURVE, whoever knows the far side's
    key being welcome. It waits as the runner's transports do: polling for ``spin_seconds``, then asleep.
    """

    def __init__(
        self,
        far: child.Child,
        address: str,
        sizes: Sequence[tuple[Sequence[int], Sequence[int]]],
        spin_seconds: float,
        *,
        keys: bool = False,
        reach: Callable[[str], str] = str,
    ) -> None:
        self._spin_ns = int(spin_seconds * 1e9)
        self._messages = [
            [bytes([number]) + bytes(up[0] - 1), *(bytes(size) for size in up[1:])]
            for number, (up, _) in enumerate(sizes)
        ]
        replies = [list(down) for _, down in sizes]
        found = far.ask({"do": "echo", "address": address, "replies": replies, "keys": keys})
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.set_hwm(_NO_LIMIT)
        if keys:
            own, server = security.new_pair(), security.parse_public(found["public"], "the echo")
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, server.raw)
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, own.public.raw)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
        self._socket.connect(reach(found["address"]))

    def seconds(self, number: int, count: int = 1) -> float:
        """From handing message ``number`` over, ``count`` times, until all answers are here.

        Raises ``ConnectionFailedError``."""
        started = time.perf_counter_ns()
        for _ in range(count):
            send_parts(self._socket, self._messages[number])
        for _ in range(count):
            spin_until_ns = time.perf_counter_ns() + self._spin_ns
            while not has_message(self._socket):
                if time.perf_counter_ns() >= spin_until_ns and not self._socket.poll(_ANSWER_MS):
                    raise ConnectionFailedError("the bare zmq echo does not answer: its process may have ended")
            self._socket.recv_multipart(copy=False)
        return (time.perf_counter_ns() - started) / 1e9

    def close(self) -> None:
        self._context.destroy(linger=0)


# The far side


def handle(command: dict[str, Any]) -> dict[str, Any]:
    return _echo(command) if command["do"] == "echo" else _mirrors(command)


def _mirrors(command: dict[str, Any]) -> dict[str, Any]:
    """Servers at the addresses in ``open`` without keys, at those in ``keys`` with them."""
    pair = security.new_pair()
    keys = ServerKeys(pair, Path(command["clients"]))
    found: dict[str, Any] = {"public": pair.public.text}
    for kind, options in (("open", ServerOptions()), ("keys", ServerOptions(keys=keys))):
        servers = [transports.listen(address, options) for address in command[kind]]
        for server in servers:
            threading.Thread(target=mirror, args=(server,), daemon=True, name="mirror").start()
        found[kind] = [server.address for server in servers]
    return found


def mirror(server: Server) -> None:
    """Answers without end."""
    while True:
        incoming = server.next()
        if incoming is not None:
            (size,) = LENGTH.unpack(incoming.frames[0])
            server.reply(incoming, Message([payload(size)], (_KIND,)))


def _echo(command: dict[str, Any]) -> dict[str, Any]:
    socket = zmq.Context(io_threads=1).socket(zmq.ROUTER)
    socket.set_hwm(_NO_LIMIT)
    public = ""
    if command["keys"]:
        pair = security.new_pair()
        public = pair.public.text
        # Without our own handler, which asks who comes: that is no part of a bare exchange.
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)
    socket.bind(command["address"])
    replies = [[bytes(size) for size in sizes] for sizes in command["replies"]]
    threading.Thread(target=_answer, args=(socket, replies), daemon=True, name="echo").start()
    address = socket.getsockopt(zmq.LAST_ENDPOINT)
    return {"address": bytes(address).rstrip(b"\0").decode(), "public": public}


def _answer(socket: zmq.Socket[bytes], replies: Sequence[Sequence[bytes]]) -> None:
    while True:
        client, first, *_ = socket.recv_multipart(copy=False)
        send_parts(socket, [client.bytes, *replies[first.buffer[0]]])


if __name__ == "__main__":
    child.serve(handle)

"""A bare zmq echo between two processes: what a round trip of given bytes costs with nothing around it.

``python -m teegpu.bench.echo`` is its far side, run by ``Echo`` only. It answers a message with one of given frame
sizes, which the first byte of the message chooses. Large frames are lent to zmq and not copied, as the product's are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from teegpu.bench import serving
from teegpu.bench.child import Child
from teegpu.errors import ConnectionFailedError
from transports import security
from transports.connection import has_message, send_parts
from transports.security import CurveClient

_ANSWER_MS = 10_000
_NO_LIMIT = 0


class Echo:
    """The near side, with its far side. ``sizes`` are (frame sizes up, frame sizes down) in bytes for each number.

    ``address`` is where the far side listens, ``reach`` makes of it where to connect. ``keys``: with CURVE, whoever
    knows the far side's key being welcome. It waits as the runner's transports do: polling for ``spin_seconds``, then
    asleep. Use it with ``with``.
    """

    def __init__(
        self,
        address: str,
        sizes: Sequence[tuple[Sequence[int], Sequence[int]]],
        spin_seconds: float,
        *,
        keys: bool = False,
        reach: Callable[[str], str] = str,
    ) -> None:
        self._spin_ns = int(spin_seconds * 1e9)
        self._messages = [_message(number, up) for number, (up, _) in enumerate(sizes)]
        self._child = Child("teegpu.bench.echo", "a bare zmq round trip")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        try:
            replies = [list(down) for _, down in sizes]
            far = self._child.ask({"do": "echo", "address": address, "replies": replies, "keys": keys})
            self._socket = self._context.socket(zmq.DEALER)
            self._socket.linger = 0
            self._socket.set_hwm(_NO_LIMIT)
            if keys:
                CurveClient(security.new_pair(), security.parse_public(far["public"], "the bare echo")).apply(
                    self._socket
                )
            self._socket.connect(reach(far["address"]))
        except BaseException:
            self.close()
            raise

    def round_trip_ns(self, number: int) -> int:
        """Nanoseconds from handing message ``number`` over until its answer is here.

        Raises ``ConnectionFailedError``.
        """
        return self.batch_ns(number, 1)

    def batch_ns(self, number: int, count: int) -> int:
        """Nanoseconds from handing message ``number`` over, ``count`` times, until all answers are here.

        Raises ``ConnectionFailedError``.
        """
        socket = self._socket
        started_ns = time.perf_counter_ns()
        for _ in range(count):
            send_parts(socket, self._messages[number])
        for _ in range(count):
            self._receive()
        return time.perf_counter_ns() - started_ns

    def _receive(self) -> None:
        socket = self._socket
        spin_until_ns = time.perf_counter_ns() + self._spin_ns
        while not has_message(socket):
            if time.perf_counter_ns() >= spin_until_ns and not socket.poll(_ANSWER_MS):
                raise ConnectionFailedError("the bare zmq echo does not answer: its process may have ended")
        socket.recv_multipart(copy=False)

    def close(self) -> None:
        self._context.destroy(linger=0)
        self._child.close()

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _message(number: int, sizes: Sequence[int]) -> list[bytes]:
    """Frames of ``sizes``, the first of which begins with ``number``."""
    return [bytes([number]) + bytes(sizes[0] - 1), *(bytes(size) for size in sizes[1:])]


def _handle(command: dict[str, Any]) -> dict[str, Any]:
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
    serving.serve(_handle)

"""A bare zmq echo between two processes: what a round trip of given bytes costs with nothing around it.

``python -m teegpu.bench.echo`` is its far side, run by ``teegpu.bench.overhead`` only. It answers a message with one of
given frame sizes, which the first byte of the message chooses.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import zmq

from teegpu.bench import serving
from teegpu.bench.child import Child
from teegpu.errors import ConnectionFailedError
from transports.connection import has_message

_ANSWER_MS = 10_000


class Echo:
    """The near side, with its far side. ``sizes`` are (frame sizes up, frame sizes down) in bytes for each number.

    It waits as the runner's transports do: polling for ``spin_seconds``, then asleep. Use it with ``with``.
    """

    def __init__(self, address: str, sizes: Sequence[tuple[Sequence[int], Sequence[int]]], spin_seconds: float) -> None:
        self._spin_ns = int(spin_seconds * 1e9)
        self._messages = [_message(number, up) for number, (up, _) in enumerate(sizes)]
        self._child = Child("teegpu.bench.echo", "a bare zmq round trip")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        try:
            self._child.ask({"do": "echo", "address": address, "replies": [list(down) for _, down in sizes]})
            self._socket = self._context.socket(zmq.DEALER)
            self._socket.linger = 0
            self._socket.connect(address)
        except BaseException:
            self.close()
            raise

    def round_trip_ns(self, number: int) -> int:
        """Nanoseconds from handing message ``number`` over until its answer is here.

        Raises ``ConnectionFailedError``.
        """
        socket = self._socket
        started_ns = time.perf_counter_ns()
        socket.send_multipart(self._messages[number])
        spin_until_ns = started_ns + self._spin_ns
        while not has_message(socket):
            if time.perf_counter_ns() >= spin_until_ns and not socket.poll(_ANSWER_MS):
                raise ConnectionFailedError("the bare zmq echo does not answer: its process may have ended")
        socket.recv_multipart()
        return time.perf_counter_ns() - started_ns

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
    socket.bind(command["address"])
    replies = [[bytes(size) for size in sizes] for sizes in command["replies"]]
    threading.Thread(target=_answer, args=(socket, replies), daemon=True, name="echo").start()
    return {"ready": True}


def _answer(socket: zmq.Socket[bytes], replies: Sequence[Sequence[bytes]]) -> None:
    while True:
        client, first, *_ = socket.recv_multipart()
        socket.send_multipart([client, *replies[first[0]]])


if __name__ == "__main__":
    serving.serve(_handle)

"""The far side of ``teegpu bench transports`` and ``curve``: servers that answer with as many bytes as are asked for,
some open and some with keys.

``python -m teegpu.bench.mirror`` is run by ``teegpu.bench.exchanges`` only. A request's first frame is the length of
the reply in bytes, eight of them, little-endian.
"""

from __future__ import annotations

import struct
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import transports
from teegpu.bench import serving
from transports import security
from transports.base import FrameKind, Message, Server, ServerOptions
from transports.security import CurveServer

LENGTH = struct.Struct("<Q")

_BLOCK_BYTES = 16 * 2**20
"""Longer payloads repeat themselves, farther apart than zstd looks at the levels that are meant for a link."""
_KIND = FrameKind("payload", 2)


@lru_cache(maxsize=16)
def payload(size: int) -> bytes:
    """``size`` bytes of random fp16 values. Zeros would show a compression that no activations give."""
    values = np.random.default_rng(0).standard_normal(min(size, _BLOCK_BYTES) // 2 + 1, dtype=np.float32)
    block = values.astype(np.float16).tobytes()
    return (block * (size // len(block) + 1))[:size]


def question(size: int) -> Message:
    """A message with ``size`` bytes of payload that asks for as many."""
    return Message([LENGTH.pack(size), payload(size)], (FrameKind("length"), _KIND))


class Mirror:
    """Answers what comes to ``server``, in a thread of its own, until the process ends or ``close``."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._ended = False
        self._thread = threading.Thread(target=self._answer, daemon=True, name="mirror")
        self._thread.start()

    def _answer(self) -> None:
        while not self._ended:
            incoming = self._server.next()
            if incoming is not None:
                (size,) = LENGTH.unpack(incoming.frames[0])
                self._server.reply(incoming, Message([payload(size)], (_KIND,)))

    def close(self) -> None:
        self._ended = True
        self._server.wake()
        self._thread.join()
        self._server.close()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _handle(command: dict[str, Any]) -> dict[str, Any]:
    pair = security.new_pair()
    keys = CurveServer(pair, Path(command["clients"]))
    found: dict[str, list[str]] = {}
    for kind, options in (("open", ServerOptions()), ("keys", ServerOptions(curve=keys))):
        servers = [transports.listen(address, options) for address in command[kind]]
        for server in servers:
            Mirror(server)
        found[kind] = [server.address for server in servers]
    return {**found, "public": pair.public.text}


if __name__ == "__main__":
    serving.serve(_handle)

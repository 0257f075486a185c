"""The far side of ``teegpu bench curve``: two servers in one process that answer with as many bytes as are asked for,
one open and one with keys.

``python -m teegpu.bench.mirror`` is run by ``teegpu.bench.curve`` only. A request's first frame is the length of the
reply in bytes, eight of them, little-endian.
"""

from __future__ import annotations

import struct
import threading
from pathlib import Path
from typing import Any

import transports
from teegpu.bench import serving
from transports import security
from transports.base import Message, Server, ServerOptions
from transports.security import CurveServer

LENGTH = struct.Struct("<Q")


def _handle(command: dict[str, Any]) -> dict[str, Any]:
    pair = security.new_pair()
    curve = CurveServer(pair, Path(command["clients"]))
    addresses = []
    for options in (ServerOptions(), ServerOptions(curve=curve)):
        server = transports.listen("tcp://127.0.0.1:0", options)
        threading.Thread(target=_answer, args=(server,), daemon=True, name="mirror").start()
        addresses.append(server.address)
    return {"open": addresses[0], "keys": addresses[1], "public": pair.public.text}


def _answer(server: Server) -> None:
    replies: dict[int, bytes] = {}
    while True:
        incoming = server.next()
        if incoming is not None:
            (size,) = LENGTH.unpack(incoming.frames[0])
            server.reply(incoming, Message([replies.setdefault(size, bytes(size))]))


if __name__ == "__main__":
    serving.serve(_handle)

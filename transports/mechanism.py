"""What a zmq peer says of itself before any key is exchanged: for the reason why a handshake fails.

A server to which the client shows a wrong key just closes the connection, as a server that ends does, or a relay to
nobody. The greeting tells them apart: it is ZMTP's first 64 bytes, of which 20 name the mechanism (NULL, CURVE).
"""

from __future__ import annotations

import contextlib
import socket
import time

from transports import addresses

GREETING_BYTES = 64
_OURS = b"\xff" + bytes(8) + b"\x7f" + bytes([3, 0])
"""The greeting's beginning, signature and version: the peer then shows all of its own. Had it ours whole, it might
close the connection for what it reads there before it has answered."""

_MECHANISM = slice(12, 32)


def ask(endpoint: str, timeout_seconds: float) -> str:
    """``"CURVE"``, ``"NULL"``, …; empty where nobody answers like a zmq peer within the time."""
    deadline = time.monotonic() + timeout_seconds
    with contextlib.suppress(OSError), _connect(endpoint, timeout_seconds) as connection:
        connection.sendall(_OURS)
        greeting = b""
        while len(greeting) < GREETING_BYTES:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            part = connection.recv(GREETING_BYTES - len(greeting))
            if not part:
                return ""
            greeting += part
        if greeting[0] == 0xFF and greeting[9] == 0x7F:
            return greeting[_MECHANISM].rstrip(b"\0").decode("ascii", "replace")
    return ""


def _connect(endpoint: str, timeout_seconds: float) -> socket.socket:
    address = addresses.parse(endpoint)
    if address.scheme == "ipc":
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_seconds)
            connection.connect(address.path)
        except BaseException:
            connection.close()
            raise
        return connection
    return socket.create_connection((address.host.strip("[]"), address.port), timeout=timeout_seconds)

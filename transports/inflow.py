"""What has come over a TCP connection and was not handed over yet, as the kernel counts it.

zmq gathers a whole message before it hands over any of it, and has no bound for that: a peer that sends frames without
end, each with the promise of another, would fill our memory, and nothing of it would ever arrive. The kernel's counter
shows it. Over ipc there is none; a socket's file lets in nobody but its own user.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket as sockets
import struct
import termios

FRAMING_BYTES = 64 * 1024
"""Of a message's frame headers, envelope and encryption: 64 frames take 2.8 KB."""

_BYTES_RECEIVED = struct.Struct("=Q")
_BYTES_RECEIVED_OFFSET = 128  # in struct tcp_info, since Linux 4.1
_TCP_INFO_BYTES = 192


def received_bytes(socket: sockets.socket) -> int | None:
    """Bytes that have come over a TCP connection and that its owner has taken; None where the kernel counts none."""
    if socket.family == sockets.AF_UNIX:
        return None
    try:
        # In this order: what arrives between the two is then counted too early, never too late.
        waiting = fcntl.ioctl(socket.fileno(), termios.FIONREAD, b"\0\0\0\0")
        info = socket.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, _TCP_INFO_BYTES)
    except OSError:
        return None
    if len(info) < _BYTES_RECEIVED_OFFSET + _BYTES_RECEIVED.size:
        return None
    received: int = _BYTES_RECEIVED.unpack_from(info, _BYTES_RECEIVED_OFFSET)[0]
    return received - int.from_bytes(waiting, "little", signed=True)


class Inflow:
    """The connection behind one client's socket. ``counts``: whether the kernel tells its bytes."""

    def __init__(self) -> None:
        self._socket: sockets.socket | None = None
        self._settled = True
        self._settled_bytes = 0

    @property
    def counts(self) -> bool:
        return self._socket is not None

    def connected(self, fd: int) -> None:
        """The connection has the descriptor ``fd``. A duplicate is kept: that number may come to mean another one."""
        self.close()
        with contextlib.suppress(OSError):  # it has ended already
            socket = sockets.socket(fileno=os.dup(fd))
            if received_bytes(socket) is None:
                socket.close()
            else:
                self._socket = socket

    def settle(self) -> None:
        """A whole message was handed over: what is still to come is counted from here."""
        self._settled = False

    def unfinished(self) -> int:
        """Bytes that have come since the last whole message; 0 where nobody counts them."""
        received = None if self._socket is None else received_bytes(self._socket)
        if received is None:
            return 0
        if not self._settled:
            self._settled = True
            self._settled_bytes = received
        return received - self._settled_bytes

    def close(self) -> None:
        """Forget the connection. May be called twice."""
        socket, self._socket = self._socket, None
        if socket is not None:
            socket.close()

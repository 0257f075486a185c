"""Binding a server's socket: real addresses, private Unix sockets, and errors that say what stands in the way."""

from __future__ import annotations

import errno
import os
import socket as sockets
import stat
from dataclasses import dataclass
from pathlib import Path

import zmq

from transports import addresses
from transports.errors import BadAddressError

PRIVATE_DIRECTORY = 0o700
PRIVATE_SOCKET_UMASK = 0o177


@dataclass(frozen=True, slots=True)
class Binding:
    """Where a socket listens: ``address`` with port 0 and wildcard ports resolved."""

    address: str
    path: Path | None = None
    inode: int = 0

    def release(self) -> None:
        """Remove the socket's file, which zmq leaves behind; not one that somebody else has put in its place."""
        if self.path is None:
            return
        try:
            if self.path.lstat().st_ino == self.inode:
                self.path.unlink()
        except OSError:
            return  # gone already, or its directory is: nothing is left to release


def bind(socket: zmq.Socket[bytes], text: str) -> Binding:
    """Bind ``socket`` to ``text``.

    Raises ``BadAddressError``: bad syntax, port or path taken, no permission, no such interface.
    """
    address = addresses.parse(text, listening=True)
    if address.scheme == "ipc":
        return _bind_ipc(socket, address)
    socket.setsockopt(zmq.IPV6, int("[" in address.host))
    try:
        socket.bind(address.text)
    except zmq.ZMQError as error:
        raise BadAddressError(f"can't listen on {text}: {_why(error)}") from error
    return Binding(socket.getsockopt_string(zmq.LAST_ENDPOINT))


def _why(error: zmq.ZMQError) -> str:
    if error.errno == zmq.EADDRINUSE:
        return "another program listens there; choose another port, or port 0 for any free one"
    if error.errno in (zmq.EADDRNOTAVAIL, errno.ENODEV):
        return "this machine has no interface of that address"
    return (error.strerror or "unknown error").lower()


def _bind_ipc(socket: zmq.Socket[bytes], address: addresses.Address) -> Binding:
    path = Path(address.path)
    try:
        path.parent.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        _remove_stale(path)
        # Private from its first moment on, even in a directory that others can enter.
        previous = os.umask(PRIVATE_SOCKET_UMASK)
        try:
            socket.bind(address.text)
        finally:
            os.umask(previous)
        return Binding(address.text, path, path.lstat().st_ino)
    except zmq.ZMQError as error:
        raise BadAddressError(f"can't listen on {address.text}: {_why(error)}") from error
    except OSError as error:
        raise BadAddressError(f"can't listen on {address.text}: {(error.strerror or str(error)).lower()}") from error


def _remove_stale(path: Path) -> None:
    """Remove the socket file of a server that is gone. zmq would remove any file, a living server's socket included."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BadAddressError(f"can't listen on ipc://{path}: there is a file of that name that is not a socket")
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise BadAddressError(f"can't listen on ipc://{path}: another server listens there; choose another path")

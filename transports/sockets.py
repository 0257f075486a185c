"""What both sides need of sockets: whole messages, monitors, addresses to listen on, and what the kernel knows."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import resource
import socket as sockets
import stat
import struct
import sys
import termios
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import zmq

from transports import addresses
from transports.base import Buffer
from transports.errors import BadAddressError, LimitError

ZERO_COPY_BYTES = 64 * 1024
"""From here on, lending zmq the buffer is cheaper than copying it (its free callback costs a thread hop)."""

KEEPALIVE_IDLE_SECONDS = 15
KEEPALIVE_INTERVAL_SECONDS = 5
KEEPALIVE_PROBES = 3

# Plain integers: zmq's own constants are enums, whose operators cost more than the call that they are passed to.
EVENTS = int(zmq.EVENTS)
POLLIN = int(zmq.POLLIN)
NOBLOCK = int(zmq.NOBLOCK)
NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)


def keep_alive(socket: zmq.Socket[bytes]) -> None:
    """Have the kernel find out within half a minute that an idle peer's machine is gone.

    Not zmq's own heartbeats: those queue behind the data, so that a slow or stalled link looks like a dead peer.
    """
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_IDLE_SECONDS)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_INTERVAL_SECONDS)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, KEEPALIVE_PROBES)


def send_parts(socket: zmq.Socket[bytes], parts: Sequence[Buffer]) -> None:
    """Hand a whole message to ``socket`` without waiting: small frames are copied, large ones lent.

    ``parts`` are flat (see ``envelope.byte_view``).
    Raises ``zmq.Again`` when the peer's queue is full (the first frame decides: no half message is ever sent).
    """
    last = len(parts) - 1
    for index, part in enumerate(parts):
        socket.send(part, NOBLOCK if index == last else NOBLOCK_MORE, copy=len(part) < ZERO_COPY_BYTES)


def has_message(socket: zmq.Socket[bytes]) -> bool:
    """Whether a whole message can be read now. Also the only way to learn it after an edge on the descriptor."""
    return bool(cast(int, socket.get(EVENTS)) & POLLIN)


def receive_parts(socket: zmq.Socket[bytes]) -> list[memoryview]:
    """A whole message, without copying it; its frames may be written to. Raises ``zmq.Again`` when there is none."""
    frame = socket.recv(NOBLOCK, copy=False)
    parts = [frame.buffer]
    while frame.more:
        frame = socket.recv(NOBLOCK, copy=False)
        parts.append(frame.buffer)
    return parts


# Descriptors


OTHER_DESCRIPTORS = 128
"""Of a server beside its connections: its model's files, zmq's own, logs, what libraries open for a moment."""


def reserve_descriptors(connections: int) -> None:
    """Let this process have as many descriptors as so many connections take, each with the duplicate of ``guard``.
    Without one left, zmq would try to accept the next connection again and again.

    Raises ``LimitError`` where the system does not allow that.
    """
    needed = 2 * connections + OTHER_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise LimitError(
            f"limits.clients: so many clients may need {needed} descriptors, and this process may have {hard}: allow "
            "fewer, or raise the system's limit (ulimit -Hn; LimitNOFILE= of systemd)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


# Names


def unforeseeable_names() -> None:
    """Before a ROUTER is made. zmq gives its connections numbers for names, one after the other from what C's ``rand``
    says, which it seeds with nothing: the first is the same in each process. A peer may choose its own name, and zmq
    ends the process where that is the next one's."""
    with contextlib.suppress(AttributeError, OSError):  # a C library without it
        ctypes.CDLL(None).srand(int.from_bytes(os.urandom(4), sys.byteorder))


# Monitors


_MONITOR_EVENT = struct.Struct("=HI")
_numbers = itertools.count(1)


def inner_address(what: str) -> str:
    """A new address inside this process, for zmq's own sockets."""
    return f"inproc://teegpu-{what}-{next(_numbers)}"


def monitor(context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
    """A socket on which zmq tells of ``events`` of ``socket``; read each with ``read_event``."""
    watching = context.socket(zmq.PAIR)
    watching.setsockopt(zmq.LINGER, 0)
    watching.setsockopt(zmq.RCVHWM, 0)  # zmq's own thread would wait for us to make room
    address = inner_address("monitor")
    socket.monitor(address, events)
    watching.connect(address)
    return watching


def read_event(parts: Sequence[bytes]) -> tuple[int, int]:
    """Which event it was, and its value: a descriptor, or the cause of a failure."""
    event, value = _MONITOR_EVENT.unpack(parts[0])
    return event, value


# Waking a thread


class Wakeup:
    """A pipe that wakes a thread out of poll. ``set`` may be called from anywhere, signal handlers included."""

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write_fd, False)

    def set(self) -> None:
        try:
            os.write(self._write_fd, b"!")
        except BlockingIOError:
            return  # the pipe is full: it will wake its reader anyway

    def clear(self) -> None:
        try:
            os.read(self.fd, 4096)
        except BlockingIOError:
            return

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._write_fd)


# What has come over a TCP connection and was not handed over yet, as the kernel counts it. zmq gathers a whole message
# before it hands over any of it, and has no bound for that: a peer that sends frames without end, each with the promise
# of another, would fill our memory, and nothing of it would ever arrive. The kernel's counter shows it. Over ipc there
# is none; a socket's file lets in nobody but its own user.


FRAMING_BYTES = 64 * 1024
"""Of a message's frame headers, envelope and encryption: 64 frames take 2.8 KB."""

_TCP_RECEIVED = struct.Struct("=Q")
_TCP_RECEIVED_OFFSET = 128  # bytes_received in struct tcp_info, since Linux 4.1
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
    if len(info) < _TCP_RECEIVED_OFFSET + _TCP_RECEIVED.size:
        return None
    (received,) = _TCP_RECEIVED.unpack_from(info, _TCP_RECEIVED_OFFSET)
    return int(received) - int.from_bytes(waiting, "little", signed=True)


_SO_COOKIE = 57


def duplicate(fd: int) -> sockets.socket:
    """Another descriptor of the socket ``fd``. Raises ``OSError`` where it is none."""
    another = os.dup(fd)
    try:
        return sockets.socket(fileno=another)
    except OSError:
        os.close(another)
        raise


def identity(socket: sockets.socket) -> int:
    """The kernel's number of a socket, which its duplicates share and no other socket has had."""
    return int.from_bytes(socket.getsockopt(sockets.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)


_DISCARDS, _DISCARD_BYTES = 64, 2**20
_RESET = struct.pack("ii", 1, 0)


def cut(socket: sockets.socket) -> None:
    """End the connection that ``socket`` is a duplicate of."""
    with contextlib.suppress(OSError):  # the other side was quicker
        # A reset when it is closed: a peer in the middle of sending would not take notice of an orderly end.
        socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, _RESET)
        socket.shutdown(sockets.SHUT_RDWR)
        # What is in the kernel's buffer comes before the end: zmq would still take in megabytes of it.
        for _ in range(_DISCARDS):
            if not socket.recv(_DISCARD_BYTES, sockets.MSG_TRUNC | sockets.MSG_DONTWAIT):
                break


_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """Memory that this process has."""
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read(256).split()[1]) * _PAGE_BYTES


# Binding a server's socket: real addresses, private Unix sockets, and errors that say what stands in the way


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
        remove_stale(path, f"ipc://{path}")
        with private_socket():
            socket.bind(address.text)
        return Binding(address.text, path, path.lstat().st_ino)
    except zmq.ZMQError as error:
        raise BadAddressError(f"can't listen on {address.text}: {_why(error)}") from error
    except OSError as error:
        raise BadAddressError(f"can't listen on {address.text}: {(error.strerror or str(error)).lower()}") from error


@contextlib.contextmanager
def private_socket() -> Iterator[None]:
    """A socket's file that is made within it is private from its first moment on, even in a directory that others can
    enter."""
    previous = os.umask(PRIVATE_SOCKET_UMASK)
    try:
        yield
    finally:
        os.umask(previous)


def remove_stale(path: Path, text: str) -> None:
    """Remove the socket file of a server that is gone. zmq would remove any file, a living server's socket included.
    ``text`` is the address for people. Raises ``BadAddressError`` for what is there and is none, and ``OSError``."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise BadAddressError(f"can't listen on {text}: there is a file of that name that is not a socket")
        with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
            probe.connect(os.fspath(path))
    except FileNotFoundError:  # its server may go at this moment
        return
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
        return
    raise BadAddressError(f"can't listen on {text}: another server listens there; choose another path")

"""The connections behind a ROUTER socket, and the means to end one, which zmq itself does not offer.

zmq gathers a whole message before it hands over any of it, and has no bound for that: a peer that sends frames without
end, each with the promise of another, would fill the server's memory, and nothing of it would ever arrive. Nor does zmq
tell of connections that say nothing. So the guard has zmq's monitor tell the descriptor of each connection, keeps a
duplicate (the number can't come to mean another connection then), and shuts the connection down where

- no whole, valid message has come within the hello time-out (zmq itself ends those that do not finish its handshake);
- more has arrived since the last whole message than one may have (the kernel counts a TCP connection's bytes);
- the process has grown by more than its users and the bytes of unfinished messages explain: a frame without content has
  2 bytes on the link and takes 64 in zmq. Those with the fewest finished messages go first;
- there are more connections than clients are allowed: the oldest that has said nothing makes room;
- the router asks for it (``end``): a client takes none of its replies.

zmq then sees the end of the stream and frees what it gathered. Over ipc the kernel counts no bytes, and zmq does not
say which connection a message came over: connections are counted there, and nothing else of this applies. The socket's
file lets in nobody but its own user.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import socket as sockets
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from transports.connection import NOBLOCK, has_message
from transports.inflow import FRAMING_BYTES, received_bytes

log = logging.getLogger(__name__)

SWEEP_SECONDS = 0.025
SUSPECT_SWEEP_SECONDS = 0.005
"""Between two sweeps, and while there are suspects. One zmq thread was seen to take in 15 million empty frames a
second, which is 25 MB in the longer of the two."""

SUSPECT_BYTES = 4096
"""Of an unfinished message. The requests of a decode step are smaller, or arrive whole."""

UNEXPLAINED_BYTES = 24 * 2**20
"""Growth of the process beyond what is known of, while somebody's message is unfinished."""

TRIMMING_SWEEPS = 8
"""After connections were ended for it. zmq needs a moment to free their memory, which is then given back, so that the
next ones are held against what the process had before."""

SPARE_CONNECTIONS = 64
"""Beyond the clients allowed: those that have not said anything yet, and one-off questions."""

_DISCARDS, _DISCARD_BYTES = 64, 2**20
_RESET = struct.pack("ii", 1, 0)
_SOURCE = int(zmq.SRCFD)
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_ACCEPT_FAILED
_MONITOR_EVENT = struct.Struct("=HI")
_monitor_numbers = itertools.count(1)


@dataclass(slots=True)
class Peer:
    """A connection. ``number`` counts them, for logs; ``client`` is zmq's name for it once it has sent something."""

    socket: sockets.socket
    number: int
    address: str
    accepted: float
    client: bytes = b""
    messages: int = 0
    tcp: bool = True
    settled_messages: int = 0
    settled_bytes: int = 0
    unfinished: int = 0
    resident_then: int | None = None
    explained_then: int = 0
    ended: bool = False


class Guard:
    """Belongs to a router and is used under its lock. ``explained_bytes`` tells what the router knows to be held for
    clients; ``user_bytes`` is what the router's own user may take from memory for requests beyond that.
    ``failed_handshakes`` is where zmq's events of that kind are to be handed on."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        socket: zmq.Socket[bytes],
        *,
        max_connections: int,
        max_message_bytes: int,
        max_unfinished_bytes: int,
        hello_timeout_seconds: float,
        queued_messages: int,
        explained_bytes: Callable[[], int],
        failed_handshakes: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.user_bytes = 0
        self.ended = 0
        self._max_connections = max_connections
        self._max_unfinished = max_message_bytes + FRAMING_BYTES
        self._max_all_unfinished = max_unfinished_bytes
        self._queued_messages = queued_messages
        self._hello_seconds = hello_timeout_seconds
        self._explained_bytes = explained_bytes
        self._clock = clock
        self._peers: dict[int, Peer] = {}
        self._clients: dict[bytes, Peer] = {}
        self._numbers = itertools.count(1)
        self._trimming = 0
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._watched = socket
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.setsockopt(zmq.LINGER, 0)
        self._monitor.setsockopt(zmq.RCVHWM, 0)  # zmq's own thread would wait for us to make room
        self._handed_on: zmq.Socket[bytes] | None = None
        events = _EVENTS
        if failed_handshakes is not None:
            events |= zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            self._handed_on = context.socket(zmq.PAIR)
            self._handed_on.connect(failed_handshakes)
        address = f"inproc://teegpu-guard-{next(_monitor_numbers)}"
        socket.monitor(address, int(events))
        self._monitor.connect(address)
        self.fd = self._monitor.FD
        self._memory = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def connections(self) -> int:
        return len(self._peers)

    def update(self) -> list[Peer]:
        """Take notice of connections that came and went; returns those that went."""
        gone: list[Peer] = []
        while has_message(self._monitor):
            parts = self._monitor.recv_multipart(NOBLOCK)
            event, value = _MONITOR_EVENT.unpack(parts[0])
            if event == zmq.EVENT_ACCEPTED:
                self._accepted(value)
            elif event in (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
                self._hand_on(parts)
            elif event == zmq.EVENT_ACCEPT_FAILED:
                log.warning(
                    "a connection could not be accepted: %s",
                    os.strerror(value),
                    extra={"event": "accept-failed", "reason": os.strerror(value)},
                )
            elif (peer := self._peers.pop(value, None)) is not None:
                self._forget(peer)
                gone.append(peer)
        return gone

    def _hand_on(self, parts: list[bytes]) -> None:
        if self._handed_on is not None:
            with contextlib.suppress(zmq.Again):  # so many that nobody needs to know of each
                self._handed_on.send_multipart(parts, NOBLOCK)

    def _accepted(self, fd: int) -> None:
        try:
            socket = sockets.socket(fileno=os.dup(fd))
        except OSError:
            return  # it has gone already, and the event that says so follows
        replaced = self._peers.pop(fd, None)
        if replaced is not None:
            self._forget(replaced)
        peer = Peer(socket, next(self._numbers), _address_of(socket), self._clock())
        self._peers[fd] = peer
        peer.tcp = socket.family != sockets.AF_UNIX
        if len(self._peers) > self._max_connections:
            silent = (each for each in self._peers.values() if each.tcp and not each.messages and not each.ended)
            oldest = min(silent, key=lambda each: each.accepted, default=peer)
            self._end(oldest, f"there are more than {self._max_connections} connections (limits.clients)")

    def _forget(self, peer: Peer) -> None:
        peer.socket.close()
        if self._clients.get(peer.client) is peer:
            del self._clients[peer.client]

    def known(self, client: bytes) -> Peer | None:
        """The connection of ``client``, where it has sent something before."""
        return self._clients.get(client)

    def bind(self, client: bytes, frame: zmq.Frame) -> Peer | None:
        """The connection that ``frame``, the first of the first message of ``client``, came over; None where that can't
        be told. Only right after ``update``: a descriptor's number may stand for another connection since."""
        try:
            peer = self._peers.get(frame.get(_SOURCE))
        except zmq.ZMQError:
            return None  # ipc, or it ended as soon as it was there
        if peer is not None:
            self._clients.pop(peer.client, None)
            peer.client = client
            self._clients[client] = peer
        return peer

    def sweep(self, *, paused: bool) -> float:
        """Look after all connections; returns the seconds until this is to be done again. Whatever has arrived whole
        was read before, unless reading is ``paused``."""
        now = self._clock()
        suspects: list[Peer] = []
        unfinished = 0
        for peer in list(self._peers.values()):
            if peer.ended or not peer.tcp:
                continue
            if not peer.messages and now - peer.accepted > self._hello_seconds:
                self._end(peer, f"it said nothing for {self._hello_seconds:g} s (limits.hello_timeout_seconds)")
                continue
            self._count(peer)
            unfinished += peer.unfinished
            allowed = self._max_unfinished * (1 + self._queued_messages if paused else 1)
            if peer.unfinished > allowed:
                self._end(peer, "its message is larger than limits.message_mib allows, and has no end")
            elif peer.unfinished >= SUSPECT_BYTES:
                suspects.append(peer)
            else:
                peer.resident_then = None
        if self._trimming:
            self._trimming -= 1
            _trim()
        if suspects:
            if unfinished > self._max_all_unfinished:
                self._end_newest(suspects, "too many bytes of unfinished messages have come from all clients together")
            else:
                self._judge(suspects, unfinished)
        return SUSPECT_SWEEP_SECONDS if suspects or self._trimming else SWEEP_SECONDS

    def _count(self, peer: Peer) -> None:
        """Bring ``peer.unfinished`` up to date: bytes that zmq has read since the last whole message."""
        received = received_bytes(peer.socket)
        if received is None:
            return
        if peer.messages != peer.settled_messages:
            peer.settled_messages = peer.messages
            peer.settled_bytes = received
            peer.resident_then = None
        peer.unfinished = received - peer.settled_bytes

    def _judge(self, suspects: list[Peer], unfinished: int) -> None:
        resident, explained = self._resident(), self._explained_bytes() + unfinished
        for peer in suspects:
            if peer.resident_then is None or resident < peer.resident_then:
                peer.resident_then, peer.explained_then = resident, explained

        def unexplained(peer: Peer) -> int:
            grown = resident - (peer.resident_then or 0)
            return grown - max(0, explained - peer.explained_then)

        if max(map(unexplained, suspects)) <= UNEXPLAINED_BYTES + self.user_bytes:
            return
        self._end_newest(suspects, "its unfinished message takes far more memory than it has bytes: too many frames")

    def _end_newest(self, suspects: list[Peer], reason: str) -> None:
        """End the half of ``suspects`` that has finished the fewest messages: who has worked with us goes last."""
        suspects.sort(key=lambda peer: peer.messages)
        last = suspects[(len(suspects) - 1) // 2].messages
        for peer in suspects:
            if peer.messages <= last:
                self._end(peer, reason)
            peer.resident_then = None  # whoever is left begins anew
        self._trimming = TRIMMING_SWEEPS

    def end(self, client: bytes, reason: str) -> None:
        """End the connection of ``client``, where there is one."""
        peer = self._clients.get(client)
        if peer is not None and not peer.ended:
            self._end(peer, reason)

    def _resident(self) -> int:
        return int(os.pread(self._memory, 256, 0).split()[1]) * self._page_bytes

    def _end(self, peer: Peer, reason: str) -> None:
        peer.ended = True
        self.ended += 1
        with contextlib.suppress(OSError):  # the other side was quicker
            # A reset when it is closed: a peer in the middle of sending would not take notice of an orderly end.
            peer.socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, _RESET)
            peer.socket.shutdown(sockets.SHUT_RDWR)
            # What is in the kernel's buffer comes before the end: zmq would still take in megabytes of it.
            for _ in range(_DISCARDS):
                if not peer.socket.recv(_DISCARD_BYTES, sockets.MSG_TRUNC | sockets.MSG_DONTWAIT):
                    break
        log.warning(
            "ended the connection of %s: %s",
            peer.address,
            reason,
            extra={"event": "connection-ended", "connection": peer.number, "peer": peer.address, "reason": reason},
        )

    def close(self) -> None:
        """Release everything but the connections themselves. May be called twice."""
        if self._monitor.closed:
            return
        if not self._watched.closed:
            self._watched.monitor(None, 0)
        self._monitor.close(0)
        if self._handed_on is not None:
            self._handed_on.close(0)
        for peer in self._peers.values():
            peer.socket.close()
        self._peers.clear()
        self._clients.clear()
        os.close(self._memory)


def _address_of(socket: sockets.socket) -> str:
    """Where the other side is: ``127.0.0.1:40404``, ``[::1]:40404``, or ``ipc``."""
    if socket.family == sockets.AF_UNIX:
        return "ipc"
    try:
        host, port = socket.getpeername()[:2]
    except OSError:
        return "unknown"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _trim() -> None:
    """Give freed memory back to the system, so that what an ended connection took is not counted as taken."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # another C library: it has its own ways

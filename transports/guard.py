"""The connections behind a ROUTER socket, and the means to end one, which zmq itself does not offer.

zmq gathers a whole message before it hands over any of it, and has no bound for that: a peer that sends frames without
end, each with the promise of another, would fill the server's memory, and nothing of it would ever arrive. Nor does zmq
tell of connections that say nothing. So the guard has zmq's monitor tell the descriptor of each connection, keeps a
duplicate (the number can't come to mean another connection then), and shuts the connection down where

- no whole, valid message has come within the hello time-out (zmq itself ends those that do not finish its handshake);
- there are keys, and more has arrived than a handshake has, before the peer has proved to have one that is allowed (zmq
  would take in one command of a handshake as large as a message may be);
- more has arrived since the last whole message than one may have, or over all connections of one key than it may have
  in hand (the kernel counts a TCP connection's bytes);
- the process has grown by more than its users and the bytes of unfinished messages explain: a frame without content has
  2 bytes on the link and takes 64 in zmq. Those with the fewest finished messages go first;
- there are too many: of those that have said nothing the oldest makes room, of those with one key the one that was idle
  longest, and of all others that of the key with the most, so that nobody can keep others out;
- the router asks for it (``end``): a client takes none of its replies, or goes on with what is refused.

zmq then sees the end of the stream and frees what it gathered. Over ipc the kernel counts no bytes: what has to do with
them does not apply there, and the rest does. The socket's file lets in nobody but its own user.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import socket as sockets
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zmq

from transports import addresses
from transports.sockets import (
    FRAMING_BYTES,
    NOBLOCK,
    cut,
    duplicate,
    has_message,
    identity,
    monitor,
    read_event,
    received_bytes,
    resident_bytes,
)

if TYPE_CHECKING:
    from transports.sealing import Session

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
"""Beyond the clients allowed: those that have not said anything yet."""

HANDSHAKE_BYTES = 4096
"""That of a client of ours has some 300 in all."""

_SOURCE = int(zmq.SRCFD)
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_ACCEPT_FAILED


@dataclass(slots=True)
class Peer:
    """A connection. ``kernel_id`` is the kernel's name for it, ``number`` counts them, for logs; ``client`` is zmq's
    name for it once it has sent something, and ``account`` whose it is. ``requests`` of it are in the server,
    ``refused_bytes`` were refused since the last that was not; ``seen`` is when its last message came. ``proven``: it
    has shown to have a key that is allowed, as the router sees by what opens with its ``session``."""

    socket: sockets.socket
    kernel_id: int
    number: int
    address: str
    accepted: float
    client: bytes = b""
    account: bytes = b""
    messages: int = 0
    requests: int = 0
    refused_bytes: int = 0
    seen: float = 0.0
    proven: bool = True
    session: Session | None = None
    settled_messages: int = 0
    settled_bytes: int = 0
    unfinished: int = 0
    resident_then: int | None = None
    held_then: int = 0
    unfinished_then: int = 0
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
        max_clients: int,
        max_account_connections: int,
        max_account_bytes: int,
        max_message_bytes: int,
        max_unfinished_bytes: int,
        keyed: bool,
        hello_timeout_seconds: float,
        queued_messages: int,
        explained_bytes: Callable[[], int],
        failed_handshakes: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.user_bytes = 0
        self.ended = 0
        self._max_clients = max_clients
        self._max_account_connections = max_account_connections
        self._max_unfinished = max_message_bytes + FRAMING_BYTES
        self._max_account_unfinished = max_account_bytes + self._max_unfinished
        self._keyed = keyed
        self._max_all_unfinished = max_unfinished_bytes
        self._queued_messages = queued_messages
        self._hello_seconds = hello_timeout_seconds
        self._explained_bytes = explained_bytes
        self._clock = clock
        self._peers: dict[int, Peer] = {}
        self._clients: dict[bytes, Peer] = {}
        self._numbers = itertools.count(1)
        self._trimming = 0
        self._watched = socket
        self._handed_on: zmq.Socket[bytes] | None = None
        events = _EVENTS
        if failed_handshakes is not None:
            events |= zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            self._handed_on = context.socket(zmq.PAIR)
            self._handed_on.connect(failed_handshakes)
        self._monitor = monitor(context, socket, int(events))
        self.fd = self._monitor.FD
        has_message(self._monitor)  # zmq signals over the descriptor only to who has looked, and found nothing

    @property
    def connections(self) -> int:
        return len(self._peers)

    def update(self) -> list[Peer]:
        """Take notice of connections that came and went; returns those that went."""
        gone: list[Peer] = []
        while has_message(self._monitor):
            parts = self._monitor.recv_multipart(NOBLOCK)
            event, value = read_event(parts)
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
            else:
                peer = self._peers.pop(value, None)
                if peer is not None:
                    self._forget(peer)
                    gone.append(peer)
        return gone

    def _hand_on(self, parts: list[bytes]) -> None:
        if self._handed_on is not None:
            with contextlib.suppress(zmq.Again):  # so many that nobody needs to know of each
                self._handed_on.send_multipart(parts, NOBLOCK)

    def _accepted(self, fd: int) -> None:
        try:
            socket = duplicate(fd)
        except OSError:
            return  # it has gone already, and the event that says so follows
        replaced = self._peers.pop(fd, None)
        if replaced is not None:
            self._forget(replaced)
        kernel_id = identity(socket)
        if any(each.kernel_id == kernel_id for each in self._peers.values()):
            socket.close()  # it has gone, and its number went to our duplicate of that other one
            return
        peer = Peer(socket, kernel_id, next(self._numbers), _address_of(socket), self._clock())
        self._peers[fd] = peer
        peer.proven = not self._keyed
        most = self._max_clients + SPARE_CONNECTIONS
        alive = [each for each in self._peers.values() if not each.ended]
        silent = [each for each in alive if not each.messages]
        # Who is in use keeps its place, and leaves some to newcomers.
        if len(alive) > most and len(silent) > SPARE_CONNECTIONS:
            oldest = min(silent, key=lambda each: each.accepted)
            self._end(oldest, f"there are more than {most} connections (limits.clients)")

    def admit(self, peer: Peer) -> None:
        """The first valid message of ``peer`` has come: where there are too many with it, another one makes room."""
        about = {"event": "client-came", "connection": peer.number, "peer": peer.address}
        log.info("client %d came from %s", peer.number, peer.address, extra=about)
        others = [each for each in self._peers.values() if each.messages and not each.ended and each is not peer]
        same = [each for each in others if each.account == peer.account]
        if len(same) >= self._max_account_connections:
            self._end_idle(same, f"its key has more than {self._max_account_connections} (limits.client_connections)")
        elif len(others) >= self._max_clients:
            counts = Counter(each.account for each in others)
            most = max(counts.values())
            crowd = [each for each in others if counts[each.account] == most]
            # Where each has one, and all are at work, it is the newcomer's request that is refused.
            if most == 1:
                crowd = [each for each in crowd if not each.requests]
            self._end_idle(crowd, f"there are more than {self._max_clients} (limits.clients)")

    def _end_idle(self, peers: list[Peer], reason: str) -> None:
        """End that of ``peers`` that was idle longest; one that is at work only where all are."""
        idlest = min(peers, key=lambda each: (each.requests > 0, each.seen), default=None)
        if idlest is not None:
            self._end(idlest, f"it makes room for another connection: {reason}")

    def _forget(self, peer: Peer) -> None:
        peer.socket.close()
        if self._clients.get(peer.client) is peer:
            del self._clients[peer.client]

    def known(self, client: bytes) -> Peer | None:
        """The connection of ``client``, where it has sent something before."""
        return self._clients.get(client)

    def bind(self, account: bytes, client: bytes, frame: zmq.Frame) -> Peer | None:
        """The connection that ``frame``, the first of the first message of ``client``, came over, and which is of
        ``account`` from now on; None where that can't be told, or not yet. Only right after ``update``: a descriptor's
        number may stand for another connection since."""
        try:
            fd = frame.get(_SOURCE)
        except zmq.ZMQError:
            return None
        peer = self._peers.get(fd)
        if peer is None or (self._keyed and peer.proven):
            return None
        self._clients.pop(peer.client, None)
        peer.client, peer.account, peer.messages = client, account, 0
        self._clients[client] = peer
        return peer

    def sweep(self, *, paused: bool) -> float:
        """Look after all connections; returns the seconds until this is to be done again. Whatever has arrived whole
        was read before, unless reading is ``paused``."""
        now = self._clock()
        suspects: list[Peer] = []
        accounts: defaultdict[bytes, list[Peer]] = defaultdict(list)
        queued = 1 + self._queued_messages if paused else 1
        for peer in list(self._peers.values()):
            if peer.ended:
                continue
            if not peer.messages and now - peer.accepted > self._hello_seconds:
                self._end(peer, f"it said nothing for {self._hello_seconds:g} s (limits.hello_timeout_seconds)")
                continue
            self._count(peer)
            if not peer.proven and peer.unfinished > HANDSHAKE_BYTES:
                self._end(peer, f"it has sent more than {HANDSHAKE_BYTES} bytes, and no key that is allowed")
            elif peer.unfinished > self._max_unfinished * queued:
                self._end(peer, "its message is larger than limits.message_mib allows, and has no end")
            elif peer.unfinished >= SUSPECT_BYTES:
                suspects.append(peer)
                if peer.account:
                    accounts[peer.account].append(peer)
            else:
                peer.resident_then = None
        if self._trimming:
            self._trimming -= 1
            _trim()
        for mine in accounts.values():
            mine.sort(key=lambda peer: peer.unfinished)
            while sum(peer.unfinished for peer in mine) > self._max_account_unfinished * queued:
                suspects.remove(largest := mine.pop())
                self._end(largest, "with other messages of its key, its own is larger than limits.client_mib allows")
        if suspects:
            unfinished = sum(peer.unfinished for peer in suspects)
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
        resident, held = resident_bytes(), self._explained_bytes()
        for peer in suspects:
            if peer.resident_then is None or resident < peer.resident_then:
                peer.resident_then, peer.held_then, peer.unfinished_then = resident, held, unfinished

        def unexplained(peer: Peer) -> int:
            grown = resident - (peer.resident_then or 0)
            # Each by itself: what is no longer held is not free yet, where our user still has it.
            return grown - max(0, held - peer.held_then) - max(0, unfinished - peer.unfinished_then)

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

    def _end(self, peer: Peer, reason: str) -> None:
        peer.ended = True
        self.ended += 1
        cut(peer.socket)
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


def _address_of(socket: sockets.socket) -> str:
    """Where the other side is: ``127.0.0.1:40404``, ``[::1]:40404``, or ``ipc``."""
    if socket.family == sockets.AF_UNIX:
        return "ipc"
    try:
        host, port = socket.getpeername()[:2]
    except OSError:
        return "unknown"
    return addresses.at(host, port)


def _trim() -> None:
    """Give freed memory back to the system, so that what an ended connection took is not counted as taken."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        return  # another C library: it has its own ways

"""One zmq connection to a server: a DEALER socket, and a monitor that tells when the connection is up or lost.

Shared by the lock-step and the overlapping client. zmq reconnects by itself, but a connection that was lost is never
used again here: what was in flight is gone, and the server behind the address may be another one. The client drops
this object and opens a new one with its next request.
"""

from __future__ import annotations

import itertools
import select
import struct
import time
from collections.abc import Sequence
from typing import cast

import zmq

from transports import mechanism
from transports.base import Buffer, ClientOptions
from transports.inflow import Inflow
from transports.security import CURVE_OVERHEAD_BYTES

ZERO_COPY_BYTES = 64 * 1024
"""From here on, lending zmq the buffer is cheaper than copying it (its free callback costs a thread hop)."""

CUT_HANDSHAKES = 3
"""So often the peer closes the connection in the middle of the handshake before it is asked what it expects."""

GREETING_SECONDS = 1.0
"""How long the peer has for its greeting. It blocks, but only where no connection comes about anyway."""

KEEPALIVE_IDLE_SECONDS = 15
KEEPALIVE_INTERVAL_SECONDS = 5
KEEPALIVE_PROBES = 3

# Plain integers: zmq's own constants are enums, whose operators cost more than the call that they are passed to.
EVENTS = int(zmq.EVENTS)
POLLIN = int(zmq.POLLIN)
NOBLOCK = int(zmq.NOBLOCK)
NOBLOCK_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)

_MONITOR_EVENT = struct.Struct("=HI")
_monitor_numbers = itertools.count()


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

    ``parts`` are flat (see ``frames.byte_view``).
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


class Connection:
    """A DEALER socket with its monitor. ``established`` is set by the client at the first valid reply, and it counts
    replies to nothing that is in flight (``strays``, ``stray_bytes``) and the bytes of replies that may still come to
    requests that nobody waits for any more (``owed_bytes``).

    ``denied`` says why the two sides will never come to terms about keys; empty as long as they might.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, options: ClientOptions) -> None:
        self.endpoint = endpoint
        self.established = False
        self.handshaken = False
        self.lost = False
        self.note = ""
        self.denied = ""
        self.inflow = Inflow()
        self.looked_ns = 0
        self.strays = 0
        self.stray_bytes = 0
        self.owed_bytes = 0
        self._curve = options.curve
        self._cut_handshakes = 0
        self.connect_deadline_ns = time.perf_counter_ns() + int(options.connect_timeout_seconds * 1e9)
        self.socket = context.socket(zmq.DEALER)
        self.monitor = context.socket(zmq.PAIR)
        try:
            self._open(options)
        except BaseException:
            self.close()
            raise
        self._poll = select.poll()
        self._poll.register(self.socket.FD, select.POLLIN)
        self._poll.register(self.monitor.FD, select.POLLIN)

    def _open(self, options: ClientOptions) -> None:
        socket = self.socket
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)  # the window bounds what is queued to send
        socket.setsockopt(zmq.RCVHWM, 2 * options.window_requests)
        socket.setsockopt(zmq.MAXMSGSIZE, options.max_message_bytes + (CURVE_OVERHEAD_BYTES if options.curve else 0))
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        socket.setsockopt(zmq.IPV6, int("[" in self.endpoint))
        keep_alive(socket)
        if options.curve is not None:
            options.curve.apply(socket)
        address = f"inproc://teegpu-monitor-{next(_monitor_numbers)}"
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        events |= zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        socket.monitor(address, events | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
        self.monitor.setsockopt(zmq.LINGER, 0)
        self.monitor.connect(address)
        socket.connect(self.endpoint)

    def readable(self) -> bool:
        return has_message(self.socket)

    def sleep(self, seconds: float) -> None:
        """Sleep until something happens on the socket or its monitor; may wake for nothing."""
        self._poll.poll(max(0.0, seconds) * 1000 + 1)

    def check_monitor(self) -> None:
        """Read what the monitor has: afterwards ``handshaken``, ``lost``, ``note`` and ``denied`` are up to date."""
        try:
            while has_message(self.monitor):
                self.on_monitor(self.monitor.recv_multipart(NOBLOCK))
            if self._cut_handshakes >= CUT_HANDSHAKES and not self.denied:
                self._ask_mechanism()
        except BaseException:
            self.lost = True  # a signal handler raised, and an event may have gone with it
            raise

    def on_monitor(self, parts: Sequence[bytes]) -> None:
        event, cause = _MONITOR_EVENT.unpack(parts[0])
        if event == zmq.EVENT_CONNECTED:
            self.inflow.connected(cause)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.handshaken = True
            self._cut_handshakes = 0
        elif event == zmq.EVENT_DISCONNECTED:
            # Before the handshake it only says that this attempt failed; zmq tries again until the connect time-out.
            self.lost = self.lost or self.handshaken
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._cut_handshakes += 1
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            if cause == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
                self._other_mechanism()
            else:
                self.note = "; what listens there is not a teegpu server"
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and self._curve is not None:
            self.denied = (
                f"the server at {self.endpoint} does not know this client's key (link.client_key, fingerprint "
                f"{self._curve.own.public}): have its operator put the public key into the folder of 'serve --auth'"
            )

    def _other_mechanism(self) -> None:
        if self._curve is None:
            self.denied = (
                f"the server at {self.endpoint} takes clients with keys only: set link.server_key and link.client_key "
                "('teegpu keys new NAME' makes a pair)"
            )
        else:
            self.denied = (
                f"the server at {self.endpoint} has no key, and link.server_key says that it must prove to have "
                f"{self._curve.server}: start it with 'serve --key', or find out who answers there"
            )

    def _ask_mechanism(self) -> None:
        """The peer ends every handshake without a word: because the keys differ, or for another reason?"""
        self._cut_handshakes = 0
        left = (self.connect_deadline_ns - time.perf_counter_ns()) / 1e9
        found = mechanism.ask(self.endpoint, min(left, GREETING_SECONDS)) if left > 0 else ""
        if found and (found == "CURVE") != (self._curve is not None):
            self._other_mechanism()
        elif found and self._curve is not None:
            self.denied = (
                f"the server at {self.endpoint} has another key than {self._curve.server} (link.server_key): compare "
                "it with 'teegpu keys show' on the server; if that has not changed, somebody else answers there"
            )

    def close(self) -> None:
        if not self.socket.closed:
            self.socket.monitor(None, 0)
        self.inflow.close()
        self.monitor.close(0)
        self.socket.close(0)

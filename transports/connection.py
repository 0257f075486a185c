"""One zmq connection to a server: a DEALER socket, and a monitor that tells when the connection is up or lost.

Shared by the lock-step and the overlapping client. Where there are keys, each attempt to connect is an exchange of its
own (see ``sealing``), and nothing of a request leaves before both sides have proved theirs. zmq is not to reconnect by
itself: nobody would look after what arrives then. An attempt that failed before the handshake is made again
(``reopen``). A connection that was lost after it is never used again: what was in flight is gone, and the server behind
the address may be another one. The client drops this object and opens a new one with its next request.
"""

from __future__ import annotations

import contextlib
import select
import socket as sockets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import zmq

from transports import addresses
from transports.base import Buffer, ClientOptions
from transports.errors import SealError
from transports.inflow import Inflow
from transports.sockets import NOBLOCK, has_message, keep_alive, monitor, read_event, send_parts

if TYPE_CHECKING:
    from transports.noise import Initiator
    from transports.sealing import Session

CUT_HANDSHAKES = 3
"""So often the peer closes the connection in the middle of the handshake before it is asked what it expects."""

FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.05, 0.5
"""After an attempt to connect that failed; each pause is twice the one before."""

GREETING_SECONDS = 1.0
"""How long the peer has for its greeting. It blocks, but only where no connection comes about anyway."""


class Connection:
    """A DEALER socket with its monitor. Before it is ``handshaken``, nothing can be sent where there are ``keys``; what
    is sent elsewhere waits in zmq. ``established`` is set by the client at the first valid reply, and it counts
    replies to nothing that is in flight (``strays``, ``stray_bytes``). ``threads`` are those of zmq.

    ``retry_at_ns`` is when to try again, where an attempt has failed; 0 where none has. ``denied`` says why the two
    sides will never come to terms about keys; empty as long as they might.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, options: ClientOptions, threads: Sequence[int]
    ) -> None:
        self.endpoint = endpoint
        self.established = False
        self.handshaken = False
        self.lost = False
        self.note = ""
        self.denied = ""
        self.inflow = Inflow(threads)
        self.retry_at_ns = 0
        self.strays = 0
        self.stray_bytes = 0
        self._context = context
        self._options = options
        self.keys = options.keys
        self._exchange: Initiator | None = None
        self._session: Session | None = None
        self._other_mechanisms = 0
        self._retry_seconds = FIRST_RETRY_SECONDS
        self._cut_handshakes = 0
        self.begin_waiting()
        self._open()

    def begin_waiting(self) -> None:
        """From now on the server has the connect time-out. Keys are exchanged only while somebody waits for them, so
        the time before the first request does not count there."""
        self.connect_deadline_ns = time.perf_counter_ns() + int(self._options.connect_timeout_seconds * 1e9)

    def reopen(self) -> None:
        """Try again, with new sockets: what was given to the old ones is to be sent again."""
        self.close()
        self.retry_at_ns = 0
        self._open()
        self.check_monitor()  # read empty, its descriptor tells of what follows

    def _open(self) -> None:
        options = self._options
        self.handshaken = False
        self.inflow.proven = options.keys is None
        socket = self.socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 0)  # the window bounds what is queued to send
        socket.setsockopt(zmq.RCVHWM, 2 * options.window_requests)
        socket.setsockopt(zmq.MAXMSGSIZE, options.max_message_bytes)
        socket.setsockopt(zmq.RECONNECT_IVL, _NEVER_MS)
        socket.setsockopt(zmq.IPV6, int("[" in self.endpoint))
        keep_alive(socket)
        if options.keys is not None:
            from transports import noise, sealing

            self._session = None
            self._exchange = noise.Initiator(options.keys.own.secret, options.keys.server.raw, sealing.PROTOCOL)
            socket.setsockopt(zmq.PLAIN_USERNAME, sealing.PROTOCOL)
            socket.setsockopt(zmq.PLAIN_PASSWORD, self._exchange.write())
            socket.setsockopt(zmq.MAXMSGSIZE, sealing.most_frame_bytes(options.max_message_bytes, options.max_frames))
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        events |= zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        events |= zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_CLOSED
        self.monitor = monitor(self._context, socket, int(events))
        try:
            socket.connect(self.endpoint)
        except BaseException:
            self.close()
            raise
        self._poll = select.poll()
        self._poll.register(socket.FD, select.POLLIN)
        self._poll.register(self.monitor.FD, select.POLLIN)
        if options.keys is not None:
            with contextlib.suppress(zmq.Again):  # the attempt has failed already: the monitor tells
                socket.send(b"", NOBLOCK)

    def send(self, parts: Sequence[Buffer]) -> None:
        """Hand a whole message to zmq. Raises ``zmq.ZMQError``, and ``SealError`` where nothing can be sealed: with
        keys nothing leaves in the clear, whatever has become of the connection."""
        if self.keys is not None:
            if self._session is None:
                raise SealError("its keys are not agreed on")
            parts = self._session.seal(parts)
        send_parts(self.socket, parts)

    def opened(self, frames: list[memoryview]) -> list[memoryview] | None:
        """The parts of the message that came as ``frames``; None for one of the exchange of keys, after which the
        connection may be ``handshaken``, or ``denied``. Raises ``SealError`` for what the server did not send so."""
        if self.keys is None:
            return frames
        if self.retry_at_ns:
            return None  # this attempt has failed, whatever had come before that was read
        if self._session is None:
            self._take_answer(frames)
            return None
        parts = self._session.open(frames)
        if not self.handshaken:
            self.handshaken = self.inflow.proven = True
            self._cut_handshakes = 0
            return None
        return parts

    def _take_answer(self, frames: list[memoryview]) -> None:
        from transports import noise, sealing

        exchange, self._exchange = self._exchange, None
        if exchange is None or sum(map(len, frames)) != noise.SECOND_BYTES:
            self._other_key()
            return
        try:
            _, sending, receiving = exchange.read(b"".join(frames))
        except SealError:
            self._other_key()
            return
        self._session = sealing.Session(sending, receiving)
        with contextlib.suppress(zmq.Again):  # it is lost again
            self.send([])

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
            if (self._cut_handshakes >= CUT_HANDSHAKES or self._other_mechanisms) and not self.denied:
                self._ask_mechanism()
        except BaseException:
            self.lost = True  # a signal handler raised, and an event may have gone with it
            raise

    def on_monitor(self, parts: Sequence[bytes]) -> None:
        event, cause = read_event(parts)
        if event == zmq.EVENT_CONNECTED:
            self.inflow.connected(cause)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._cut_handshakes = 0
            self.handshaken = self.handshaken or self.keys is None
        elif event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
            # Before the handshake it only says that this attempt failed; there are more until the connect time-out.
            self.lost = self.lost or self.handshaken
            if not self.lost and not self.retry_at_ns:
                self.retry_at_ns = time.perf_counter_ns() + int(self._retry_seconds * 1e9)
                self._retry_seconds = min(2 * self._retry_seconds, LONGEST_RETRY_SECONDS)
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._cut_handshakes += 1
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            if cause == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
                self._other_mechanisms += 1
            else:
                self.note = "what listens there is not a teegpu server"
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH and self.keys is not None:
            if cause == _KEY_REFUSED:
                self.denied = (
                    f"the server at {self.endpoint} does not know this client's key (link.client_key, fingerprint "
                    f"{self.keys.own.public}): have its operator put the public key into the folder of 'serve --auth'"
                )
            else:
                self._other_key()

    def _other_key(self) -> None:
        if self.keys is not None:
            self.denied = (
                f"the server at {self.endpoint} has another key than {self.keys.server} (link.server_key), or is of "
                "another release: compare it with 'teegpu keys show' on the server; if that has not changed, somebody "
                "else answers there"
            )

    def _other_mechanism(self, found: str) -> None:
        if self.keys is None:
            self.denied = (
                f"the server at {self.endpoint} takes clients with keys only: set link.server_key and link.client_key "
                "('teegpu keys new NAME' makes a pair)"
            )
        elif found == OLD_MECHANISM:
            self.denied = (
                f"the server at {self.endpoint} encrypts as older releases did (CURVE): install the same release on "
                "both sides"
            )
        else:
            self.denied = (
                f"the server at {self.endpoint} has no key, and link.server_key says that it must prove to have "
                f"{self.keys.server}: start it with 'serve --key', or find out who answers there"
            )

    def _ask_mechanism(self) -> None:
        """The peer ends every handshake without a word, or speaks of another kind of it."""
        self._cut_handshakes = 0
        mismatched, self._other_mechanisms = self._other_mechanisms, 0
        left = (self.connect_deadline_ns - time.perf_counter_ns()) / 1e9
        found = ask_mechanism(self.endpoint, min(left, GREETING_SECONDS)) if left > 0 else ""
        ours = NO_KEYS if self.keys is None else KEYS
        if mismatched or (found and found != ours):
            self._other_mechanism(found)

    def close(self) -> None:
        if not self.socket.closed:
            self.socket.monitor(None, 0)
        self.inflow.close()
        self.monitor.close(0)
        self.socket.close(0)


_NEVER_MS = 2**30
"""zmq makes no connection by itself: who answers next is to be greeted first. -1 says the same, but with it zmq throws
away what has come, and was not read yet, when the server closes the connection."""

GREETING_BYTES = 64
OUR_GREETING = b"\xff" + bytes(8) + b"\x7f" + bytes([3, 0])
"""The greeting's beginning, signature and version: the peer then shows all of its own. Had it ours whole, it might
close the connection for what it reads there before it has answered."""

_MECHANISM = slice(12, 32)

NO_KEYS, KEYS, OLD_MECHANISM = "NULL", "PLAIN", "CURVE"
"""What the greeting of a server names."""

_KEY_REFUSED = 400
"""What ``admission`` answers where a client's key is not on the list; whatever else it is, the keys don't fit."""


def ask_mechanism(endpoint: str, timeout_seconds: float) -> str:
    """What a zmq peer says of itself before any key is exchanged: ``KEYS``, ``NO_KEYS``, …; empty where nobody
    answers like a zmq peer within the time.

    A server that has read of another mechanism just closes the connection, as a server that ends does, or a relay to
    nobody. The greeting tells them apart: it is ZMTP's first 64 bytes, of which 20 name the mechanism."""
    deadline = time.monotonic() + timeout_seconds
    with contextlib.suppress(OSError), connect_plainly(endpoint, timeout_seconds) as connection:
        connection.sendall(OUR_GREETING)
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


def connect_plainly(endpoint: str, timeout_seconds: float) -> sockets.socket:
    """A connection without zmq, which keeps ``timeout_seconds``. Raises ``OSError``."""
    address = addresses.parse(endpoint)
    if address.scheme == "ipc":
        connection = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        try:
            connection.settimeout(timeout_seconds)
            connection.connect(address.path)
        except BaseException:
            connection.close()
            raise
        return connection
    return sockets.create_connection((address.host.strip("[]"), address.port), timeout=timeout_seconds)

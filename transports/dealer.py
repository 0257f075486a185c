"""What the zmq clients have in common: requests in flight matched by id, and the blocking way to wait for them.

A blocking wait first spins on the socket for ``spin_seconds``, because a sleep and its wake-up cost as much as a small
request's whole round trip; then it sleeps in poll until a message, a lost connection or the next deadline. Where the
reply before took longer than that, it sleeps at once: there is no gain in sight, and others may need the core.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, NoReturn

import zmq

from transports import addresses, envelope
from transports.base import Buffer, Client, ClientOptions, Compression, Message, Reply
from transports.connection import Connection
from transports.errors import (
    AuthenticationError,
    BadAddressError,
    ConnectError,
    ConnectionLostError,
    FrameError,
    LimitError,
    ReplyTimeoutError,
    SealError,
    TransportError,
)
from transports.exchange import Exchange
from transports.inflow import STRAY_BYTES
from transports.reach import why_silent
from transports.sockets import FRAMING_BYTES, receive_parts

if TYPE_CHECKING:
    from transports.compression import Bandwidth, Compressor

ErrorMaker = Callable[[], TransportError]

LOOK_SECONDS = 1.0
"""How long it may take to find out why nobody answers, once nobody has."""

MAX_STRAYS = 1024
"""Replies to nothing that is in flight which one connection may bring, beyond those of requests that were given up. Our
own servers send none. All of them have ``inflow.STRAY_BYTES`` at most."""

MAX_BANDWIDTH = 2**63
"""What the envelope has room for. The bandwidth is measured with what the server says of its own time."""


class DealerClient(Client):
    """Base of the zmq clients. ``dropped_replies`` counts late, duplicate and unknown replies."""

    def __init__(self, endpoint: str, options: ClientOptions) -> None:
        address = addresses.parse(endpoint)
        if address.scheme == "inprocess":
            raise BadAddressError(f"transport '{self.name}' reaches tcp:// and ipc:// addresses, not '{endpoint}'")
        self.endpoint = address.text
        self.options = options
        self.dropped_replies = 0
        self._spin_ns = int(options.spin_seconds * 1e9)
        self._quick = True
        self._flags = envelope.ACCEPTS_ZSTD if self.compresses else 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._threads: Sequence[int] = ()
        self._connection: Connection | None = None
        self._in_flight: dict[int, Exchange] = {}
        self._in_flight_bytes = 0
        self._next_id = 1
        self._closed = False
        self._bandwidth: Bandwidth | None = None
        self._compressor: Compressor | None = None
        if self.compresses:
            from transports.compression import Bandwidth, Compressor

            self._bandwidth = link = Bandwidth()
            self._compressor = Compressor(options.compression_level, lambda: link.bytes_per_second)
        try:
            with _beginning:
                before = _threads()
                # zmq starts its threads with a context's first socket.
                self._context.socket(zmq.PAIR).close(0)
                self._threads = tuple(_threads() - before)
            self._connection = self._connect()
        except BaseException as error:
            self._context.destroy(linger=0)
            if isinstance(error, zmq.ZMQError):
                raise BadAddressError(f"can't connect to {endpoint}: {error.strerror}") from error
            raise

    def _connect(self) -> Connection:
        return Connection(self._context, self.endpoint, self.options, self._threads)

    # ---- the blocking form

    def begin(self, message: Message, *, timeout_seconds: float | None = None) -> Exchange:
        if self._in_flight:
            self._wait_for_room(message.nbytes)
        return self._submit(message, timeout_seconds)

    def look(self, exchange: Exchange) -> None:
        """Take what has come meanwhile. Never waits."""
        if exchange.done:
            return
        try:
            self._look(exchange)
        except BaseException:
            self._fail(self._lost("was given up"))  # as in wait_for
            raise

    def _look(self, exchange: Exchange) -> None:
        """What ``_step`` does, without waiting."""
        connection = self._connection
        while not exchange.done and connection is self._connection and connection is not None and connection.readable():
            self._receive(connection)
        if not exchange.done and connection is self._connection and connection is not None:
            self._check_connection(connection)
            self._expire(time.perf_counter_ns())

    @property
    def pending_bytes(self) -> int:
        return self._in_flight_bytes

    def wait_for(self, exchange: Exchange) -> None:
        """Return when ``exchange`` is done."""
        try:
            while not exchange.done:
                self._step(exchange)
        except BaseException:
            # A signal handler raised, perhaps between two frames of a message: the rest of it would be taken for the
            # next one. A new connection is the way back to a known state.
            self._fail(self._lost("was given up"))
            raise

    def _wait_for_room(self, nbytes: int) -> None:
        """Wait until the window has room. Each request that fills it comes to its end, by a reply or a deadline."""
        while self._in_flight and not self._has_room(nbytes):
            self.wait_for(next(iter(self._in_flight.values())))

    def _has_room(self, nbytes: int) -> bool:
        """A message larger than the whole window may go when nothing else is in flight."""
        if not self._in_flight:
            return True
        if len(self._in_flight) >= self.options.window_requests:
            return False
        return self._in_flight_bytes + nbytes <= self.options.window_bytes

    def _step(self, exchange: Exchange) -> None:
        """Wait for something to happen in this connection; returns at the latest when ``exchange`` is done."""
        connection = self._connection
        if connection is None:
            raise RuntimeError("a request is in flight without a connection")
        socket = connection.socket
        spin_until = time.perf_counter_ns() + (self._spin_ns if self._quick else 0)
        while True:
            if connection.readable():
                self._receive(connection)
                if exchange.done:
                    return
            elif time.perf_counter_ns() >= spin_until:
                break
        self._check_connection(connection)
        now = time.perf_counter_ns()
        self._expire(now)
        if exchange.done or connection is not self._connection or connection.socket is not socket:
            return  # a new socket is to be read empty first: it tells of nothing before
        connection.sleep((self._next_deadline_ns(connection) - now) / 1e9)

    def _next_deadline_ns(self, connection: Connection) -> int:
        """When the next request in flight, or all attempts to connect, will have taken too long, or the next attempt is
        due."""
        deadline = min(entry.deadline_ns for entry in self._in_flight.values())
        if connection.handshaken:
            return deadline
        return min(deadline, connection.connect_deadline_ns, connection.retry_at_ns or deadline)

    # ---- sending

    def _submit(self, message: Message, timeout_seconds: float | None) -> Exchange:
        """Hand a request to the socket. Raises what can be known before anything is sent."""
        if self._closed:
            raise ConnectionLostError(f"the client of {self.endpoint} is closed")
        parts, exchange = self._prepare(message)
        connection = self._ready_connection()
        exchange.explicit = timeout_seconds is not None
        if timeout_seconds is None:
            first = not connection.established
            options = self.options
            timeout_seconds = options.connect_timeout_seconds if first else options.reply_timeout_seconds
        exchange.timeout_seconds = timeout_seconds
        exchange.sent_ns = time.perf_counter_ns()
        exchange.deadline_ns = exchange.sent_ns + int(timeout_seconds * 1e9)
        if connection.keys is not None and not (connection.handshaken or self._in_flight):
            connection.begin_waiting()
        self._in_flight[exchange.request_id] = exchange
        self._in_flight_bytes += exchange.raw_bytes
        connection.inflow.awaited_bytes += exchange.max_reply_bytes + FRAMING_BYTES
        if not connection.handshaken:
            exchange.parts = parts
            if connection.retry_at_ns or connection.keys is not None:
                return exchange  # it is sent with the next attempt, or when both sides have proved their keys
        try:
            connection.send(parts)
        except BaseException as error:
            if isinstance(error, zmq.ZMQError):
                # zmq gives up where the two sides do not agree on keys, and then takes nothing to send.
                connection.check_monitor()
                self._raise_denied(connection)
                if connection.retry_at_ns and not connection.handshaken:
                    return exchange
            # A message that was sent in part can't be taken back: this connection is of no use any more.
            self._fail(self._lost("could not be sent to"))
            if isinstance(error, zmq.ZMQError):
                raise ConnectionLostError(f"can't send to {self.endpoint}: {error.strerror}") from error
            if isinstance(error, SealError):
                raise ConnectionLostError(f"can't send to {self.endpoint} over this connection: {error}") from error
            raise
        return exchange

    def _raise_denied(self, connection: Connection) -> None:
        if connection.denied:
            self._fail(lambda: AuthenticationError(connection.denied))
            raise AuthenticationError(connection.denied)

    def _prepare(self, message: Message) -> tuple[list[Buffer], Exchange]:
        options = self.options
        frames, lengths, total = envelope.flatten(
            message,
            "request",
            max_frames=options.max_frames,
            max_message_bytes=options.max_message_bytes,
            sealed=options.keys is not None,
        )
        codecs: Sequence[int] = ()
        itemsizes: Sequence[int] = ()
        up = Compression()
        bandwidth = 0
        if self._compressor is not None and self._bandwidth is not None:
            bandwidth = min(int(self._bandwidth.bytes_per_second or 0), MAX_BANDWIDTH)
            frames, codecs, itemsizes, up = self._compressor.compress(frames, message.kinds)
        request_id = self._next_id
        self._next_id += 1
        head = envelope.pack(request_id, lengths, codecs, itemsizes, flags=self._flags, measured=bandwidth)
        parts = [head, *frames]
        bytes_up = len(head) + (sum(map(len, frames)) if codecs else total)
        most = message.max_reply_bytes or options.max_message_bytes
        return parts, Exchange(self, request_id, total, bytes_up, up, min(most, options.max_message_bytes))

    def _ready_connection(self) -> Connection:
        """The connection, opened anew if need be. Raises ``ConnectionLostError`` if it was lost since the last use.

        That error is not hidden by reconnecting at once: the server that now answers there may be another one, so the
        caller has to greet it first.
        """
        connection = self._connection
        if connection is None:
            connection = self._connection = self._connect()
            return connection
        connection.check_monitor()
        self._raise_denied(connection)
        if connection.lost:
            error = self._excess(connection) or ConnectionLostError(
                f"the connection to {self.endpoint} was lost since the last request"
            )
            self._fail(lambda: error)
            raise error
        return connection

    # ---- receiving

    def _receive(self, connection: Connection) -> None:
        """Read one message that is known to be there."""
        try:
            parts = receive_parts(connection.socket)
        except zmq.ZMQError as error:
            self._fail(self._lost(f"failed ({error.strerror})"))
            return
        self._accept(parts, connection)

    def _accept(self, parts: list[memoryview], connection: Connection) -> None:
        """Match a reply with its request."""
        if connection.inflow.excess:  # a part of the stream is missing: what is whole may be so by chance
            self._check_connection(connection)
            return
        connection.inflow.settle()
        try:
            opened = connection.opened(parts)
        except SealError as error:
            text = str(error)
            self._fail(self._lost("was given up, as a message that came over it can't be opened", text))
            return
        if opened is None:
            self._go_on(connection)
            return
        parts = opened
        received_ns = time.perf_counter_ns()
        bytes_down = sum(map(len, parts))
        request_id = envelope.peek_request_id(parts[0]) if parts else None
        if request_id is None:
            text = f"{self.endpoint} sent something that is not a reply; is it a teegpu server of the same release?"
            self._fail(lambda: FrameError(text))
            return
        exchange = self._in_flight.get(request_id)
        if exchange is None:
            self._drop_stray(connection, bytes_down)
            return
        self._quick = received_ns - exchange.sent_ns <= self._spin_ns
        if not connection.established:
            self._establish(connection)
        if exchange.abandoned:
            self.dropped_replies += 1
            self._remove(exchange)
            return
        try:
            exchange.reply = self._open(exchange, parts, received_ns, bytes_down)
        except TransportError as error:
            exchange.error = error
        self._finish(exchange)

    def _go_on(self, connection: Connection) -> None:
        """After a message of the exchange of keys: send what has waited for its end."""
        if connection.denied:
            self._check_connection(connection)
        elif connection.handshaken:
            with contextlib.suppress(zmq.Again):  # it is lost again: the monitor tells
                for exchange in self._in_flight.values():
                    connection.send(exchange.parts)
                    exchange.parts = ()

    def _drop_stray(self, connection: Connection, nbytes: int) -> None:
        """A reply to a request that was given up, or to none of ours. Without a bound, they could keep us for ever."""
        self.dropped_replies += 1
        connection.strays += 1
        connection.stray_bytes += nbytes
        if connection.strays > MAX_STRAYS or connection.stray_bytes > STRAY_BYTES + connection.inflow.owed_bytes:
            text = f"{self.endpoint} goes on answering what nobody asked: the server is broken, or means harm"
            self._fail(lambda: FrameError(text))

    def _excess(self, connection: Connection) -> TransportError | None:
        """Why ``connection`` was ended from this side."""
        inflow = connection.inflow
        if not inflow.excess:
            return None
        if inflow.hostile:
            return FrameError(f"{self.endpoint} {inflow.excess}: the server is broken, or means harm")
        return ConnectionLostError(f"{self.endpoint} {inflow.excess}, and was disconnected")

    def _establish(self, connection: Connection) -> None:
        """The first exchange is over: what else is in flight has no longer the connect time-out to keep to."""
        connection.established = connection.handshaken = True
        connection.check_monitor()  # a quick reply comes before anybody has read that the connection is there
        for exchange in self._in_flight.values():
            exchange.parts = ()
            if not exchange.explicit:
                exchange.timeout_seconds = self.options.reply_timeout_seconds
                exchange.deadline_ns = exchange.sent_ns + int(exchange.timeout_seconds * 1e9)

    def _open(self, exchange: Exchange, parts: list[memoryview], received_ns: int, bytes_down: int) -> Reply:
        frames = parts[1:]
        sizes = [len(frame) for frame in frames]
        options = self.options
        head = envelope.unpack(
            parts[0], sizes, max_frames=options.max_frames, max_message_bytes=options.max_message_bytes
        )
        if head.refusal:
            self._raise_refusal(head.refusal, envelope.read_reason(frames[0]))
        if head.raw_bytes > exchange.max_reply_bytes:
            raise FrameError(
                f"{self.endpoint} sent a reply of {head.raw_bytes} bytes, where {exchange.max_reply_bytes} at most can "
                "be right"
            )
        down = Compression()
        if self._bandwidth is not None:
            seconds = (received_ns - exchange.sent_ns - head.measured) / 1e9
            self._bandwidth.observe(exchange.bytes_up + bytes_down, seconds)
        if head.compressed:
            if self._compressor is None:
                raise FrameError(f"{self.endpoint} sent compressed frames, which were not asked for")
            frames, down = self._compressor.decompress(frames, head.codecs, head.itemsizes, head.raw_lengths)
        server_ns = min(head.measured, received_ns - exchange.sent_ns)
        return Reply(frames, exchange.sent_ns, received_ns, exchange.bytes_up, bytes_down, exchange.up, down, server_ns)

    def _raise_refusal(self, refusal: int, reason: str) -> NoReturn:
        if refusal == envelope.REFUSED_LIMIT:
            raise LimitError(f"{self.endpoint} refused the request: {reason}")
        if refusal == envelope.REFUSED_FRAMING:
            raise FrameError(f"{self.endpoint} could not read the request: {reason}")
        if refusal == envelope.REFUSED_KEY:
            raise AuthenticationError(f"{self.endpoint} refused the request: {reason}")
        raise ConnectionLostError(f"{self.endpoint} is shutting down: {reason}")

    # ---- ends of an exchange

    def _remove(self, exchange: Exchange) -> None:
        if self._in_flight.pop(exchange.request_id, None) is not None:
            self._in_flight_bytes -= exchange.raw_bytes
            if self._connection is not None:
                self._connection.inflow.awaited_bytes -= exchange.max_reply_bytes + FRAMING_BYTES

    def _finish(self, exchange: Exchange) -> None:
        """``exchange`` has its reply or error. An overlapping client also tells who awaits it."""
        self._remove(exchange)

    def _check_connection(self, connection: Connection) -> None:
        connection.check_monitor()
        excess = self._excess(connection)
        if excess is not None:
            self._fail(lambda: excess)
        elif connection.lost:
            # What had arrived before is still good.
            while connection is self._connection and connection.readable():
                self._receive(connection)
            self._fail(self._lost("was lost"))
        elif connection.denied:
            self._fail(lambda: AuthenticationError(connection.denied))
        elif not connection.handshaken and time.perf_counter_ns() >= connection.connect_deadline_ns:
            self._fail(self._unreachable(self.options.connect_timeout_seconds))
        elif connection.retry_at_ns and time.perf_counter_ns() >= connection.retry_at_ns:
            self._reopen(connection)

    def _reopen(self, connection: Connection) -> None:
        try:
            connection.reopen()
        except BaseException as error:  # its sockets are closed: nobody may go on with them
            text = f"no other connection to {self.endpoint} can be made: {error}"
            self._fail(lambda: ConnectionLostError(text))
            if isinstance(error, zmq.ZMQError):
                return
            raise
        if connection.keys is not None:
            return
        with contextlib.suppress(zmq.Again):  # this attempt has failed already: the monitor tells, and another follows
            for exchange in self._in_flight.values():
                connection.send(exchange.parts)

    def _expire(self, now_ns: int) -> None:
        for exchange in [entry for entry in self._in_flight.values() if entry.deadline_ns <= now_ns]:
            if not exchange.done:  # one that timed out may have failed them all
                self._time_out(exchange)

    def _time_out(self, exchange: Exchange) -> None:
        connection = self._connection
        if connection is not None and not connection.established and not (connection.handshaken and exchange.explicit):
            # Drop the connection too, so that a server which comes up later is not handed stale requests.
            self._fail(self._unreachable(exchange.timeout_seconds))
            return
        seconds = f"{exchange.timeout_seconds:g} s"
        setting = "the limit given for this request" if exchange.explicit else "link.reply_timeout_seconds"
        if connection is not None:
            connection.inflow.owed_bytes += exchange.max_reply_bytes
        exchange.error = ReplyTimeoutError(f"no reply from {self.endpoint} within {seconds} ({setting})")
        self._finish(exchange)

    def _unreachable(self, seconds: float) -> ErrorMaker:
        note = (self._connection.note if self._connection else "") or why_silent(self.endpoint, LOOK_SECONDS)
        return lambda: ConnectError(
            f"no server answers at {self.endpoint} within {seconds:g} s{note and ': '}{note} "
            f"(start one with 'teegpu serve --bind {self.endpoint}', or set run.endpoints)"
        )

    def _lost(self, what: str, why: str = "") -> ErrorMaker:
        count = len(self._in_flight)
        why = why or "the server ended, the network failed, or a message exceeded the server's limits.message_mib"
        return lambda: ConnectionLostError(
            f"the connection to {self.endpoint} {what} with {count} request{'s' * (count != 1)} in flight: {why}"
        )

    def _fail(self, make_error: ErrorMaker) -> None:
        """Drop the connection and end all that is in flight, each with an error of its own."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._disconnect(connection)
        for exchange in list(self._in_flight.values()):
            exchange.error = make_error()
            self._finish(exchange)

    def _disconnect(self, connection: Connection) -> None:
        connection.close()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._fail(lambda: ConnectionLostError(f"the client of {self.endpoint} was closed with a request in flight"))
        self._context.destroy(linger=0)


class LockStepClient(DealerClient):
    """Transport "zmq": one request after the other."""

    name: ClassVar[str] = "zmq"


class CompressedLockStepClient(LockStepClient):
    name: ClassVar[str] = "zmq+zstd"
    compresses: ClassVar[bool] = True


_beginning = threading.Lock()
"""Clients that begin at the same time would take each other's threads for their own."""


def _threads() -> set[int]:
    return set(map(int, os.listdir("/proc/self/task")))

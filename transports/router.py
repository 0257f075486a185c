"""The ROUTER server: any number of clients on one address, served in turn.

Two threads share the socket under a lock, which is the fence that zmq asks for when a socket changes threads. While
the caller waits in ``next`` it reads the socket itself: a small request then costs no hop between threads. While the
caller computes, the I/O thread reads, so that arrival times are true and requests are counted against their client's
bounds (it is left asleep while one client's small requests are answered at once: nothing arrives meanwhile). Both
sleep on zmq's descriptor, which is edge-triggered; therefore whoever gives the lock back has read the socket empty, or
has noted (``_paused``) that it has not. Sending only hands buffers to zmq's own thread, so it needs no thread of ours.

Bounds: a client is a key, however many connections it has; where there are no keys, a connection. A request over its
client's bounds (number, bytes, clients) is refused with a reason, which the client sees as ``LimitError``. When what
waits to be computed exceeds what one client can have there, reading pauses for all (zmq can't do so for one), and its
queues and TCP hold the senders back. A reply to a client that is gone is dropped and counted; a connection that reads
none of its replies is ended, as is one that goes on with what is refused, and those that ``transports.guard`` finds.
"""

from __future__ import annotations

import logging
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import zmq

from transports import envelope
from transports.base import Buffer, Compression, Incoming, Message, Server, ServerLoad, ServerOptions
from transports.errors import FrameError, LimitError, SealError, TransportError
from transports.fairqueue import FairQueue
from transports.guard import SPARE_CONNECTIONS, SWEEP_SECONDS, Guard, Peer
from transports.sockets import (
    NOBLOCK,
    NOBLOCK_MORE,
    ZERO_COPY_BYTES,
    Wakeup,
    bind,
    has_message,
    keep_alive,
    reserve_descriptors,
    unforeseeable_names,
)

if TYPE_CHECKING:
    from transports.admission import Gatekeeper
    from transports.compression import Compressor

log = logging.getLogger(__name__)

RECEIVE_QUEUE_MESSAGES = 8
"""Per client, in zmq, before they are counted: enough to keep a link busy, few enough to bound memory."""

WAITING_CLIENTS_WORTH = 2
"""Reading pauses when this many clients' full byte allowances wait to be computed, or what one client of the largest
message and another one can have there: no client can make it pause by itself."""

HELD_CLIENTS_WORTH = 4
"""When this many clients' full byte allowances are held, replies that are not taken included, the client with the
largest part of it loses its connection."""

IDLE_SWEEP_SECONDS = 1.0

REFUSALS_QUEUED = 512
"""Room for refusals in a client's send queue, beyond one reply for each of its requests. They come in bursts, and zmq
learns only of half a queue's messages at a time that they were taken: with little room a client that had asked for
twice as much as it may lost its connection now and then."""

REFUSAL_BYTES = 64 * 1024
"""What a request that is refused counts beside its own bytes. A connection whose requests are refused in a row, until
they count as much as a client may hold, is ended: reading them is work, and it is done while others wait."""

QUICK_ANSWER_NS = 3_000_000
SHARE_REQUESTS = 32
"""See ``RouterServer._should_share``."""


class _Request:
    """A request as it came; its ``Incoming.token`` too."""

    __slots__ = ("account", "answered", "arrived_ns", "client", "head", "nbytes", "parts", "peer", "taken_ns")

    def __init__(
        self, account: bytes, client: bytes, parts: list[memoryview], head: envelope.Envelope, nbytes: int
    ) -> None:
        self.account = account
        self.client = client
        self.parts = parts
        self.head = head
        self.arrived_ns = time.perf_counter_ns()
        self.nbytes = nbytes
        self.peer: Peer | None = None
        self.taken_ns = self.arrived_ns
        self.answered = False


class RouterServer(Server):
    """See the module. ``refused``, ``malformed`` and ``undelivered`` count what did not go well."""

    def __init__(self, address: str, options: ServerOptions) -> None:
        reserve_descriptors(options.max_clients + SPARE_CONNECTIONS)
        self.options = options
        self.refused = 0
        self.malformed = 0
        self.undelivered = 0
        self._compressor: Compressor | None = None
        self._gatekeeper: Gatekeeper | None = None
        self._client_bandwidth: float | None = None
        self._largest_compressed = 0
        self._largest_sealed = 0
        self._queue: FairQueue[_Request] = FairQueue(
            max_clients=options.max_clients,
            max_client_requests=options.max_client_requests,
            max_client_bytes=options.max_client_bytes,
        )
        self._max_waiting_bytes = max(
            WAITING_CLIENTS_WORTH * options.max_client_bytes, options.max_client_bytes + options.max_message_bytes
        )
        self._lock = threading.Lock()
        self._paused = False
        self._mid_message = False
        self._mid_send = False
        self._caller_waits = False
        self._io_parked = False
        self._woken = False
        self._closed = False
        self._draining = False
        self._idle_sweep_at = 0.0
        self._slept = False
        self._share_left = 0
        self._last_client = b""
        self._handed_out_ns = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        unforeseeable_names()
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            self._gatekeeper = self._configure()
            self._guard = self._make_guard()
            self._binding = bind(self._socket, address)
        except BaseException:
            if self._gatekeeper is not None:
                self._gatekeeper.close()
            self._context.destroy(linger=0)
            raise
        self.address = self._binding.address
        self._caller_signal = Wakeup()
        self._io_signal = Wakeup()
        self._caller_poll = select.poll()
        for fd in (self._socket.FD, self._caller_signal.fd):
            self._caller_poll.register(fd, select.POLLIN)
        self._thread = threading.Thread(target=self._io_loop, name="teegpu-transport", daemon=True)
        self._thread.start()

    def _configure(self) -> Gatekeeper | None:
        """Set the socket's options; where it is to have keys, also who guards it."""
        socket, options = self._socket, self.options
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.SNDHWM, options.max_client_requests + REFUSALS_QUEUED)
        socket.setsockopt(zmq.RCVHWM, RECEIVE_QUEUE_MESSAGES)
        socket.setsockopt(zmq.MAXMSGSIZE, options.max_message_bytes)
        socket.setsockopt(zmq.HANDSHAKE_IVL, max(1, int(options.hello_timeout_seconds * 1000)))
        keep_alive(socket)
        if options.keys is None:
            return None
        from transports.admission import Gatekeeper
        from transports.sealing import most_frame_bytes

        socket.setsockopt(zmq.MAXMSGSIZE, most_frame_bytes(options.max_message_bytes, options.max_frames))
        return Gatekeeper(self._context, socket, options.keys, options.hello_timeout_seconds)

    def _make_guard(self) -> Guard:
        options = self.options
        return Guard(
            self._context,
            self._socket,
            max_clients=options.max_clients,
            max_account_connections=options.max_client_connections,
            max_account_bytes=options.max_client_bytes,
            max_message_bytes=options.max_message_bytes,
            max_unfinished_bytes=self._max_waiting_bytes + options.max_message_bytes,
            keyed=options.keys is not None,
            hello_timeout_seconds=options.hello_timeout_seconds,
            queued_messages=RECEIVE_QUEUE_MESSAGES,
            explained_bytes=lambda: self._queue.held_bytes,
            failed_handshakes=None if self._gatekeeper is None else self._gatekeeper.handshakes,
        )

    @property
    def load(self) -> ServerLoad:
        with self._lock:
            queue = self._queue
            return ServerLoad(
                clients=queue.clients,
                connections=self._guard.connections,
                refused=self.refused + self.malformed,
                ended=self._guard.ended,
                in_flight=queue.in_flight,
                waiting_requests=len(queue),
                waiting_bytes=queue.waiting_bytes,
            )

    def drain(self) -> None:
        self._draining = True

    # ---- the caller's side

    def next(self, timeout_seconds: float | None = None) -> Incoming | None:
        deadline = None if timeout_seconds is None else time.perf_counter() + timeout_seconds
        while True:
            computed_ns = time.perf_counter_ns() - self._handed_out_ns
            request = self._take(deadline)
            if request is None:
                return None
            if self._should_share(request, computed_ns) and self._io_parked:
                self._io_signal.set()
            self._handed_out_ns = request.taken_ns = time.perf_counter_ns()
            try:
                frames, down = self._decompress(request)
            except FrameError as error:
                self.malformed += 1
                refusal = envelope.pack_refusal(request.head.request_id, envelope.REFUSED_FRAMING, str(error))
                self._answer(request, refusal)
                continue
            return Incoming(frames, request.client, request, request.arrived_ns, down)

    def _take(self, deadline: float | None) -> _Request | None:
        """The next request; None at ``deadline`` or when woken."""
        self._caller_waits = True
        self._slept = False
        try:
            while True:
                if self._woken:
                    self._woken = False
                    return None
                request = self._read_and_pop()
                if request is not None:
                    return request
                seconds = None if deadline is None else deadline - time.perf_counter()
                if seconds is not None and seconds <= 0:
                    return None
                if not self._io_parked:
                    self._io_signal.set()
                self._slept = True
                events = self._caller_poll.poll(None if seconds is None else seconds * 1000 + 1)
                if any(fd == self._caller_signal.fd for fd, _ in events):
                    self._caller_signal.clear()
        finally:
            self._caller_waits = False

    def _should_share(self, request: _Request, computed_ns: int) -> bool:
        """Whether the I/O thread should read the socket while the caller computes ``request``.

        Waking it costs some 20 µs, a sixth of a small request's round trip. That is wasted while one client sends
        small requests in lock-step and gets quick answers: nothing arrives meanwhile. Whatever is not so ends that
        regime for a while: a large request, a long computation, a request that was there before the caller asked.
        """
        alone = self._slept and not len(self._queue) and request.client == self._last_client
        if not alone or request.nbytes >= ZERO_COPY_BYTES or computed_ns > QUICK_ANSWER_NS:
            self._share_left = SHARE_REQUESTS
        else:
            self._share_left = max(0, self._share_left - 1)
        self._last_client = request.client
        return self._share_left > 0

    def _read_and_pop(self) -> _Request | None:
        with self._lock:
            self._read()
            request = self._queue.pop()
            if self._paused and request is not None:
                self._read()
            return request

    def _decompress(self, request: _Request) -> tuple[list[memoryview], Compression]:
        head, frames = request.head, request.parts
        if not head.compressed:
            return frames, Compression()
        self._largest_compressed = max(self._largest_compressed, head.raw_bytes)
        return self._need_compressor().decompress(frames, head.codecs, head.itemsizes, head.raw_lengths)

    def _need_compressor(self) -> Compressor:
        """Made when the first client asks for it: most servers never load the codec."""
        if self._compressor is None:
            from transports.compression import Compressor

            self._compressor = Compressor(self.options.compression_level, lambda: self._client_bandwidth)
        return self._compressor

    def reply(self, incoming: Incoming, message: Message) -> Compression:
        """See ``Server.reply``. The frames belong to the transport until they are sent: don't write into them again.

        Raises ``LimitError`` when ``message`` exceeds our own limits; the request can then be answered otherwise.
        """
        request = incoming.token
        if not isinstance(request, _Request) or request.answered:
            raise ValueError("reply() takes an Incoming from next(), once")
        options = self.options
        frames, lengths, _ = envelope.flatten(
            message,
            "reply",
            max_frames=options.max_frames,
            max_message_bytes=options.max_message_bytes,
            sealed=options.keys is not None,
        )
        codecs: list[int] = []
        itemsizes: list[int] = []
        up = Compression()
        if request.head.accepts_zstd:
            self._client_bandwidth = request.head.measured or None
            self._largest_compressed = max(self._largest_compressed, sum(lengths))
            frames, codecs, itemsizes, up = self._need_compressor().compress(frames, message.kinds)
        if self._gatekeeper is not None:
            self._largest_sealed = max(self._largest_sealed, sum(map(len, frames)))
        measured = time.perf_counter_ns() - request.arrived_ns
        head = envelope.pack(request.head.request_id, lengths, codecs, itemsizes, measured=measured)
        self._answer(request, [head, *frames])
        return up

    def _answer(self, request: _Request, parts: list[Buffer] | list[bytes]) -> None:
        request.answered = True
        seconds = (time.perf_counter_ns() - request.taken_ns) / 1e9
        with self._lock:
            self._queue.done(request.account, request.nbytes, seconds)
            if request.peer is not None:
                request.peer.requests -= 1
            if not self._closed:
                # With keys, to the connection that asked: its name may be another one's by now.
                if self._gatekeeper is None or self._guard.known(request.client) is request.peer:
                    self._send(request.account, request.client, parts)
                else:
                    self.undelivered += 1
                self._read()

    def wake(self) -> None:
        self._woken = True
        self._caller_signal.set()

    def close(self, drain_seconds: float = 5.0) -> None:
        with self._lock:
            if self._closed:
                return
            self._read()
            self._closed = True
            while (request := self._queue.pop()) is not None:
                reason = envelope.pack_refusal(request.head.request_id, envelope.REFUSED_CLOSING, "try another server")
                self._send(request.account, request.client, reason)
        self._io_signal.set()
        self._thread.join()
        self._guard.close()
        self._binding.release()
        if self._gatekeeper is not None:
            self._gatekeeper.close()
        # zmq itself sends what it has been given, for as long as the socket lingers; term waits for that, and a signal
        # would end its wait, so other threads get those that come.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._socket.close(linger=int(drain_seconds * 1000))
            self._context.term()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._caller_signal.close()
        self._io_signal.close()

    # ---- the I/O thread

    def _io_loop(self) -> None:
        poll = select.poll()
        poll.register(self._io_signal.fd, select.POLLIN)
        router_fd = self._socket.FD
        poll.register(router_fd, select.POLLIN)
        guard_fd = self._guard.fd
        poll.register(guard_fd, select.POLLIN)
        sweep_at, sweep_seconds = 0.0, SWEEP_SECONDS
        while not self._closed:
            events = poll.poll(sweep_seconds * 1000 if self._guard.connections else None)
            if any(fd == self._io_signal.fd for fd, _ in events):
                self._io_signal.clear()
            now = time.monotonic()
            sweeps = now >= sweep_at
            watches = sweeps or any(fd == guard_fd for fd, _ in events)
            self._io_parked = parked = self._caller_waits
            poll.modify(router_fd, 0 if parked else select.POLLIN)
            if parked and not watches:
                continue
            with self._lock:
                if watches:
                    self._update_connections()
                self._read()
                if sweeps:
                    sweep_seconds = self._sweep(now)
                    sweep_at = now + sweep_seconds
                waiting = len(self._queue)
            if waiting and self._caller_waits:
                self._caller_signal.set()

    # ---- with the lock held

    def _read(self) -> None:
        """Take what has arrived off the socket, until it is empty or too much waits."""
        if self._closed:
            return
        self._paused = False
        while has_message(self._socket):
            if self._queue.waiting_bytes > self._max_waiting_bytes:
                self._paused = True
                return
            if self._mid_message:
                self._skip_rest()
                continue
            self._mid_message = True
            first, parts = self._receive()
            self._mid_message = False
            client, frames = bytes(parts[0]), parts[1:]
            if self._gatekeeper is None:
                self._accept(self._peer_of(client, first), client, client, frames)
            else:
                self._accept_sealed(self._gatekeeper, client, first, frames)

    def _receive(self) -> tuple[zmq.Frame, list[memoryview]]:
        """A whole message; of one that has far too many frames the rest is dropped as it is read."""
        socket, most = self._socket, self.options.max_frames + 3
        first = frame = socket.recv(NOBLOCK, copy=False)
        parts = [first.buffer]
        while frame.more:
            frame = socket.recv(NOBLOCK, copy=False)
            if len(parts) < most:
                parts.append(frame.buffer)
        return first, parts

    def _update_connections(self) -> None:
        if self._closed:
            return
        for peer in self._guard.update():
            if peer.messages:
                self._queue.leave(peer.account, peer.client)
                about = {"event": "client-left", "connection": peer.number, "peer": peer.address}
                log.info(
                    "client %d at %s left after %d messages",
                    *(peer.number, peer.address, peer.messages),
                    extra=about | {"messages": peer.messages},
                )

    def _sweep(self, now: float) -> float:
        """Look after connections, and forget who is silent; returns the seconds until the next time."""
        if self._closed:
            return SWEEP_SECONDS
        # A compressed message is there in both forms for a moment, and so is a reply that is sealed.
        self._guard.user_bytes = self.user_bytes() + 2 * self._largest_compressed + self._largest_sealed
        seconds = self._guard.sweep(paused=self._paused)
        queue = self._queue
        if queue.held_bytes > HELD_CLIENTS_WORTH * self.options.max_client_bytes:
            client = queue.largest()
            if client is not None:
                self._guard.end(client, "it holds more of the server's memory than others, and does not take replies")
        if now >= self._idle_sweep_at:
            self._idle_sweep_at = now + IDLE_SWEEP_SECONDS
            queue.forget_silent(now - self.options.idle_timeout_seconds)
        return seconds

    def _peer_of(self, client: bytes, first: zmq.Frame) -> Peer | None:
        peer = self._guard.known(client)
        if peer is None:
            self._update_connections()
            peer = self._guard.bind(client, client, first)
        return peer

    def _accept_sealed(self, gatekeeper: Gatekeeper, client: bytes, first: zmq.Frame, frames: list[memoryview]) -> None:
        """Open one message, or go on with the exchange of keys (see ``sealing``)."""
        peer = self._guard.known(client)
        if peer is None:
            self._answer_key(gatekeeper, client, first, frames)
            return
        if peer.ended or peer.session is None:
            return  # what had come before it was ended
        try:
            parts = peer.session.open(frames)
        except SealError as error:
            self.malformed += 1
            self._guard.end(client, f"a message of it can't be opened: {error}")
            return
        account = peer.account
        if not peer.proven:
            peer.proven = True
            self._send(account, client, [])
        elif gatekeeper.admits(account.decode()):
            self._accept(peer, account, client, parts)
        else:
            self._turn_away(peer, parts)

    def _answer_key(self, gatekeeper: Gatekeeper, client: bytes, first: zmq.Frame, frames: list[memoryview]) -> None:
        """The first message of a connection, or one of a connection that has gone, which nobody waits for."""
        if [len(frame) for frame in frames] != [0]:
            return
        pledge = gatekeeper.claim(str(first.get("User-Id")))
        if pledge is None:
            return
        self._update_connections()
        peer = self._guard.bind(pledge.client.encode(), client, first)
        if peer is None:
            return
        self._send(peer.account, client, [pledge.answer], sealed=False)
        peer.session = pledge.session

    def _skip_rest(self) -> None:
        """A signal handler raised between two frames of a message: the frames that are left belong to nobody."""
        while self._socket.getsockopt(zmq.RCVMORE):
            self._socket.recv(NOBLOCK, copy=False)
        self._mid_message = False

    def _turn_away(self, peer: Peer, parts: list[memoryview]) -> None:
        """The key of this client was taken off the allow-list while it was connected."""
        self.refused += 1
        request_id = envelope.peek_request_id(parts[0]) if parts else None
        if request_id is not None:
            reason = "the server does not allow this client's key any more"
            self._send(peer.account, peer.client, envelope.pack_refusal(request_id, envelope.REFUSED_KEY, reason))
        self._count_refused(peer, sum(map(len, parts)))

    def _count_refused(self, peer: Peer, nbytes: int) -> None:
        peer.refused_bytes += nbytes + REFUSAL_BYTES
        if peer.refused_bytes > self.options.max_client_bytes:
            self._guard.end(peer.client, "it goes on with requests that are refused")

    def _accept(self, peer: Peer | None, account: bytes, client: bytes, parts: list[memoryview]) -> None:
        """Check one message and queue it, or refuse it."""
        if not parts:
            self.malformed += 1
            return
        frames = parts[1:]
        options = self.options
        try:
            head = envelope.unpack(
                parts[0],
                [len(frame) for frame in frames],
                max_frames=options.max_frames,
                max_message_bytes=options.max_message_bytes,
            )
        except TransportError as error:
            self.malformed += 1
            request_id = envelope.peek_request_id(parts[0])
            if request_id is not None:
                limit = isinstance(error, LimitError)
                refusal = envelope.REFUSED_LIMIT if limit else envelope.REFUSED_FRAMING
                self._send(account, client, envelope.pack_refusal(request_id, refusal, str(error)))
            return
        now = time.monotonic()
        if peer is not None:
            if not peer.messages:
                self._guard.admit(peer)
            peer.messages += 1
            peer.seen = now
        request = _Request(account, client, frames, head, head.raw_bytes)
        reason, kind = None, envelope.REFUSED_LIMIT
        if self._draining:
            reason, kind = "the server is being stopped: try another one, or later", envelope.REFUSED_CLOSING
        else:
            reason = self._queue.push(account, client, request, request.nbytes, now)
        if reason is not None:
            self.refused += 1
            self._send(account, client, envelope.pack_refusal(head.request_id, kind, reason))
            about = {"event": "refused", "connection": 0 if peer is None else peer.number, "reason": reason}
            log.warning("refused a request: %s", reason, extra=about)
        if peer is None:
            return
        if reason is None:
            request.peer = peer
            peer.requests += 1
            peer.refused_bytes = 0
        else:
            self._count_refused(peer, request.nbytes)

    def _send(self, account: bytes, client: bytes, parts: Sequence[Buffer], *, sealed: bool = True) -> None:
        """Hand a reply to zmq. Large frames are lent to it and stay on the client's account until they are sent. Where
        there are keys, all is sealed but the server's part of their exchange."""
        socket = self._socket
        if self._gatekeeper is not None:
            peer = self._guard.known(client)
            if peer is None or peer.ended or peer.account != account or (sealed and peer.session is None):
                self.undelivered += 1
                return
            if sealed and peer.session is not None:
                try:
                    parts = peer.session.seal(parts)
                except SealError as error:
                    self._guard.end(client, f"nothing can be sealed for it: {error}")
                    return
        if self._mid_send:
            self._end_cut_reply()
        self._mid_send = True
        try:
            socket.send(client, NOBLOCK_MORE)
        except zmq.ZMQError as error:
            # EHOSTUNREACH: the client is gone. EAGAIN: its queue is full, it reads none of its replies.
            self._mid_send = False
            self.undelivered += 1
            log.debug("reply not delivered: %s", error.strerror)
            if error.errno == zmq.EAGAIN:
                # More replies than it may have requests are queued for it.
                self._guard.end(client, "it takes none of its replies")
            return
        last = len(parts) - 1
        for index, part in enumerate(parts):
            flags = NOBLOCK if index == last else NOBLOCK_MORE
            if len(part) < ZERO_COPY_BYTES:
                socket.send(part, flags)
            else:
                tracker = socket.send(part, flags, copy=False, track=True)
                self._queue.owe(account, client, len(part), _taken(tracker))
        self._mid_send = False

    def _end_cut_reply(self) -> None:
        """A signal handler raised in the middle of a reply: end it, so that its client can tell that it is broken."""
        try:
            self._socket.send(b"", NOBLOCK)
        except zmq.ZMQError:
            return  # it had been complete: an empty frame is nobody's address


def _taken(tracker: zmq.MessageTracker | None) -> Callable[[], bool]:
    return lambda: tracker is None or tracker.done

"""Transport "inprocess": client and server in one process, frames handed over as they are.

It is the baseline that says what a protocol costs without a network, and it lets a test do without sockets. Limits,
time-outs and ends are those of the other transports. Server and client run in different threads.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from typing import ClassVar

from transports import addresses
from transports.base import (
    Answered,
    Buffer,
    Client,
    ClientOptions,
    Compression,
    Incoming,
    Message,
    Reply,
    Server,
    ServerLoad,
    ServerOptions,
)
from transports.envelope import flatten
from transports.errors import BadAddressError, ConnectError, ConnectionLostError, LimitError, ReplyTimeoutError
from transports.fairqueue import FairQueue

_servers: dict[str, InprocessServer] = {}
_servers_lock = threading.Lock()
_client_numbers = itertools.count(1)


class _Request:
    """``replies`` is the asking client's queue; it gets (this request, frames), or (this request, None) at the end."""

    __slots__ = ("answered", "arrived_ns", "client", "frames", "nbytes", "replies", "taken_ns")

    def __init__(self, client: bytes, frames: list[Buffer], nbytes: int, replies: _Replies) -> None:
        self.client = client
        self.frames = frames
        self.nbytes = nbytes
        self.arrived_ns = self.taken_ns = time.perf_counter_ns()
        self.replies = replies
        self.answered = False


_Replies = queue.SimpleQueue[tuple[_Request, list[memoryview] | None, int]]


class InprocessServer(Server):
    def __init__(self, address: str, options: ServerOptions) -> None:
        self.address = address
        self.options = options
        self._name = addresses.parse(address, listening=True).path
        self._queue: FairQueue[_Request] = FairQueue(
            max_clients=options.max_clients,
            max_client_requests=options.max_client_requests,
            max_client_bytes=options.max_client_bytes,
        )
        self._lock = threading.Lock()
        # A SimpleQueue may be put to from a signal handler that interrupts its own get; a Condition may not.
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._unanswered: set[_Request] = set()
        self._woken = False
        self._draining = False
        self._refused = 0
        self._closed = False
        with _servers_lock:
            if self._name in _servers:
                raise BadAddressError(f"can't listen on {address}: another server of this process has that name")
            _servers[self._name] = self

    @property
    def load(self) -> ServerLoad:
        with self._lock:
            queue = self._queue
            return ServerLoad(
                clients=queue.clients,
                refused=self._refused,
                in_flight=queue.in_flight,
                waiting_requests=len(queue),
                waiting_bytes=queue.waiting_bytes,
            )

    def drain(self) -> None:
        self._draining = True

    def next(self, timeout_seconds: float | None = None) -> Incoming | None:
        deadline = None if timeout_seconds is None else time.perf_counter() + timeout_seconds
        while True:
            if self._woken:
                self._woken = False
                return None
            with self._lock:
                request = self._queue.pop()
            if request is not None:
                request.taken_ns = time.perf_counter_ns()
                frames = [memoryview(frame) for frame in request.frames]
                return Incoming(frames, request.client, request, request.arrived_ns)
            try:
                self._bell.get(timeout=None if deadline is None else max(0.0, deadline - time.perf_counter()))
            except queue.Empty:
                return None

    def reply(self, incoming: Incoming, message: Message) -> Compression:
        request = incoming.token
        if not isinstance(request, _Request) or request.answered:
            raise ValueError("reply() takes an Incoming from next(), once")
        options = self.options
        frames, _, nbytes = flatten(
            message, "reply", max_frames=options.max_frames, max_message_bytes=options.max_message_bytes
        )
        request.answered = True
        with self._lock:
            if self._closed:
                return Compression()
            self._queue.done(request.client, request.nbytes, (time.perf_counter_ns() - request.taken_ns) / 1e9)
            self._unanswered.discard(request)
        request.replies.put((request, [memoryview(frame) for frame in frames], nbytes))
        return Compression()

    def wake(self) -> None:
        self._woken = True
        self._bell.put(None)

    def close(self, drain_seconds: float = 5.0) -> None:  # noqa: ARG002
        """See ``Server.close``; there is nothing to drain, a reply is with its client when ``reply`` returns."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            unanswered, self._unanswered = self._unanswered, set()
        with _servers_lock:
            del _servers[self._name]
        for request in unanswered:
            request.replies.put((request, None, 0))

    def submit(self, request: _Request) -> None:
        """Queue a client's request. Raises ``LimitError`` or ``ConnectionLostError``."""
        options = self.options
        if len(request.frames) > options.max_frames or request.nbytes > options.max_message_bytes:
            raise LimitError(
                f"{self.address} refused the request: {len(request.frames)} frames and {request.nbytes} bytes, "
                f"at most {options.max_frames} and {options.max_message_bytes} are accepted"
            )
        with self._lock:
            if self._closed:
                raise ConnectionLostError(f"the server at {self.address} has ended")
            if self._draining:
                raise ConnectionLostError(f"the server at {self.address} is being stopped")
            reason = self._queue.push(request.client, request.client, request, request.nbytes, time.monotonic())
            if reason is None:
                self._unanswered.add(request)
            else:
                self._refused += 1
        if reason is not None:
            raise LimitError(f"{self.address} refused the request: {reason}")
        self._bell.put(None)


class InprocessClient(Client):
    name: ClassVar[str] = "inprocess"

    def __init__(self, endpoint: str, options: ClientOptions) -> None:
        address = addresses.parse(endpoint)
        if address.scheme != "inprocess":
            raise BadAddressError(f"transport 'inprocess' reaches inprocess:// addresses, not '{endpoint}'")
        self.endpoint = endpoint
        self.options = options
        self.dropped_replies = 0
        self._name = address.path
        self._identity = next(_client_numbers).to_bytes(8, "little")
        self._replies: _Replies = queue.SimpleQueue()
        self._server: InprocessServer | None = None
        self._closed = False

    def begin(self, message: Message, *, timeout_seconds: float | None = None) -> Answered:
        if self._closed:
            raise ConnectionLostError(f"the client of {self.endpoint} is closed")
        options = self.options
        frames, _, nbytes = flatten(
            message, "request", max_frames=options.max_frames, max_message_bytes=options.max_message_bytes
        )
        server = self._find_server()
        explicit = timeout_seconds is not None
        seconds = options.reply_timeout_seconds if timeout_seconds is None else timeout_seconds
        sent_ns = time.perf_counter_ns()
        request = _Request(self._identity, frames, nbytes, self._replies)
        try:
            server.submit(request)
        except ConnectionLostError:
            self._server = None
            raise
        deadline = time.perf_counter() + seconds
        while True:
            try:
                answered, reply, bytes_down = self._replies.get(timeout=max(0.0, deadline - time.perf_counter()))
            except queue.Empty:
                setting = "the limit given for this request" if explicit else "link.reply_timeout_seconds"
                raise ReplyTimeoutError(f"no reply from {self.endpoint} within {seconds:g} s ({setting})") from None
            if answered is not request:
                self.dropped_replies += 1
            elif reply is None:
                self._server = None
                raise ConnectionLostError(f"the server at {self.endpoint} ended with a request in flight")
            else:
                return Answered(self._receive(reply, sent_ns, nbytes, bytes_down))

    def _receive(self, frames: list[memoryview], sent_ns: int, bytes_up: int, bytes_down: int) -> Reply:
        options = self.options
        if len(frames) > options.max_frames or bytes_down > options.max_message_bytes:
            raise LimitError(
                f"{self.endpoint} sent {len(frames)} frames and {bytes_down} bytes, "
                f"at most {options.max_frames} and {options.max_message_bytes} are accepted"
            )
        return Reply(frames, sent_ns, time.perf_counter_ns(), bytes_up, bytes_down)

    def _find_server(self) -> InprocessServer:
        if self._server is None:
            with _servers_lock:
                self._server = _servers.get(self._name)
        if self._server is None:
            raise ConnectError(f"no server of this process listens at {self.endpoint}")
        return self._server

    def close(self) -> None:
        self._closed = True
        self._server = None

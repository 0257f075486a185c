"""What a transport is: frames in, frames out, over one connection to one server.

A transport knows nothing of tensors, models or programs. A message is a list of byte buffers; the transport adds one
envelope frame of its own in front (request id, and per frame the codec and the true length), so that replies are
matched by id and compressed frames describe themselves.

Nobody constructs a client or a server: ``transports.connect`` and ``transports.listen`` do (see ``registry``).
"""

from __future__ import annotations

import abc
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from transports.security import ClientKeys, ServerKeys

Buffer = bytes | bytearray | memoryview

COMPRESSED_FROM_BYTES = 64 * 1024
"""Smaller frames are never compressed: on a link where that could pay they take little time anyway."""


@dataclass(frozen=True, slots=True)
class FrameKind:
    """What the sender says of a frame, so that a compression policy can tell like from unlike.

    ``label`` groups frames that compress alike (``"hidden/fp16"``); ``itemsize`` is the width in bytes of one value,
    which is the stride of the byte-shuffle (1: no shuffle). ``random``: its bytes are as good as random, as those of an
    encrypted message are, so that no codec can make it smaller.
    """

    label: str
    itemsize: int = 1
    random: bool = False


@dataclass(slots=True)
class Message:
    """Frames to send. ``kinds`` is empty or as long as ``frames``. ``max_reply_bytes``: more bytes than that can't be
    the answer, whatever the limits allow; 0: the sender can't tell."""

    frames: Sequence[Buffer]
    kinds: Sequence[FrameKind] = ()
    max_reply_bytes: int = 0

    @property
    def nbytes(self) -> int:
        return sum(memoryview(frame).nbytes for frame in self.frames)


@dataclass(slots=True)
class Compression:
    """What compression did to one message. Bytes are counted before and after, seconds on the thread that did it."""

    tried_bytes: int = 0
    raw_bytes: int = 0
    compressed_bytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Reply:
    """The answer to one request, and what the link carried for it.

    ``sent_ns`` and ``received_ns`` are readings of ``time.perf_counter_ns``: when the request was handed to the socket
    and when its reply had arrived whole. ``bytes_up`` and ``bytes_down`` are what crossed the link, envelope and
    compression included. ``up`` and ``down`` say what compression did on this side: compressing and decompressing.
    ``server_ns`` is from the request's arrival to the hand-over of its reply, compression included, as the server says;
    never more than has passed here, and 0 where it does not say.
    """

    frames: list[memoryview]
    sent_ns: int
    received_ns: int
    bytes_up: int
    bytes_down: int
    up: Compression = field(default_factory=Compression)
    down: Compression = field(default_factory=Compression)
    server_ns: int = 0


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Settings of a client.

    ``connect_timeout_seconds`` bounds the first exchange with a server, ``reply_timeout_seconds`` every later one (per
    request; its clock starts when the request is handed to the socket). ``spin_seconds`` is how long a blocking receive
    polls before it sleeps. ``window_requests`` and ``window_bytes`` bound what an overlapping client has in flight.
    ``keys`` are its own and the server's; None: nothing is encrypted, and the server may be anybody.
    """

    connect_timeout_seconds: float = 10.0
    reply_timeout_seconds: float = 120.0
    spin_seconds: float = 0.001
    window_requests: int = 32
    window_bytes: int = 256 * 2**20
    max_message_bytes: int = 2 * 2**30
    max_frames: int = 64
    compression_level: int = 1
    keys: ClientKeys | None = None


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Settings of a server. The limits per client bound what one peer can make the server hold: where there are keys,
    over all connections of a key.

    Of more than ``max_client_connections`` of a key, or than ``max_clients`` connections in use, the one that was idle
    longest makes room. A connection over which no whole message came within ``hello_timeout_seconds`` is ended; what is
    remembered of a client that has been silent for ``idle_timeout_seconds`` is forgotten. ``keys`` are its own and
    those of its clients; None: nothing is encrypted, and whoever reaches it may use it.
    """

    max_message_bytes: int = 2 * 2**30
    max_frames: int = 64
    max_client_requests: int = 64
    max_client_bytes: int = 2**30
    max_client_connections: int = 16
    max_clients: int = 256
    hello_timeout_seconds: float = 30.0
    idle_timeout_seconds: float = 3600.0
    compression_level: int = 1
    keys: ServerKeys | None = None


class Sent(Awaitable[Reply]):
    """A request on its way: look whether its reply has come (``poll``), wait for it (``wait``), or await it. Each gives
    the same reply, or raises what ``Client.request`` would, as often as it is asked.

    ``sent_ns`` is the reading of ``time.perf_counter_ns`` from which on it was on its way, as in ``Reply``: compressing
    ends there, and the round trip begins.
    """

    __slots__ = ()
    sent_ns: int

    @abc.abstractmethod
    def poll(self) -> Reply | None:
        """The reply once that is there, None before. Never waits."""

    @abc.abstractmethod
    def wait(self) -> Reply:
        """The reply. Meanwhile the thread does nothing else."""

    def __await__(self) -> Generator[Any, None, Reply]:
        """The reply. Where nothing overlaps, this waits without suspending, so that a coroutine over it needs no event
        loop."""
        yield from ()
        return self.wait()


class Answered(Sent):
    """A request whose reply is there already."""

    def __init__(self, reply: Reply) -> None:
        self.sent_ns = reply.sent_ns
        self._reply = reply

    def poll(self) -> Reply:
        return self._reply

    def wait(self) -> Reply:
        return self._reply


class Changed(Sent):
    """``sent``, whose reply is what ``change`` makes of it: for clients around other clients."""

    def __init__(self, sent: Sent, change: Callable[[Reply], Reply]) -> None:
        self.sent_ns = sent.sent_ns
        self._sent = sent
        self._change = change

    def poll(self) -> Reply | None:
        reply = self._sent.poll()
        return None if reply is None else self._change(reply)

    def wait(self) -> Reply:
        return self._change(self._sent.wait())

    def __await__(self) -> Generator[Any, None, Reply]:
        return self._change((yield from self._sent.__await__()))


class Client(abc.ABC):
    """One connection to one server. There is one verb, ``begin``; the others are made of it.

    A client that overlaps has many requests in flight, and suspends where it is awaited: that takes a running asyncio
    loop. One that works in lock step never suspends. Blocking and awaited calls may be used on one client, one after
    the other, never at once.

    ``compresses``: large frames go through zstd where that is quicker.
    """

    name: ClassVar[str]
    overlaps: ClassVar[bool] = False
    compresses: ClassVar[bool] = False
    endpoint: str

    @abc.abstractmethod
    def begin(self, message: Message, *, timeout_seconds: float | None = None) -> Sent:
        """Send ``message`` and go on. Waits for room in the window first, where there is none. A client that can't go
        on meanwhile has the reply, or raises, when ``begin`` returns.

        ``timeout_seconds`` replaces the client's ``reply_timeout_seconds`` for this request.

        Raises ``ReplyTimeoutError``, ``ConnectError``, ``ConnectionLostError``, ``FrameError``, ``LimitError`` (see
        ``transports.errors``), as do the methods of what it returns.
        """

    async def begin_async(self, message: Message, *, timeout_seconds: float | None = None) -> Sent:
        """``begin``, for whoever awaits the reply on an event loop: room in the window is awaited too.

        Cancelling it, or what it returns, forgets the request; a late reply to it is dropped."""
        return self.begin(message, timeout_seconds=timeout_seconds)

    def request(self, message: Message, *, timeout_seconds: float | None = None) -> Reply:
        """Send ``message`` and wait for its reply."""
        return self.begin(message, timeout_seconds=timeout_seconds).wait()

    async def request_async(self, message: Message, *, timeout_seconds: float | None = None) -> Reply:
        """Send ``message`` and await its reply."""
        return await (await self.begin_async(message, timeout_seconds=timeout_seconds))

    @property
    def pending_bytes(self) -> int:
        """Bytes of the requests that have no reply yet, those that stand in line for the window included."""
        return 0

    @abc.abstractmethod
    def close(self) -> None:
        """Release the connection; what is in flight is dropped. May be called twice."""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(slots=True)
class Incoming:
    """A request as the server receives it. ``client`` and ``token`` are the transport's own; hand them back as they
    are.

    ``arrived_ns`` is a reading of ``time.perf_counter_ns`` on the server; ``down`` what decompression cost.
    """

    frames: list[memoryview]
    client: bytes
    token: object
    arrived_ns: int
    down: Compression = field(default_factory=Compression)


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """How much a server has to do. ``connections`` is 0 where they can't be counted; ``refused`` requests and
    ``ended`` connections count since the start; ``in_flight`` are those that wait or are being computed."""

    clients: int = 0
    connections: int = 0
    refused: int = 0
    ended: int = 0
    in_flight: int = 0
    waiting_requests: int = 0
    waiting_bytes: int = 0


class Server(abc.ABC):
    """Accepts any number of clients on one address and hands their requests out in an order that is fair between them.

    Receiving and sending go on in the transport's own thread while the caller computes, so that link and computation
    overlap. ``next`` and ``reply`` are for one caller thread.
    """

    address: str
    """Where it really listens: port 0 and wildcards are resolved."""

    user_bytes: Callable[[], int] = staticmethod(lambda: 0)
    """Gives what the caller may take from memory for a request, beyond the request and its reply; called from another
    thread. Growth of the process that neither this nor any message explains is held against peers whose messages do not
    end."""

    @property
    @abc.abstractmethod
    def load(self) -> ServerLoad: ...

    @abc.abstractmethod
    def drain(self) -> None:
        """From now on refuse new requests as closing; those that are here are still handed out by ``next``. Safe from a
        signal handler and from other threads."""

    @abc.abstractmethod
    def next(self, timeout_seconds: float | None = None) -> Incoming | None:
        """The next request, or None when ``timeout_seconds`` have passed, or ``wake`` was called, without one."""

    @abc.abstractmethod
    def reply(self, incoming: Incoming, message: Message) -> Compression:
        """Send ``message`` as the answer to ``incoming``; returns what compression did to it."""

    @abc.abstractmethod
    def wake(self) -> None:
        """Make a blocked ``next`` return None. Safe from a signal handler and from other threads."""

    @abc.abstractmethod
    def close(self, drain_seconds: float = 5.0) -> None:
        """Stop receiving, send the replies that are queued for at most ``drain_seconds``, release the address."""

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""What a transport is: frames in, frames out, over one connection to one server.

A transport knows nothing of tensors, models or programs. A message is a list of byte buffers; the transport adds one
envelope frame of its own in front (request id, and per frame the codec and the true length), so that replies are
matched by id and compressed frames describe themselves.

Nobody constructs a client or a server: ``transports.connect`` and ``transports.listen`` do (see ``registry``).
"""

from __future__ import annotations

import abc
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from transports.security import CurveClient, CurveServer

Buffer = bytes | bytearray | memoryview


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
    ``curve`` are its keys; None: nothing is encrypted, and the server may be anybody.
    """

    connect_timeout_seconds: float = 10.0
    reply_timeout_seconds: float = 120.0
    spin_seconds: float = 0.001
    window_requests: int = 32
    window_bytes: int = 256 * 2**20
    max_message_bytes: int = 2 * 2**30
    max_frames: int = 64
    compression_level: int = 1
    compression_min_bytes: int = 2**20
    curve: CurveClient | None = None


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Settings of a server. The limits per client bound what one peer can make the server hold.

    A connection over which no whole message came within ``hello_timeout_seconds`` is ended; what is remembered of a
    client that has been silent for ``idle_timeout_seconds`` is forgotten. ``curve`` are its keys and those of its
    clients; None: nothing is encrypted, and whoever reaches it may use it.
    """

    max_message_bytes: int = 2 * 2**30
    max_frames: int = 64
    max_client_requests: int = 64
    max_client_bytes: int = 2**30
    max_clients: int = 256
    hello_timeout_seconds: float = 30.0
    idle_timeout_seconds: float = 3600.0
    compression_level: int = 1
    compression_min_bytes: int = 2**20
    curve: CurveServer | None = None


class Client(abc.ABC):
    """One connection to one server.

    Blocking and awaited calls are the same verb in two forms. A lock-step client has one request in flight: its
    ``request_async`` returns an awaitable that is done when it returns, so a coroutine over it never suspends and needs
    no event loop. An overlapping client (``overlaps``) suspends there, and needs a running asyncio loop.

    Both forms may be used on one client, one after the other, never at once.

    ``on_sent`` is called with each message once it has been handed to the link, before the wait for its reply, and
    with the reading of ``time.perf_counter_ns`` from which on it was on its way (``Reply.sent_ns``): whoever keeps
    account of time knows then where compressing ends and the round trip begins.
    """

    name: ClassVar[str]
    overlaps: ClassVar[bool] = False
    endpoint: str
    on_sent: Callable[[Message, int], None] | None = None

    @abc.abstractmethod
    def request(self, message: Message, *, timeout_seconds: float | None = None) -> Reply:
        """Send ``message`` and wait for its reply.

        ``timeout_seconds`` replaces the client's ``reply_timeout_seconds`` for this request.

        Raises ``ReplyTimeoutError``, ``ConnectError``, ``ConnectionLostError``, ``FrameError``, ``LimitError`` (see
        ``transports.errors``).
        """

    def post(self, message: Message, *, timeout_seconds: float | None = None) -> Callable[[], Reply | None]:
        """Send ``message`` and go on. The function that is returned never waits: it gives the reply once that is there
        and None before, and raises what ``request`` would.

        A client that can't go on meanwhile has the reply, or raises, when ``post`` returns."""
        reply = self.request(message, timeout_seconds=timeout_seconds)
        return lambda: reply

    def begin(self, message: Message, *, timeout_seconds: float | None = None) -> Callable[[], Reply]:
        """Send ``message`` and go on. The function that is returned waits for the reply, and raises what ``request``
        would. Meanwhile other connections may be used; on this one, only where the client has several in flight.

        A client that can't go on meanwhile has the reply, or raises, when ``begin`` returns."""
        reply = self.request(message, timeout_seconds=timeout_seconds)
        return lambda: reply

    @property
    def pending_bytes(self) -> int:
        """Bytes of the requests that have no reply yet, those that stand in line for the window included."""
        return 0

    def request_all(self, messages: Sequence[Message], *, timeout_seconds: float | None = None) -> list[Reply]:
        """The replies to ``messages``, in their order. An overlapping client has them in flight together."""
        return [self.request(message, timeout_seconds=timeout_seconds) for message in messages]

    @abc.abstractmethod
    def request_async(self, message: Message, *, timeout_seconds: float | None = None) -> Awaitable[Reply]:
        """``request`` as an awaitable. Cancelling it forgets the request; a late reply to it is dropped."""

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

    user_bytes: int = 0
    """What the caller may take from memory for a request, beyond the request and its reply. Growth of the process that
    neither this nor any message explains is held against peers whose messages do not end."""

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

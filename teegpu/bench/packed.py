"""The slow codec that the ladder begins with: all frames of a message as bytes in one msgpack map, with a copy at each
step, as a program would do it that had not thought about it.

It is a transport around another one, for the benchmark's own processes alone: runner and server pack what they would
have sent as frames of their own, and take it apart again. Neither sees anything of it but its time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import ClassVar

import msgpack

from teegpu.errors import WireError
from teegpu.wire.unpacking import unpack
from transports.base import Buffer, Client, Compression, Incoming, Message, Reply, Server, ServerLoad
from transports.done import DoneReply
from transports.errors import FrameError

FRAMES = "frames"

PACKING_BYTES = 4096
"""What packing adds to a message at most: the map, its key, and five bytes for each of some hundred frames."""


def pack(frames: Sequence[Buffer]) -> bytes:
    """One msgpack map with a copy of every frame, which msgpack copies once more."""
    packed: bytes = msgpack.packb({FRAMES: [bytes(frame) for frame in frames]})
    return packed


def taken_apart(frames: Sequence[memoryview]) -> list[memoryview]:
    """The frames that were packed, each in memory of its own. Raises ``WireError`` for anything else."""
    body = unpack(frames[0], "a packed message") if len(frames) == 1 else None
    parts = body.get(FRAMES) if isinstance(body, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, bytes) for part in parts):
        raise WireError(f"a packed message is one map with '{FRAMES}', a list of bytes")
    return [memoryview(bytearray(part)) for part in parts]


class PackedClient(Client):
    """Packs what goes through ``inner``, a lock-step client, and so is one itself. Raises what ``inner`` does, and
    ``FrameError`` for a reply that was not packed."""

    name: ClassVar[str] = "packed"

    def __init__(self, inner: Client) -> None:
        self.endpoint = inner.endpoint
        self._inner = inner

    def request(self, message: Message, *, timeout_seconds: float | None = None) -> Reply:
        return self._opened(self._inner.request(self._packed(message), timeout_seconds=timeout_seconds))

    def post(self, message: Message, *, timeout_seconds: float | None = None) -> Callable[[], Reply | None]:
        poll = self._inner.post(self._packed(message), timeout_seconds=timeout_seconds)

        def opened() -> Reply | None:
            reply = poll()
            return None if reply is None else self._opened(reply)

        return opened

    def request_async(self, message: Message, *, timeout_seconds: float | None = None) -> Awaitable[Reply]:
        return DoneReply(self.request(message, timeout_seconds=timeout_seconds))

    @property
    def pending_bytes(self) -> int:
        return self._inner.pending_bytes

    def close(self) -> None:
        self._inner.close()

    def _packed(self, message: Message) -> Message:
        tell = self.on_sent
        # Who keeps account of time knows the message, not what it was packed into.
        self._inner.on_sent = None if tell is None else lambda _, sent_ns: tell(message, sent_ns)
        most = message.max_reply_bytes and message.max_reply_bytes + PACKING_BYTES
        return Message([pack(message.frames)], max_reply_bytes=most)

    def _opened(self, reply: Reply) -> Reply:
        try:
            return replace(reply, frames=taken_apart(reply.frames))
        except WireError as error:
            raise FrameError(f"{self.endpoint} sent a reply that is not packed ({error})") from None


class PackedServer(Server):
    """Packs what goes through ``inner``. A request that was not packed is handed out without frames, and so refused as
    malformed by who reads it."""

    def __init__(self, inner: Server) -> None:
        self.address = inner.address
        self._inner = inner

    @property
    def load(self) -> ServerLoad:
        return self._inner.load

    def drain(self) -> None:
        self._inner.drain()

    def next(self, timeout_seconds: float | None = None) -> Incoming | None:
        incoming = self._inner.next(timeout_seconds)
        if incoming is None:
            return None
        try:
            frames = taken_apart(incoming.frames)
        except WireError:
            frames = []
        return replace(incoming, frames=frames)

    def reply(self, incoming: Incoming, message: Message) -> Compression:
        return self._inner.reply(incoming, Message([pack(message.frames)]))

    def wake(self) -> None:
        self._inner.wake()

    def close(self, drain_seconds: float = 5.0) -> None:
        self._inner.close(drain_seconds)

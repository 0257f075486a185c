"""A request in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from transports.base import Buffer, Compression, Reply, Sent
from transports.errors import TransportError

if TYPE_CHECKING:
    from transports.dealer import DealerClient


class Exchange(Sent):
    """A request in flight, and its outcome once ``done``: ``reply`` or ``error``.

    An abandoned exchange (``abandoned``: nobody waits for it any more) keeps its place in the window until its reply
    comes or its time is over, because the server is still busy with it.
    """

    __slots__ = (
        "_client",
        "abandoned",
        "bytes_up",
        "deadline_ns",
        "error",
        "explicit",
        "future",
        "max_reply_bytes",
        "parts",
        "raw_bytes",
        "reply",
        "request_id",
        "sent_ns",
        "timeout_seconds",
        "up",
    )

    def __init__(
        self,
        client: DealerClient,
        request_id: int,
        raw_bytes: int,
        bytes_up: int,
        up: Compression,
        max_reply_bytes: int,
    ) -> None:
        self._client = client
        self.request_id = request_id
        self.raw_bytes = raw_bytes
        self.bytes_up = bytes_up
        self.up = up
        self.max_reply_bytes = max_reply_bytes
        self.parts: Sequence[Buffer] = ()
        """The whole message, until the connection is there."""
        self.sent_ns = 0
        self.deadline_ns = 0
        self.timeout_seconds = 0.0
        self.explicit = False
        self.abandoned = False
        self.reply: Reply | None = None
        self.error: TransportError | None = None
        self.future: asyncio.Future[Reply] | None = None

    @property
    def done(self) -> bool:
        return self.reply is not None or self.error is not None

    def result(self) -> Reply:
        if self.error is not None:
            raise self.error
        if self.reply is None:
            raise RuntimeError("the result of an exchange that is not done")
        return self.reply

    def poll(self) -> Reply | None:
        self._client.look(self)
        return self.result() if self.done else None

    def wait(self) -> Reply:
        self._client.wait_for(self)
        return self.result()

    def __await__(self) -> Generator[Any, None, Reply]:
        if not self._client.overlaps:
            return self.wait()
        if self.done:
            return self.result()
        self.future = asyncio.get_running_loop().create_future()
        try:
            return (yield from self.future)
        finally:
            self.abandoned = not self.done
            self.future = None

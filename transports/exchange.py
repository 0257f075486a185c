"""A request in flight."""

from __future__ import annotations

import asyncio

from transports.base import Compression, Reply
from transports.errors import TransportError


class Exchange:
    """A request in flight, and its outcome once ``done``: ``reply`` or ``error``.

    An abandoned exchange (``abandoned``: nobody waits for it any more) keeps its place in the window until its reply
    comes or its time is over, because the server is still busy with it.
    """

    __slots__ = (
        "abandoned",
        "bytes_up",
        "deadline_ns",
        "error",
        "explicit",
        "future",
        "max_reply_bytes",
        "moved_down_before",
        "moved_up_before",
        "raw_bytes",
        "reply",
        "request_id",
        "sent_ns",
        "timeout_seconds",
        "up",
    )

    def __init__(self, request_id: int, raw_bytes: int, bytes_up: int, up: Compression, max_reply_bytes: int) -> None:
        self.request_id = request_id
        self.raw_bytes = raw_bytes
        self.bytes_up = bytes_up
        self.up = up
        self.max_reply_bytes = max_reply_bytes
        self.sent_ns = 0
        self.deadline_ns = 0
        self.timeout_seconds = 0.0
        self.explicit = False
        self.moved_up_before = 0
        self.moved_down_before = 0
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

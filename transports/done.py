"""An awaitable that is already done: how a lock-step client fits where an overlapping one is awaited."""

from __future__ import annotations

from collections.abc import Awaitable, Generator

from transports.base import Reply


class DoneReply(Awaitable[Reply]):
    """Awaiting it never suspends, so a coroutine that awaits nothing else runs to its end without an event loop."""

    __slots__ = ("_reply",)

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    def __await__(self) -> Generator[None, None, Reply]:
        yield from ()  # it makes this a generator, and yields nothing
        return self._reply

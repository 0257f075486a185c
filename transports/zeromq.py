"""Transport "zmq": a lock-step DEALER client, and the ROUTER server of all zmq transports.

The client has one request in flight. Its awaitable form is done when it returns, so that a coroutine over it runs to
its end without an event loop.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import ClassVar

from transports.base import Message, Reply
from transports.dealer import DealerClient
from transports.done import DoneReply
from transports.router import RouterServer

__all__ = ["CompressedLockStepClient", "LockStepClient", "RouterServer"]


class LockStepClient(DealerClient):
    name: ClassVar[str] = "zmq"

    def request_async(self, message: Message, *, timeout_seconds: float | None = None) -> Awaitable[Reply]:
        """The reply as an awaitable that never suspends; errors are raised by this call itself."""
        return DoneReply(self.request(message, timeout_seconds=timeout_seconds))


class CompressedLockStepClient(LockStepClient):
    name: ClassVar[str] = "zmq+zstd"

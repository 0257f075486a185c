"""A place between the runner and a server where messages can be kept, or changed, on their way.

The runner works as it always does: it is given clients that are wrapped. What stands in the middle sees the frames that
a server gets after decompression, and those that it answers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from teegpu.endpoints import Endpoint
from transports.base import Buffer, Client, Message, Reply


class Middle:
    """Lets everything pass. ``address`` says which server is meant."""

    def up(self, address: str, frames: Sequence[Buffer]) -> Sequence[Buffer]:  # noqa: ARG002
        """The frames that are sent in place of ``frames``, a request."""
        return frames

    def down(self, address: str, request: Sequence[Buffer], reply: Reply) -> list[memoryview]:  # noqa: ARG002
        """The frames that the runner gets in place of those of ``reply``, which answers ``request``."""
        return reply.frames


class Wrapped(Client):
    """A client whose messages go through ``middle``. Raises what the client ``inner`` does."""

    def __init__(self, inner: Client, address: str, middle: Callable[[], Middle]) -> None:
        self._inner = inner
        self._address = address
        self._middle = middle
        self.endpoint = inner.endpoint
        # Of a transport these are class variables; here the client decides what they are.
        self.name = inner.name  # type: ignore[misc]
        self.overlaps = inner.overlaps  # type: ignore[misc]

    @property
    def on_sent(self) -> Callable[[Message, int], None] | None:
        return self._inner.on_sent

    @on_sent.setter
    def on_sent(self, hook: Callable[[Message, int], None] | None) -> None:
        self._inner.on_sent = hook

    @property
    def pending_bytes(self) -> int:
        return self._inner.pending_bytes

    def request(self, message: Message, *, timeout_seconds: float | None = None) -> Reply:
        sent = self._up(message)
        return self._down(sent, self._inner.request(sent, timeout_seconds=timeout_seconds))

    def request_async(self, message: Message, *, timeout_seconds: float | None = None) -> Awaitable[Reply]:
        return self._request_async(message, timeout_seconds)

    async def _request_async(self, message: Message, timeout_seconds: float | None) -> Reply:
        sent = self._up(message)
        return self._down(sent, await self._inner.request_async(sent, timeout_seconds=timeout_seconds))

    def request_all(self, messages: Sequence[Message], *, timeout_seconds: float | None = None) -> list[Reply]:
        sent = [self._up(message) for message in messages]
        replies = self._inner.request_all(sent, timeout_seconds=timeout_seconds)
        return [self._down(message, reply) for message, reply in zip(sent, replies, strict=True)]

    def post(self, message: Message, *, timeout_seconds: float | None = None) -> Callable[[], Reply | None]:
        sent = self._up(message)
        look = self._inner.post(sent, timeout_seconds=timeout_seconds)

        def looked() -> Reply | None:
            reply = look()
            return None if reply is None else self._down(sent, reply)

        return looked

    def begin(self, message: Message, *, timeout_seconds: float | None = None) -> Callable[[], Reply]:
        sent = self._up(message)
        wait = self._inner.begin(sent, timeout_seconds=timeout_seconds)
        return lambda: self._down(sent, wait())

    def close(self) -> None:
        self._inner.close()

    def _up(self, message: Message) -> Message:
        frames = self._middle().up(self._address, message.frames)
        return message if frames is message.frames else _with_frames(message, frames)

    def _down(self, sent: Message, reply: Reply) -> Reply:
        reply.frames = self._middle().down(self._address, sent.frames, reply)
        return reply


def _with_frames(message: Message, frames: Sequence[Buffer]) -> Message:
    """``message``, of whatever kind it is, with other frames."""
    changed: Any = replace(message, frames=frames)
    whole: Message = changed
    return whole


class Switch:
    """Wraps a run's clients; which middle they go through can be changed between prompts."""

    def __init__(self) -> None:
        self.middle = Middle()

    def __call__(self, endpoint: Endpoint, client: Client) -> Client:
        return Wrapped(client, endpoint.address, lambda: self.middle)

"""A place between the runner and a server where messages can be kept, or changed, on their way.

The runner works as it always does: it is given clients that are wrapped. What stands in the middle sees the frames that
a server gets after decompression, and those that it answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from teegpu.endpoints import Endpoint
from transports.base import Buffer, Changed, Client, Message, Reply, Sent


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
    def pending_bytes(self) -> int:
        return self._inner.pending_bytes

    def begin(self, message: Message, *, timeout_seconds: float | None = None) -> Sent:
        sent = self._up(message)
        return Changed(self._inner.begin(sent, timeout_seconds=timeout_seconds), partial(self._down, sent))

    async def begin_async(self, message: Message, *, timeout_seconds: float | None = None) -> Sent:
        sent = self._up(message)
        return Changed(await self._inner.begin_async(sent, timeout_seconds=timeout_seconds), partial(self._down, sent))

    def close(self) -> None:
        self._inner.close()

    def _up(self, message: Message) -> Message:
        frames = self._middle().up(self._address, message.frames)
        return message if frames is message.frames else replace(message, frames=frames)

    def _down(self, sent: Message, reply: Reply) -> Reply:
        reply.frames = self._middle().down(self._address, sent.frames, reply)
        return reply


class Switch:
    """Wraps a run's clients; which middle they go through can be changed between prompts."""

    def __init__(self) -> None:
        self.middle = Middle()

    def __call__(self, endpoint: Endpoint, client: Client) -> Client:
        return Wrapped(client, endpoint.address, lambda: self.middle)

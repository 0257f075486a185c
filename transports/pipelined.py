"""Transport "pipelined": many requests in flight over one connection, awaited on ``zmq.asyncio``.

Replies are matched by id and may come in any order. A window in requests and in bytes bounds what is in flight; who
finds it full waits in line. A cancelled request keeps its place in the window until its reply comes or its time is
over, since the server still works on it.

The same client also works without an event loop (``begin``, ``request``): a step of decoding is many small round
trips, and each would pay for the hops through a loop. Both ways use one socket. Its descriptor is edge-triggered, so
each way empties the socket before it sleeps, and the awaited way looks again after every send. What belongs to an
event loop is kept apart (``_LoopSide``) and made anew for each loop: a receive that is pending in a loop that has
ended must never be handed a message, and one that got its message in the loop's last moment is asked for it later.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, cast

import zmq
import zmq.asyncio

from transports.base import ClientOptions, Message
from transports.connection import Connection
from transports.dealer import DealerClient, ErrorMaker
from transports.exchange import Exchange


class _LoopSide:
    """A connection as one event loop sees it: a chain of receives on the socket, one on its monitor, a timer."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        connection: Connection,
        on_message: Callable[[Connection, list[memoryview] | None], None],
        on_monitor: Callable[[Connection, list[bytes]], None],
    ) -> None:
        self.loop = loop
        self.connection = connection
        self.timer: asyncio.TimerHandle | None = None
        self._on_message = on_message
        self._on_monitor = on_monitor
        self._closed = False
        self._socket = zmq.asyncio.Socket.from_socket(connection.socket)
        self._monitor = zmq.asyncio.Socket.from_socket(connection.monitor)
        self._message: asyncio.Future[list[zmq.Frame]] | None = None
        self._event: asyncio.Future[list[bytes]] | None = None
        self._await_message()
        self._await_event()

    def _await_message(self) -> None:
        self._message = cast("asyncio.Future[list[zmq.Frame]]", self._socket.recv_multipart(copy=False))
        self._message.add_done_callback(self._got_message)

    def _await_event(self) -> None:
        self._event = cast("asyncio.Future[list[bytes]]", self._monitor.recv_multipart())
        self._event.add_done_callback(self._got_event)

    def _got_message(self, _: object) -> None:
        self._take_message()
        if not self._closed and self._message is None:
            self._await_message()

    def _got_event(self, _: object) -> None:
        self._take_event()
        if not self._closed and self._event is None:
            self._await_event()

    def _take_message(self) -> None:
        future = self._message
        if future is None or not future.done():
            return
        self._message = None
        if not self._closed and not future.cancelled():
            failed = future.exception() is not None
            self._on_message(self.connection, None if failed else [frame.buffer for frame in future.result()])

    def _take_event(self) -> None:
        future = self._event
        if future is None or not future.done():
            return
        self._event = None
        if not self._closed and not future.cancelled() and future.exception() is None:
            self._on_monitor(self.connection, future.result())

    def harvest(self) -> None:
        """Take what was received, but whose callback has not run: in a loop that was stopped then, it never will."""
        self._take_message()
        self._take_event()

    def close(self) -> None:
        """Take leave of the loop. The sockets themselves belong to the connection."""
        self._closed = True
        if self.timer is not None:
            self.timer.cancel()
        if not self.loop.is_closed():
            self.loop.remove_reader(self.connection.socket.FD)
            self.loop.remove_reader(self.connection.monitor.FD)


class PipelinedClient(DealerClient):
    name: ClassVar[str] = "pipelined"
    overlaps: ClassVar[bool] = True

    _side: _LoopSide | None = None

    def __init__(self, endpoint: str, options: ClientOptions) -> None:
        self._line: deque[tuple[asyncio.Future[None], int]] = deque()
        self._granted: dict[asyncio.Future[None], int] = {}
        super().__init__(endpoint, options)

    # ---- without an event loop

    def begin(self, message: Message, *, timeout_seconds: float | None = None) -> Exchange:
        self._harvest()
        return super().begin(message, timeout_seconds=timeout_seconds)

    # ---- with one

    async def begin_async(self, message: Message, *, timeout_seconds: float | None = None) -> Exchange:
        loop = asyncio.get_running_loop()
        nbytes = message.nbytes
        if self._line or not self._has_room(nbytes):
            self._listen(loop)  # a line left by another loop is cleared here, so look again
            if self._line or not self._has_room(nbytes):
                await self._stand_in_line(loop, nbytes)
        try:
            exchange = self._submit(message, timeout_seconds)
        except BaseException:
            self._admit()
            raise
        with self._known_state():
            self._listen(loop)
            # Sending may have taken notice of a message without reading it; the descriptor would not tell of it again.
            self._drain()
        return exchange

    @contextmanager
    def _known_state(self) -> Iterator[None]:
        """What fails within it ends the connection and all that is in flight, as in ``wait_for``: nobody would go on
        with what it has left half done."""
        try:
            yield
        except BaseException:
            self._fail(self._lost("was given up"))
            raise

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have ``loop`` watch the connection and the deadlines of what is in flight."""
        connection = self._connection
        if connection is None:
            return
        side = self._side
        if side is None or side.loop is not loop or side.connection is not connection:
            if side is not None:
                side.harvest()
                if connection is not self._connection:
                    return
                side.close()
                if side.loop is not loop:
                    self._forget_line()
            side = self._side = _LoopSide(loop, connection, self._on_message, self._on_monitor)
        if self._in_flight:
            when = loop.time() + (self._next_deadline_ns(connection) - time.perf_counter_ns()) / 1e9
            if side.timer is None or side.timer.when() > when:
                if side.timer is not None:
                    side.timer.cancel()
                side.timer = loop.call_at(when, self._on_deadline, side)

    def _harvest(self) -> None:
        if self._side is not None:
            if self._side.loop.is_closed():
                self._forget_line()
            self._side.harvest()

    def _drain(self) -> None:
        connection = self._connection
        while connection is not None and connection is self._connection and connection.readable():
            self._receive(connection)

    def _on_message(self, connection: Connection, parts: list[memoryview] | None) -> None:
        """A message came, or None: the receive failed."""
        if parts is None:
            self._fail(self._lost("failed"))
            return
        with self._known_state():
            self._accept(parts, connection)
            self._drain()

    def _on_monitor(self, connection: Connection, parts: list[bytes]) -> None:
        """The monitor told something."""
        with self._known_state():
            connection.on_monitor(parts)
            if connection is self._connection:
                self._check_connection(connection)
                if self._side is not None:
                    self._listen(self._side.loop)  # the next attempt to connect is at a time of its own

    def _on_deadline(self, side: _LoopSide) -> None:
        side.timer = None
        if side is not self._side or side.connection is not self._connection:
            return
        with self._known_state():
            self._drain()
            self._check_connection(side.connection)
            self._expire(time.perf_counter_ns())
            self._listen(side.loop)

    # ---- the window

    @property
    def pending_bytes(self) -> int:
        return self._in_flight_bytes + sum(self._granted.values()) + sum(nbytes for _, nbytes in self._line)

    def _has_room(self, nbytes: int) -> bool:
        count = len(self._in_flight) + len(self._granted)
        if count == 0:
            return True
        options = self.options
        held = self._in_flight_bytes + sum(self._granted.values())
        return count < options.window_requests and held + nbytes <= options.window_bytes

    async def _stand_in_line(self, loop: asyncio.AbstractEventLoop, nbytes: int) -> None:
        """Wait for room in the window, in the order of asking; the caller has to use it before anything else runs."""
        turn: asyncio.Future[None] = loop.create_future()
        place = (turn, nbytes)
        self._line.append(place)
        try:
            await turn
        except BaseException:
            if place in self._line:
                self._line.remove(place)
            self._granted.pop(turn, None)
            self._admit()
            raise
        self._granted.pop(turn, None)

    def _admit(self) -> None:
        """Let go on who stands first in line, as far as there is room."""
        while self._line and self._has_room(self._line[0][1]):
            turn, nbytes = self._line.popleft()
            if not turn.done():
                self._granted[turn] = nbytes
                turn.set_result(None)

    def _forget_line(self) -> None:
        """Those who stood in line in a loop that has ended don't any more."""
        self._line.clear()
        self._granted.clear()

    # ---- ends of an exchange

    def _check_connection(self, connection: Connection) -> None:
        self._harvest()
        if connection is self._connection:
            super()._check_connection(connection)

    def _remove(self, exchange: Exchange) -> None:
        super()._remove(exchange)
        self._admit()

    def _finish(self, exchange: Exchange) -> None:
        super()._finish(exchange)
        future = exchange.future
        if future is None:
            return
        if future.cancelled():
            self.dropped_replies += exchange.reply is not None
        if future.done() or future.get_loop().is_closed():
            return
        if exchange.error is not None:
            future.set_exception(exchange.error)
        elif exchange.reply is not None:
            future.set_result(exchange.reply)

    def _fail(self, make_error: ErrorMaker) -> None:
        line, self._line = self._line, deque()
        super()._fail(make_error)
        for turn, _ in line:
            if not turn.done() and not turn.get_loop().is_closed():
                turn.set_exception(make_error())

    def _reopen(self, connection: Connection) -> None:
        side = self._side
        self._leave(connection)
        super()._reopen(connection)
        if side is not None and not side.loop.is_closed():
            self._listen(side.loop)

    def _disconnect(self, connection: Connection) -> None:
        self._leave(connection)
        super()._disconnect(connection)

    def _leave(self, connection: Connection) -> None:
        if self._side is not None and self._side.connection is connection:
            self._side.close()
            self._side = None


class CompressedPipelinedClient(PipelinedClient):
    name: ClassVar[str] = "pipelined+zstd"
    compresses: ClassVar[bool] = True

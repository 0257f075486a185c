"""One client of a soak: it runs programs of the fused plan until it is told to stop, and counts what became of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import transports
from teegpu.bench.samples import quantile
from teegpu.errors import WireError
from teegpu.tee.greeting import hello
from teegpu.tee.products import Call
from teegpu.wire import codec
from teegpu.wire.limits import Limits
from teegpu.wire.messages import Execute, Result
from transports.base import Client, ClientOptions, Message, Reply
from transports.errors import LimitError, TransportError

STEADY, GREEDY = "steady", "greedy"

STEADY_PROGRAMS_A_CONNECTION = 200
"""Then a steady client leaves and comes back: connections are to come and go in a soak."""

_REPLY_SECONDS = 60.0
_HELLO_SECONDS = 30.0
_PAUSE_SECONDS = 0.1
_KEPT = 20_000


@dataclass
class Tally:
    """What became of a client's programs. Seconds are the server's own, as its replies say."""

    programs: int = 0
    refusals: int = 0
    reconnects: int = 0
    errors: list[str] = field(default_factory=list)
    server_seconds: float = 0.0
    queue_seconds: list[float] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.programs += 1
        times = result.times
        self.server_seconds += times.decode_seconds + times.compute_seconds + times.encode_seconds
        if len(self.queue_seconds) < _KEPT:
            self.queue_seconds.append(times.queue_seconds)
        else:
            self.queue_seconds[self.programs % _KEPT] = times.queue_seconds

    def to_json(self, seconds: float) -> dict[str, Any]:
        waits = self.queue_seconds
        return {
            "programs": self.programs,
            "programs_per_second": self.programs / seconds if seconds > 0 else 0.0,
            "server_seconds": self.server_seconds,
            "queue_seconds": {"median": quantile(waits, 0.5), "p95": quantile(waits, 0.95)} if waits else None,
            "refusals": self.refusals,
            "reconnects": self.reconnects,
            "errors": len(self.errors),
        }


def requests(calls: Sequence[Call], wire_dtype: str) -> list[Message]:
    """Each call as the bytes that are sent again and again: requests hold all that they need."""
    found = []
    for call in calls:
        inputs = dict.fromkeys(call.program.inputs, wire_dtype)
        outputs = dict.fromkeys(call.program.outputs, wire_dtype)
        found.append(Message(codec.encode_execute(Execute(1, call.program, call.inputs, inputs, outputs)).frames))
    return found


class SoakClient(threading.Thread):
    """``steady``: one request at a time, and a new connection now and then. ``greedy``: ``at_once`` in flight, more
    than the server takes from one client, so that it is refused some all the time."""

    def __init__(
        self,
        kind: str,
        number: int,
        address: str,
        messages: Sequence[Message],
        limits: Limits,
        stop: threading.Event,
        *,
        at_once: int,
    ) -> None:
        super().__init__(name=f"{kind} client {number}", daemon=True)
        self.kind = kind
        self.tally = Tally()
        self._address = address
        self._messages = messages
        self._decoder = codec.Decoder(limits)
        self._stop_asked = stop
        self._at_once = at_once if kind == GREEDY else 1
        self._transport = "pipelined" if kind == GREEDY else "zmq"

    def run(self) -> None:
        options = ClientOptions(
            connect_timeout_seconds=_HELLO_SECONDS,
            reply_timeout_seconds=_REPLY_SECONDS,
            spin_seconds=0.0,
            window_requests=self._at_once,
        )
        while not self._stop_asked.is_set():
            try:
                with transports.connect(self._transport, self._address, options) as client:
                    hello(client, self._decoder, _HELLO_SECONDS)
                    self._use(client)
            except (TransportError, WireError) as error:
                self.tally.errors.append(str(error))
                self._stop_asked.wait(_PAUSE_SECONDS)
            self.tally.reconnects += 1

    def _use(self, client: Client) -> None:
        """Until it is told to stop, or to come back over a new connection."""
        done = 0
        while not self._stop_asked.is_set() and (self.kind == GREEDY or done < STEADY_PROGRAMS_A_CONNECTION):
            batch = [self._messages[(done + place) % len(self._messages)] for place in range(self._at_once)]
            done += len(batch)
            if self.kind == STEADY:
                self._count(client.request(batch[0]))
            else:
                self._flood(client, batch)

    def _flood(self, client: Client, batch: list[Message]) -> None:
        polls = [client.post(message) for message in batch]
        while polls and not self._stop_asked.is_set():
            left = []
            for poll in polls:
                try:
                    reply = poll()
                except LimitError:
                    self.tally.refusals += 1
                    continue
                if reply is None:
                    left.append(poll)
                else:
                    self._count(reply)
            polls = left
            if polls:
                time.sleep(0.0005)

    def _count(self, reply: Reply) -> None:
        answer = self._decoder.decode(reply.frames)
        if not isinstance(answer, Result):
            raise WireError(f"the server answered with a {type(answer).__name__}, where a result was expected")
        self.tally.add(answer)

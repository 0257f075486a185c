"""Connections to GPU servers: opened beside the work, greeted before they are used, given up when a request is lost.

Nothing here waits. zmq connects in a thread of its own, and who needs a connection looks now and then whether it is
there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from teegpu.endpoints import Endpoint, Layers
from teegpu.errors import TeegpuError
from teegpu.wire.messages import Welcome
from transports.base import Client, Message, Reply, Sent
from transports.errors import TransportError

LONGEST_PAUSE_SECONDS = 2.0
"""Pauses between attempts double up to this."""

_RETIRED_MOST = 8
"""Given up connections that are kept for replies that may still come; more are closed."""


class Handshake(Protocol):
    """Says hello: ``message`` is what is sent, ``check`` reads the answer (see ``handshake.ModelHandshake``)."""

    message: Message

    def check(self, reply: Reply, endpoint: Endpoint) -> Welcome: ...


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """``budget_seconds`` counts from a shard's first failure without a reply since; 0: a failure ends the run."""

    budget_seconds: float = 30.0
    backoff_seconds: float = 0.05
    connect_timeout_seconds: float = 10.0
    hello_timeout_seconds: float = 30.0


class Replica:
    """A server: its connection (``client``), or None while it has none; ``welcome`` is what it last said of itself."""

    def __init__(self, index: int, endpoint: Endpoint) -> None:
        self.index = index
        self.endpoint = endpoint
        self.client: Client | None = None
        self.welcome: Welcome | None = None
        self.error: Exception | None = None
        """Why it has no connection."""
        self.barred = False
        """It answered what must not be asked again, while others went on."""
        self.gave_up = False
        """It did not answer in time when the run began."""
        self.failures = 0
        """In a row, without a reply between them."""
        self.lost_ns = 0
        self.retry_at_ns = 0
        self.turn = 0
        self._waited = (0, 0.0)
        self.opening: tuple[Client, Sent] | None = None

    @property
    def address(self) -> str:
        return self.endpoint.address

    def waited(self, seconds: float, now_ns: int) -> None:
        """A request that it has just answered stood in its queue for ``seconds``."""
        self._waited = (now_ns, seconds)

    def waits_seconds(self, now_ns: int) -> float:
        """How long a request would stand in its queue: as long as the last one did, and half of that for each second
        that has passed since, so that one that had much to do is tried again."""
        at_ns, seconds = self._waited
        return seconds * 0.5 ** ((now_ns - at_ns) / 1e9)


class Shard:
    """Replicas that compute the same ``layers``. ``failing_since_ns``: the first failure without a reply since."""

    def __init__(self, index: int, layers: Layers, replicas: list[Replica]) -> None:
        self.index = index
        self.layers = layers
        self.replicas = replicas
        self.current = replicas[0]
        self.failing_since_ns: int | None = None
        self.attempts = 0
        """To connect, since then."""


class Connections:
    """Opens and closes the connections of replicas. ``connect`` makes a client of an endpoint, ``handshake`` says hello
    over it, ``note`` takes a line for the user."""

    def __init__(
        self,
        connect: Callable[[Endpoint], Client],
        handshake: Handshake,
        policy: RetryPolicy,
        note: Callable[[str], None],
    ) -> None:
        self._connect = connect
        self._handshake = handshake
        self._policy = policy
        self._note = note
        self._retired: list[Client] = []

    def look(self, replica: Replica, now: int, shard: Shard | None = None) -> None:
        """Begins to connect where that is due, and takes the answer where it has come. Never waits.

        ``shard``: where given, and another of it can go on, a server that says what it must not is left out and noted;
        else its error is raised."""
        if replica.barred:
            return
        try:
            if replica.opening is None:
                if now < replica.retry_at_ns:
                    return
                if shard is not None:
                    shard.attempts += 1
                client = self._connect(replica.endpoint)
                try:
                    hello = client.begin(self._handshake.message, timeout_seconds=self._policy.hello_timeout_seconds)
                except BaseException:
                    client.close()
                    raise
                replica.opening = (client, hello)
            client, hello = replica.opening
            reply = hello.poll()
            if reply is None:
                return
            welcome = self._handshake.check(reply, replica.endpoint)
        except (TransportError, TeegpuError) as error:
            self._not_opened(replica, error, now, shard)
            return
        replica.opening = None
        self._opened(replica, client, welcome, now)

    def _opened(self, replica: Replica, client: Client, welcome: Welcome, now: int) -> None:
        before, replica.welcome = replica.welcome, welcome
        if replica.failures:
            again = "answers again" if before is not None else "answers"
            if before is not None and before.instance != welcome.instance:
                again = "was restarted and answers again"
            self._note(f"the server at {replica.address} {again} after {(now - replica.lost_ns) / 1e9:.1f} s")
        replica.client = client
        replica.error = None

    def _not_opened(self, replica: Replica, error: TransportError | TeegpuError, now: int, shard: Shard | None) -> None:
        if replica.opening is not None:
            replica.opening[0].close()
            replica.opening = None
        replica.error = error
        if isinstance(error, TransportError) and error.retryable:
            self.put_off(replica, now)
            return
        others = [] if shard is None else [other for other in shard.replicas if other.client is not None]
        if not others:
            raise error
        replica.barred = True
        self._note(f"the server at {replica.address} is left out from now on: {error}")

    def put_off(self, replica: Replica, now: int) -> None:
        pause = min(self._policy.backoff_seconds * 2.0 ** min(replica.failures, 30), LONGEST_PAUSE_SECONDS)
        replica.failures += 1
        replica.retry_at_ns = now + int(pause * 1e9)

    def leave(self, replica: Replica) -> None:
        """``replica`` is not to be used any more."""
        if replica.opening is not None:
            replica.opening[0].close()
        if replica.client is not None:
            self.retire(replica.client)
        replica.client = replica.opening = None
        replica.barred = True

    def retire(self, client: Client) -> None:
        """Takes a connection out of use. Requests that are still on it may yet be answered: a server that is shutting
        down finishes what it has, and a slow one is not a dead one."""
        self._retired.append(client)
        waiting = [old for old in self._retired if old.pending_bytes]
        for old in self._retired:
            if old not in waiting[-_RETIRED_MOST:]:
                old.close()
        self._retired = waiting[-_RETIRED_MOST:]

    def close(self, replicas: list[Replica]) -> None:
        clients, self._retired = self._retired, []
        for replica in replicas:
            if replica.opening is not None:
                clients.append(replica.opening[0])
            if replica.client is not None:
                clients.append(replica.client)
            replica.client = replica.opening = None
        for client in clients:
            client.close()

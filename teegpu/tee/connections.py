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
from transports.base import Client, Message, Reply
from transports.errors import TransportError

LONGEST_PAUSE_SECONDS = 2.0
"""Pauses between attempts double up to this."""

_RETIRED_MOST = 8
"""Given up connections that are kept for replies that may still come; more are closed."""


class Greets(Protocol):
    """Says hello: ``message`` is what is sent, ``check`` reads the answer (see ``greeting.Greeter``)."""

    message: Message

    def check(self, reply: Reply, endpoint: Endpoint) -> Welcome: ...


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """``budget_seconds`` counts from a group's first failure without a reply since; 0: a failure ends the run."""

    budget_seconds: float = 30.0
    backoff_seconds: float = 0.05
    connect_timeout_seconds: float = 10.0
    hello_timeout_seconds: float = 30.0


class Member:
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
        self.opening: tuple[Client, Callable[[], Reply | None]] | None = None

    @property
    def address(self) -> str:
        return self.endpoint.address


class Group:
    """Members that compute the same ``layers``. ``failing_since_ns``: the first failure without a reply since."""

    def __init__(self, index: int, layers: Layers, members: list[Member]) -> None:
        self.index = index
        self.layers = layers
        self.members = members
        self.current = members[0]
        self.failing_since_ns: int | None = None
        self.attempts = 0
        """To connect, since then."""


class Connections:
    """Opens and closes the connections of members. ``connect`` makes a client of an endpoint, ``greeter`` says hello
    over it, ``note`` takes a line for the user. Clients get ``on_sent``."""

    def __init__(
        self,
        connect: Callable[[Endpoint], Client],
        greeter: Greets,
        policy: RetryPolicy,
        note: Callable[[str], None],
    ) -> None:
        self.on_sent: Callable[[Message, int], None] | None = None
        self._connect = connect
        self._greeter = greeter
        self._policy = policy
        self._note = note
        self._retired: list[Client] = []

    def look(self, member: Member, now: int, group: Group | None = None) -> None:
        """Begins to connect where that is due, and takes the answer where it has come. Never waits.

        ``group``: where given, and another of it can go on, a server that says what it must not is left out and noted;
        else its error is raised."""
        if member.barred:
            return
        try:
            if member.opening is None:
                if now < member.retry_at_ns:
                    return
                if group is not None:
                    group.attempts += 1
                client = self._connect(member.endpoint)
                try:
                    hello = client.post(self._greeter.message, timeout_seconds=self._policy.hello_timeout_seconds)
                except BaseException:
                    client.close()
                    raise
                member.opening = (client, hello)
            client, hello = member.opening
            reply = hello()
            if reply is None:
                return
            welcome = self._greeter.check(reply, member.endpoint)
        except (TransportError, TeegpuError) as error:
            self._not_opened(member, error, now, group)
            return
        member.opening = None
        self._opened(member, client, welcome, now)

    def _opened(self, member: Member, client: Client, welcome: Welcome, now: int) -> None:
        before, member.welcome = member.welcome, welcome
        if member.failures:
            again = "answers again" if before is not None else "answers"
            if before is not None and before.instance != welcome.instance:
                again = "was restarted and answers again"
            self._note(f"the server at {member.address} {again} after {(now - member.lost_ns) / 1e9:.1f} s")
        client.on_sent = self.on_sent
        member.client = client
        member.error = None

    def _not_opened(self, member: Member, error: TransportError | TeegpuError, now: int, group: Group | None) -> None:
        if member.opening is not None:
            member.opening[0].close()
            member.opening = None
        member.error = error
        if isinstance(error, TransportError) and error.retryable:
            self.put_off(member, now)
            return
        others = [] if group is None else [other for other in group.members if other.client is not None]
        if not others:
            raise error
        member.barred = True
        self._note(f"the server at {member.address} is left out from now on: {error}")

    def put_off(self, member: Member, now: int) -> None:
        pause = min(self._policy.backoff_seconds * 2.0 ** min(member.failures, 30), LONGEST_PAUSE_SECONDS)
        member.failures += 1
        member.retry_at_ns = now + int(pause * 1e9)

    def retire(self, client: Client) -> None:
        """Takes a connection out of use. Requests that are still on it may yet be answered: a server that is shutting
        down finishes what it has, and a slow one is not a dead one."""
        self._retired.append(client)
        waiting = [old for old in self._retired if old.pending_bytes]
        for old in self._retired:
            if old not in waiting[-_RETIRED_MOST:]:
                old.close()
        self._retired = waiting[-_RETIRED_MOST:]

    def close(self, members: list[Member]) -> None:
        clients, self._retired = self._retired, []
        for member in members:
            if member.opening is not None:
                clients.append(member.opening[0])
            if member.client is not None:
                clients.append(member.client)
            member.client = member.opening = None
        for client in clients:
            client.close()

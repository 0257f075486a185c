"""Bounded queues, one per client, emptied fairly: what keeps one client from starving or filling a server.

A client is accounted for everything that it makes the server hold: requests that wait, requests that are being
computed, and replies that it has not taken yet. When that exceeds its bounds, the next request is refused; nothing is
ever dropped silently. No I/O, no clock and no locking here.

Whose turn it is: the client that had the least of the server's time (start-time fair queueing). Each account has a
virtual time, which grows by what its requests cost; who was idle starts at the present one, so that nobody saves up
turns. A client whose requests are small thus waits for one request of another client at most, however many those have
sent, and however large theirs are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Account(Generic[T]):
    __slots__ = ("bytes", "gone", "order", "requests", "seen", "untaken", "virtual", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[tuple[T, int]] = deque()
        self.requests = 0
        self.bytes = 0
        self.untaken: deque[tuple[Callable[[], bool], int]] = deque()
        self.virtual = 0.0
        self.order = 0
        self.seen = 0.0
        self.gone = False

    def settle(self) -> None:
        """Forget the replies that have been taken; a client takes them in order."""
        while self.untaken and self.untaken[0][0]():
            self.bytes -= self.untaken.popleft()[1]

    @property
    def idle(self) -> bool:
        return self.requests == 0 and not self.untaken


class FairQueue(Generic[T]):
    """Requests of many clients. ``waiting_bytes`` is the sum of what waits, over all clients."""

    def __init__(self, *, max_clients: int, max_client_requests: int, max_client_bytes: int) -> None:
        self._max_clients = max_clients
        self._max_requests = max_client_requests
        self._max_bytes = max_client_bytes
        self._accounts: dict[bytes, _Account[T]] = {}
        self._ready: dict[bytes, _Account[T]] = {}
        self._now = 0.0
        self._pushes = 0
        self._waiting = 0
        self.waiting_bytes = 0

    def __len__(self) -> int:
        return self._waiting

    @property
    def clients(self) -> int:
        """How many clients it remembers."""
        return len(self._accounts)

    @property
    def in_flight(self) -> int:
        """Requests that wait or are being computed."""
        return sum(account.requests for account in self._accounts.values())

    @property
    def held_bytes(self) -> int:
        """Bytes on all accounts: of requests, and of replies that are not taken."""
        return sum(account.bytes for account in self._accounts.values())

    def largest(self) -> bytes | None:
        """The client on whose account the most bytes are."""
        return max(self._accounts, key=lambda client: self._accounts[client].bytes, default=None)

    def push(self, client: bytes, item: T, nbytes: int, now: float = 0.0) -> str | None:
        """Queue a request of ``nbytes`` that came at ``now``; returns None, or the reason why it is refused."""
        account = self._accounts.get(client)
        if account is None:
            if len(self._accounts) >= self._max_clients:
                self._forget_idle()
            if len(self._accounts) >= self._max_clients:
                return f"the server already serves {self._max_clients} clients (limits.clients on the server)"
            account = self._accounts[client] = _Account()
        account.seen = now
        account.gone = False
        if account.requests >= self._max_requests:
            return f"{account.requests} requests of this client wait already (limits.client_requests on the server)"
        account.settle()
        # A client that owes nothing may always send one request: its size is bounded by limits.message_mib.
        if account.bytes + nbytes > self._max_bytes and not account.idle:
            return f"{account.bytes} bytes of this client are held already (limits.client_mib on the server)"
        if account.requests == 0:
            account.virtual = max(account.virtual, self._now)
        if not account.waiting:
            self._queue_up(client, account)
        account.waiting.append((item, nbytes))
        account.requests += 1
        account.bytes += nbytes
        self._waiting += 1
        self.waiting_bytes += nbytes
        return None

    def _queue_up(self, client: bytes, account: _Account[T]) -> None:
        self._pushes += 1
        account.order = self._pushes
        self._ready[client] = account

    def pop(self) -> T | None:
        """The oldest request of the client whose turn it is. It stays on the client's account until ``done``."""
        if not self._ready:
            return None
        if len(self._ready) == 1:
            client, account = next(iter(self._ready.items()))
        else:
            # Among equals, who came first or was served longest ago.
            client, account = min(self._ready.items(), key=lambda each: (each[1].virtual, each[1].order))
        self._now = max(self._now, account.virtual)
        item, nbytes = account.waiting.popleft()
        del self._ready[client]
        if account.waiting:
            self._queue_up(client, account)
        self._waiting -= 1
        self.waiting_bytes -= nbytes
        return item

    def done(self, client: bytes, nbytes: int, cost: float = 0.0) -> None:
        """A popped request of ``nbytes`` has been answered, and has taken ``cost`` seconds of the server."""
        account = self._accounts[client]
        account.requests -= 1
        account.bytes -= nbytes
        account.virtual += cost
        if account.gone and account.requests == 0:
            del self._accounts[client]

    def owe(self, client: bytes, nbytes: int, taken: Callable[[], bool]) -> None:
        """A reply holds ``nbytes`` of the server's memory until ``taken()``."""
        account = self._accounts.get(client)
        if account is None:
            return  # it has gone meanwhile, and its connection with what was queued for it
        account.settle()
        account.untaken.append((taken, nbytes))
        account.bytes += nbytes

    def leave(self, client: bytes) -> None:
        """``client`` has gone: what it asked for and nobody works on is forgotten, and so is what it was sent."""
        account = self._accounts.get(client)
        if account is None:
            return
        self._waiting -= len(account.waiting)
        for _, nbytes in account.waiting:
            self.waiting_bytes -= nbytes
            account.bytes -= nbytes
        account.requests -= len(account.waiting)
        account.waiting.clear()
        self._ready.pop(client, None)
        account.gone = True
        if account.requests == 0:
            del self._accounts[client]

    def forget_silent(self, before: float) -> int:
        """Forget the clients that owe nothing and have sent nothing since ``before``; returns how many."""
        silent = 0
        for client, account in list(self._accounts.items()):
            account.settle()
            if account.idle and account.seen < before:
                del self._accounts[client]
                silent += 1
        return silent

    def _forget_idle(self) -> None:
        for client, account in list(self._accounts.items()):
            account.settle()
            if account.idle:
                del self._accounts[client]

"""Bounded queues, one per account, emptied fairly: what keeps one client from starving or filling a server.

An account is a key, with all connections that prove to have it; where there are no keys, each connection has one of its
own. It is charged for everything that it makes the server hold: requests that wait, requests that are being computed,
and replies that were not taken yet. When that exceeds its bounds, the next request is refused; nothing is ever dropped
silently. No I/O, no clock and no locking here.

Whose turn it is: the account that had the least of the server's time (start-time fair queueing), and of its connections
each in turn. Each account has a virtual time, which grows by what its requests cost; who was idle starts at the present
one, so that nobody saves up turns, and who leaves and comes back starts where it was. An account whose requests are
small thus waits for one request of another account at most, however many those have sent, and however large theirs are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Account(Generic[T]):
    """``waiting`` and ``untaken`` have an entry for each connection for which there is something. ``lasting``: whether
    another connection may come for it."""

    __slots__ = ("bytes", "clients", "lasting", "order", "requests", "seen", "untaken", "virtual", "waiting")

    def __init__(self, *, lasting: bool) -> None:
        self.lasting = lasting
        self.clients: set[bytes] = set()
        self.waiting: dict[bytes, deque[tuple[T, int]]] = {}
        self.requests = 0
        self.bytes = 0
        self.untaken: dict[bytes, deque[tuple[Callable[[], bool], int]]] = {}
        self.virtual = 0.0
        self.order = 0
        self.seen = 0.0

    def settle(self) -> None:
        """Forget the replies that have been taken; a connection takes them in order."""
        for client, replies in list(self.untaken.items()) if self.untaken else ():
            while replies and replies[0][0]():
                self.bytes -= replies.popleft()[1]
            if not replies:
                del self.untaken[client]

    @property
    def idle(self) -> bool:
        return self.requests == 0 and not self.untaken


class FairQueue(Generic[T]):
    """Requests of many clients. ``waiting_bytes`` is the sum of what waits, over all of them."""

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
        """How many accounts are connected, or have requests here."""
        return sum(bool(account.clients or account.requests) for account in self._accounts.values())

    @property
    def in_flight(self) -> int:
        """Requests that wait or are being computed."""
        return sum(account.requests for account in self._accounts.values())

    @property
    def held_bytes(self) -> int:
        """Bytes on all accounts: of requests, and of replies that are not taken."""
        return sum(account.bytes for account in self._accounts.values())

    def largest(self) -> bytes | None:
        """The connection with the most replies that are not taken, of the account on which the most bytes are."""
        account = max(self._accounts.values(), key=lambda each: each.bytes, default=None)
        if account is None:
            return None
        held = {client: sum(nbytes for _, nbytes in replies) for client, replies in account.untaken.items()}
        return max(held or account.clients, key=lambda client: held.get(client, 0), default=None)

    def push(self, name: bytes, client: bytes, item: T, nbytes: int, now: float = 0.0) -> str | None:
        """Queue a request of ``nbytes`` that came at ``now`` over the connection ``client`` of the account ``name``;
        returns None, or the reason why it is refused."""
        account = self._accounts.get(name)
        if account is None:
            if len(self._accounts) >= self._max_clients:
                self._forget_idle()
            if len(self._accounts) >= self._max_clients:
                return f"the server already serves {self._max_clients} clients (limits.clients on the server)"
            account = self._accounts[name] = _Account(lasting=name != client)
        account.seen = now
        account.clients.add(client)
        if account.requests >= self._max_requests:
            return f"{account.requests} requests of this client wait already (limits.client_requests on the server)"
        account.settle()
        # A client that owes nothing may always send one request: its size is bounded by limits.message_mib.
        if account.bytes + nbytes > self._max_bytes and not account.idle:
            return f"{account.bytes} bytes of this client are held already (limits.client_mib on the server)"
        if account.requests == 0:
            account.virtual = max(account.virtual, self._now)
        if not account.waiting:
            self._queue_up(name, account)
        account.waiting.setdefault(client, deque()).append((item, nbytes))
        account.requests += 1
        account.bytes += nbytes
        self._waiting += 1
        self.waiting_bytes += nbytes
        return None

    def _queue_up(self, name: bytes, account: _Account[T]) -> None:
        self._pushes += 1
        account.order = self._pushes
        self._ready[name] = account

    def pop(self) -> T | None:
        """The oldest request of the connection whose turn it is, of the account whose turn it is. It stays on the
        account until ``done``."""
        if not self._ready:
            return None
        if len(self._ready) == 1:
            name, account = next(iter(self._ready.items()))
        else:
            # Among equals, who came first or was served longest ago.
            name, account = min(self._ready.items(), key=lambda each: (each[1].virtual, each[1].order))
        self._now = max(self._now, account.virtual)
        client = next(iter(account.waiting))
        requests = account.waiting.pop(client)
        item, nbytes = requests.popleft()
        if requests:
            account.waiting[client] = requests  # behind the account's other connections
        del self._ready[name]
        if account.waiting:
            self._queue_up(name, account)
        self._waiting -= 1
        self.waiting_bytes -= nbytes
        return item

    def done(self, name: bytes, nbytes: int, cost: float = 0.0) -> None:
        """A popped request of ``nbytes`` has been answered, and has taken ``cost`` seconds of the server."""
        account = self._accounts[name]
        account.requests -= 1
        account.bytes -= nbytes
        account.virtual += cost
        self._forget_gone(name, account)

    def owe(self, name: bytes, client: bytes, nbytes: int, taken: Callable[[], bool]) -> None:
        """A reply holds ``nbytes`` of the server's memory until ``taken()``."""
        account = self._accounts.get(name)
        if account is None or client not in account.clients:
            return  # it has gone meanwhile, and its connection with what was queued for it
        account.settle()
        account.untaken.setdefault(client, deque()).append((taken, nbytes))
        account.bytes += nbytes

    def leave(self, name: bytes, client: bytes) -> None:
        """``client`` has gone: what it asked for and nobody works on is forgotten, and so is what it was sent."""
        account = self._accounts.get(name)
        if account is None:
            return
        waiting = account.waiting.pop(client, ())
        self._waiting -= len(waiting)
        account.requests -= len(waiting)
        nbytes = sum(nbytes for _, nbytes in waiting)
        self.waiting_bytes -= nbytes
        account.bytes -= nbytes + sum(nbytes for _, nbytes in account.untaken.pop(client, ()))
        if not account.waiting:
            self._ready.pop(name, None)
        account.clients.discard(client)
        self._forget_gone(name, account)

    def _forget_gone(self, name: bytes, account: _Account[T]) -> None:
        """Nothing is remembered of who has left, but the time that its key had more than others: it could come back for
        the same again."""
        if not account.clients and account.requests == 0 and not (account.lasting and account.virtual > self._now):
            del self._accounts[name]

    def forget_silent(self, before: float) -> int:
        """Forget the accounts that owe nothing and have sent nothing since ``before``; returns how many."""
        silent = 0
        for name, account in list(self._accounts.items()):
            account.settle()
            if account.idle and account.seen < before:
                del self._accounts[name]
                silent += 1
            else:
                self._forget_gone(name, account)
        return silent

    def _forget_idle(self) -> None:
        for name, account in list(self._accounts.items()):
            account.settle()
            if account.idle:
                del self._accounts[name]

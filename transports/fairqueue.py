"""Bounded queues, one per client, emptied in turn: what keeps one client from starving or filling a server.

A client is accounted for everything that it makes the server hold: requests that wait, requests that are being
computed, and replies that it has not taken yet. When that exceeds its bounds, the next request is refused; nothing is
ever dropped silently. No I/O and no locking here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Account(Generic[T]):
    __slots__ = ("bytes", "requests", "untaken", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[tuple[T, int]] = deque()
        self.requests = 0
        self.bytes = 0
        self.untaken: deque[tuple[Callable[[], bool], int]] = deque()

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
        self._turns: deque[bytes] = deque()
        self._waiting = 0
        self.waiting_bytes = 0

    def __len__(self) -> int:
        return self._waiting

    def push(self, client: bytes, item: T, nbytes: int) -> str | None:
        """Queue a request of ``nbytes``; returns None, or the reason why it is refused."""
        account = self._accounts.get(client)
        if account is None:
            if len(self._accounts) >= self._max_clients:
                self._forget_idle()
            if len(self._accounts) >= self._max_clients:
                return f"the server already serves {self._max_clients} clients (limits.clients on the server)"
            account = self._accounts[client] = _Account()
        if account.requests >= self._max_requests:
            return f"{account.requests} requests of this client wait already (limits.client_requests on the server)"
        account.settle()
        # A client that owes nothing may always send one request: its size is bounded by limits.message_mib.
        if account.bytes + nbytes > self._max_bytes and not account.idle:
            return f"{account.bytes} bytes of this client are held already (limits.client_mib on the server)"
        if not account.waiting:
            self._turns.append(client)
        account.waiting.append((item, nbytes))
        account.requests += 1
        account.bytes += nbytes
        self._waiting += 1
        self.waiting_bytes += nbytes
        return None

    def pop(self) -> T | None:
        """The oldest request of the client whose turn it is. It stays on the client's account until ``done``."""
        if not self._turns:
            return None
        client = self._turns.popleft()
        account = self._accounts[client]
        item, nbytes = account.waiting.popleft()
        if account.waiting:
            self._turns.append(client)
        self._waiting -= 1
        self.waiting_bytes -= nbytes
        return item

    def done(self, client: bytes, nbytes: int) -> None:
        """A popped request of ``nbytes`` has been answered."""
        account = self._accounts[client]
        account.requests -= 1
        account.bytes -= nbytes

    def owe(self, client: bytes, nbytes: int, taken: Callable[[], bool]) -> None:
        """A reply holds ``nbytes`` of the server's memory until ``taken()``."""
        account = self._accounts[client]
        account.settle()
        account.untaken.append((taken, nbytes))
        account.bytes += nbytes

    def _forget_idle(self) -> None:
        for client, account in list(self._accounts.items()):
            account.settle()
            if account.idle:
                del self._accounts[client]

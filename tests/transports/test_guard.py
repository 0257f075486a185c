"""Which growth of a server's memory is taken for a hostile peer's doing."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import zmq

from transports import guard
from transports.guard import Guard, Peer

MIB = 2**20
HELD = 64 * MIB


class Server:
    """A guard of which ``resident`` and ``held`` are what memory there is, and what is known to be held of it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.resident = self.held = 0
        self.guard = Guard(
            context,
            context.socket(zmq.ROUTER),
            max_clients=4,
            max_account_connections=4,
            max_account_bytes=256 * MIB,
            max_message_bytes=256 * MIB,
            max_unfinished_bytes=512 * MIB,
            keyed=False,
            hello_timeout_seconds=10,
            queued_messages=8,
            explained_bytes=lambda: self.held,
        )

    def judge(self, peer: Peer, unfinished: int) -> bool:
        """Whether ``peer`` keeps its connection."""
        peer.unfinished = unfinished
        self.guard._judge([peer], unfinished)
        return not peer.ended


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    made = Server(context)
    monkeypatch.setattr(guard, "resident_bytes", lambda: made.resident)
    yield made
    made.guard.close()
    context.destroy(linger=0)


@pytest.fixture
def peer() -> Iterator[Peer]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Peer(ours, 1, 1, "127.0.0.1:5", 0.0)


def test_a_reply_that_was_sent_explains_the_memory_that_is_not_free_yet(server: Server, peer: Peer) -> None:
    """The reply before is held when a large request begins to come, and sent when half of it has."""
    server.resident = server.held = HELD
    assert server.judge(peer, MIB)
    server.held = 0
    server.resident += HELD // 2
    assert server.judge(peer, MIB + HELD // 2)


def test_growth_that_no_bytes_explain_ends_a_connection(server: Server, peer: Peer) -> None:
    assert server.judge(peer, MIB)
    server.resident = guard.UNEXPLAINED_BYTES + MIB
    assert server.judge(peer, 2 * MIB)
    server.resident += 1
    assert not server.judge(peer, 2 * MIB)


def test_what_others_hold_by_now_explains_as_much(server: Server, peer: Peer) -> None:
    assert server.judge(peer, MIB)
    server.resident = server.held = HELD
    assert server.judge(peer, MIB)
    server.resident += guard.UNEXPLAINED_BYTES + 1
    assert not server.judge(peer, MIB)

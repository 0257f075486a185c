"""A request that nobody waits for: sent, and looked after now and then."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable

import pytest

import transports
from tests.transports.conftest import echo
from transports import ClientOptions, Incoming, Message, Reply, Server
from transports.errors import ConnectError, ConnectionLostError

NAMES = ("zmq", "pipelined")


def outcome(poll: Callable[[], Reply | None]) -> Reply:
    """What ``poll`` gives in the end; each look returns at once."""
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        before = time.perf_counter()
        reply = poll()
        assert time.perf_counter() - before < 2.0
        if reply is not None:
            return reply
        time.sleep(0.001)
    raise AssertionError("no reply and no error")


@pytest.mark.parametrize("name", NAMES)
def test_the_reply_is_there_in_the_end(name: str, serve: Callable[..., Server]) -> None:
    server = serve()
    with transports.connect(name, server.address) as client:
        poll = client.begin(Message([b"hello"])).poll
        assert client.pending_bytes == 5
        assert bytes(outcome(poll).frames[0]) == b"hello"
        assert client.pending_bytes == 0
        assert poll() is poll()
        # the connection is as good as any
        assert bytes(client.request(Message([b"more"])).frames[0]) == b"more"


def test_an_event_loop_takes_over_the_connection(serve: Callable[..., Server]) -> None:
    server = serve()
    with transports.connect("pipelined", server.address) as client:

        async def both() -> list[bytes]:
            poll = client.begin(Message([b"hello"])).poll
            while (reply := poll()) is None:
                await asyncio.sleep(0.001)
            more = await asyncio.gather(*(client.request_async(Message([b"%d" % number])) for number in range(20)))
            return [bytes(one.frames[0]) for one in (reply, *more)]

        assert asyncio.run(both()) == [b"hello", *(b"%d" % number for number in range(20))]


@pytest.mark.parametrize("name", NAMES)
def test_nobody_answers(name: str) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        options = ClientOptions(connect_timeout_seconds=0.1)
        with transports.connect(name, endpoint, options) as client:
            poll = client.begin(Message([b"x"]), timeout_seconds=60).poll
            assert poll() is None
            with pytest.raises(ConnectError):
                outcome(poll)
            with pytest.raises(ConnectError):
                poll()  # it stays so


@pytest.mark.parametrize("name", NAMES)
def test_the_connection_is_lost(name: str) -> None:
    with transports.listen("tcp://127.0.0.1:0") as server, transports.connect(name, server.address) as client:
        poll = client.begin(Message([b"x"])).poll
        assert server.next(10.0) is not None
        server.close()
        with pytest.raises(ConnectionLostError):
            outcome(poll)


def test_what_stands_in_line_is_pending_too(serve: Callable[..., Server]) -> None:
    looked = threading.Event()

    def answer(server: Server, incoming: Incoming) -> None:
        looked.wait(10.0)
        echo(server, incoming)

    server = serve(answer=answer)
    with transports.connect("pipelined", server.address, ClientOptions(window_requests=2)) as client:

        async def many() -> int:
            tasks = [asyncio.ensure_future(client.request_async(Message([bytes(10)]))) for _ in range(8)]
            await asyncio.sleep(0)
            pending = client.pending_bytes
            looked.set()
            await asyncio.gather(*tasks)
            return pending

        assert asyncio.run(many()) == 8 * 10  # more than the window
        assert client.pending_bytes == 0


def test_a_client_that_can_not_go_on_has_the_reply_at_once(serve: Callable[..., Server]) -> None:
    server = serve("inprocess://post")
    with transports.connect("inprocess", server.address) as client:
        reply = client.begin(Message([b"hello"])).poll()
        assert reply is not None
        assert bytes(reply.frames[0]) == b"hello"
        assert client.pending_bytes == 0

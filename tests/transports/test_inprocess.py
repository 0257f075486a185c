"""What only the in-process transport has; the rest is in test_round_trips."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

import transports
from tests.transports.conftest import ask_all
from transports import Message, Server, ServerOptions
from transports.errors import ConnectError, ConnectionLostError, LimitError


def test_frames_are_handed_over_without_a_copy(serve: Callable[..., Server]):
    seen: list[memoryview] = []

    def answer(server: Server, incoming: transports.Incoming) -> None:
        seen.extend(incoming.frames)
        server.reply(incoming, Message(incoming.frames))

    serve("inprocess://copy", answer)
    sent = bytearray(b"before")
    with transports.connect("inprocess", "inprocess://copy") as client:
        reply = client.request(Message([sent]))
    sent[:] = b"after!"
    assert bytes(seen[0]) == bytes(reply.frames[0]) == b"after!"


def test_no_server():
    with (
        transports.connect("inprocess", "inprocess://nobody") as client,
        pytest.raises(ConnectError, match="no server of this process"),
    ):
        client.request(Message([b"x"]))


def test_a_server_that_ends_with_a_request_in_hand():
    server = transports.listen("inprocess://ends")
    failed: list[Exception] = []

    def use() -> None:
        with transports.connect("inprocess", "inprocess://ends") as client:
            try:
                client.request(Message([b"x"]))
            except ConnectionLostError as error:
                failed.append(error)
            try:
                client.request(Message([b"x"]))
            except ConnectError as error:
                failed.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    incoming = server.next(10)
    assert incoming is not None
    server.close()
    thread.join(10)
    assert [type(error) for error in failed] == [ConnectionLostError, ConnectError]
    server.reply(incoming, Message([b"too late"]))


def test_a_client_of_a_server_that_has_been_replaced(serve: Callable[..., Server]):
    with transports.connect("inprocess", "inprocess://again") as client:
        first = transports.listen("inprocess://again")
        thread = threading.Thread(target=client.request, args=[Message([b"x"])])
        thread.start()
        incoming = first.next(10)
        assert incoming is not None
        first.reply(incoming, Message([b"y"]))
        thread.join(10)
        first.close()
        serve("inprocess://again")
        with pytest.raises(ConnectionLostError):
            client.request(Message([b"x"]))
        assert client.request(Message([b"x"])).frames


def test_the_bound_on_clients():
    with transports.listen("inprocess://few", ServerOptions(max_clients=1)) as server:
        first = threading.Thread(
            target=transports.connect("inprocess", "inprocess://few").request, args=[Message([b"x"])]
        )
        first.start()
        incoming = server.next(10)
        assert incoming is not None
        with (
            transports.connect("inprocess", "inprocess://few") as second,
            pytest.raises(LimitError, match=r"limits\.clients"),
        ):
            second.request(Message([b"x"]))
        server.reply(incoming, Message([b"y"]))
        first.join(10)


def test_clients_take_turns():
    with transports.listen("inprocess://turns") as server:
        clients = [transports.connect("inprocess", "inprocess://turns") for _ in range(3)]
        threads = [threading.Thread(target=ask_all, args=[client, [Message([b"x"])] * 5]) for client in clients]
        for thread in threads:
            thread.start()
        served: list[bytes] = []
        for _ in range(15):
            incoming = server.next(10)
            assert incoming is not None
            served.append(incoming.client)
            server.reply(incoming, Message([b"y"]))
        for thread in threads:
            thread.join(10)
        assert all(served.count(client) == 5 for client in set(served))
        assert len(set(served)) == 3

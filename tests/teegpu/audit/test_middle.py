"""Whatever a client can be asked for goes through the middle, and is otherwise as it was."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from teegpu.audit.capture import Capture
from teegpu.audit.middle import Middle, Switch
from teegpu.endpoints import Endpoint
from transports import connect, listen
from transports.base import Buffer, Client, Message, Reply, Server

ADDRESS = "inprocess://audited"


class Turned(Middle):
    """Sends each request with a letter more, and gives each reply in capitals."""

    def up(self, address: str, frames: Sequence[Buffer]) -> Sequence[Buffer]:
        assert address == ADDRESS
        return [bytes(frame) + b"!" for frame in frames]

    def down(self, address: str, request: Sequence[Buffer], reply: Reply) -> list[memoryview]:
        assert bytes(request[0]).endswith(b"!")
        return [memoryview(bytes(frame).upper()) for frame in reply.frames]


@dataclass(slots=True)
class Marked(Message):
    mark: int = 0


@pytest.fixture
def switch() -> Switch:
    return Switch()


@pytest.fixture
def client(switch: Switch) -> Iterator[Client]:
    import threading

    server: Server = listen(ADDRESS)

    def serve() -> None:
        while (incoming := server.next()) is not None:
            server.reply(incoming, Message([b"got " + bytes(frame) for frame in incoming.frames]))

    thread = threading.Thread(target=serve)
    thread.start()
    with switch(Endpoint(ADDRESS), connect("inprocess", ADDRESS)) as wrapped:
        yield wrapped
    server.wake()
    thread.join()
    server.close()


def text(reply: Reply | None) -> bytes:
    assert reply is not None
    return bytes(reply.frames[0])


def test_every_way_to_ask_goes_through_it(client: Client, switch: Switch) -> None:
    switch.middle = Turned()
    assert text(client.request(Message([b"one"]))) == b"GOT ONE!"
    assert text(client.begin(Message([b"two"])).poll()) == b"GOT TWO!"
    assert text(client.begin(Message([b"so"])).wait()) == b"GOT SO!"

    async def ask() -> Reply:
        return await client.request_async(Message([b"three"]))

    assert text(asyncio.run(ask())) == b"GOT THREE!"


def test_what_a_client_is_stays_visible(client: Client) -> None:
    assert (client.name, client.overlaps, client.endpoint, client.pending_bytes) == ("inprocess", False, ADDRESS, 0)


def test_a_capture_keeps_requests_in_the_order_in_which_they_were_sent(client: Client, switch: Switch) -> None:
    capture = switch.middle = Capture(1000)
    for capture.scene, frame in (("first", b"one"), ("second", b"two"), ("second", b"three")):
        client.request(Message([frame]))
    assert capture.servers == [ADDRESS]
    kept = [exchange.request for exchange in capture.of(ADDRESS, "second")]
    assert kept == [(bytearray(b"two"),), (bytearray(b"three"),)]
    assert [exchange.bytes_down for exchange in capture.of(ADDRESS)] == [7, 7, 9]


def test_a_capture_that_is_full_counts_on(client: Client, switch: Switch) -> None:
    capture = switch.middle = Capture(5)
    for frame in (b"1234", b"5678", b"9"):
        client.request(Message([frame]))
    assert [exchange.request is None for exchange in capture.of(ADDRESS)] == [False, True, False]
    assert capture.left_out == 1

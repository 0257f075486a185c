"""A server that sends what nobody can use, against the clients: bounded in memory, and ended in time."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.transports.conftest import Peer, Script
from transports import ClientOptions, Message, connect, envelope
from transports.dealer import MAX_STRAYS
from transports.errors import FrameError, ReplyTimeoutError
from transports.inflow import Inflow, received_bytes

MIB = 2**20
OPTIONS = ClientOptions(connect_timeout_seconds=5.0, reply_timeout_seconds=10.0, max_message_bytes=8 * MIB)
TRANSPORTS = ("zmq", "pipelined")

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER"


@pytest.fixture
def endless() -> Iterator[Callable[[bytes], str]]:
    """``endless(data)`` → the address of a ZMTP server that answers the first request with ``data`` again and again."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()
    threads: list[threading.Thread] = []

    def start(data: bytes) -> str:
        def run() -> None:
            peer, _ = listener.accept()
            peer.settimeout(5.0)
            with peer, contextlib.suppress(OSError):
                peer.sendall(GREETING + b"\x04" + bytes([len(READY)]) + READY)
                seen = b""
                while b"hello" not in seen:
                    seen += peer.recv(65536)
                while not over.is_set():
                    peer.sendall(data)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return f"tcp://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    over.set()
    listener.close()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "data",
    [b"\x03" + MIB.to_bytes(8, "big") + bytes(MIB), b"\x01\x00" * 32768],
    ids=["large frames", "empty frames"],
)
def test_a_message_without_end_is_not_gathered(data: bytes, transport: str, endless: Callable[[bytes], str]) -> None:
    process = psutil.Process()
    address = endless(data)
    with connect(transport, address, OPTIONS) as client:
        before, started = process.memory_info().rss, time.monotonic()
        with pytest.raises(FrameError, match="more than the answer to all that it was asked"):
            client.request(Message([b"hello"], max_reply_bytes=65536))
        assert time.monotonic() - started < 5.0
        assert process.memory_info().rss - before < 192 * MIB


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_what_a_slow_reply_brings_is_counted_from_the_last_message(
    transport: str, scripted: Callable[..., str]
) -> None:
    """Many large replies are no flood: each of them is what was asked for."""

    def script(peer: Peer) -> None:
        for _ in range(8):
            client, head, _ = peer.receive()
            number = envelope.peek_request_id(head)
            assert number is not None
            peer.send(client, envelope.pack(number, [4 * MIB]), bytes(4 * MIB))

    with connect(transport, scripted(script), OPTIONS) as client:
        for _ in range(8):
            reply = client.request(Message([b"hello"], max_reply_bytes=4 * MIB))
            assert reply.frames[0].nbytes == 4 * MIB


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_reply_larger_than_it_can_be_is_refused(transport: str, scripted: Callable[[Script], str]) -> None:
    def script(peer: Peer) -> None:
        client, head, _ = peer.receive()
        number = envelope.peek_request_id(head)
        assert number is not None
        peer.send(client, envelope.pack(number, [2000]), bytes(2000))

    with (
        connect(transport, scripted(script), OPTIONS) as client,
        pytest.raises(FrameError, match="a reply of 2000 bytes, where 1000 at most can be right"),
    ):
        client.request(Message([b"hello"], max_reply_bytes=1000))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_replies_to_nothing_do_not_keep_a_client_beyond_its_time(
    transport: str, scripted: Callable[[Script], str]
) -> None:
    def script(peer: Peer) -> None:
        client, _, _ = peer.receive()
        for number in range(2 * MAX_STRAYS):
            peer.send(client, envelope.pack(10**6 + number, [1]), b"x")

    with connect(transport, scripted(script), OPTIONS) as client:
        with pytest.raises(FrameError, match="what nobody asked"):
            client.request(Message([b"hello"]))
        assert client.dropped_replies == MAX_STRAYS + 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_late_replies_are_owed(transport: str, scripted: Callable[[Script], str]) -> None:
    """What a request that timed out still brings is no flood, however large."""
    asked = threading.Event()

    def script(peer: Peer) -> None:
        held = [peer.receive() for _ in range(2)]
        asked.wait(10.0)
        for client, head, _ in held:
            number = envelope.peek_request_id(head)
            assert number is not None
            peer.send(client, envelope.pack(number, [4 * MIB]), bytes(4 * MIB))

    with connect(transport, scripted(script), OPTIONS) as client:
        message = Message([b"hello"], max_reply_bytes=4 * MIB)
        # By an explicit limit the first exchange does not count as an attempt to connect.
        with pytest.raises(ReplyTimeoutError):
            client.request(message, timeout_seconds=0.2)
        asked.set()
        assert client.request(message).frames[0].nbytes == 4 * MIB
        assert client.dropped_replies == 1  # type: ignore[attr-defined]


def test_bytes_are_counted_from_the_last_whole_message() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        inflow = Inflow()
        assert (inflow.counts, inflow.unfinished()) == (False, 0)
        inflow.connected(near.fileno())
        far.sendall(bytes(1000))
        while received_bytes(near) != 1000:  # nobody has read them: they do not count yet
            assert received_bytes(near) == 0
            near.recv(1000)
        assert (inflow.counts, inflow.unfinished()) == (True, 1000)
        inflow.settle()
        assert inflow.unfinished() == 0
        far.sendall(bytes(10))
        assert len(near.recv(10)) == 10
        assert inflow.unfinished() == 10
        inflow.close()
        inflow.close()
        assert inflow.unfinished() == 0
        far.close()


def test_over_ipc_nothing_is_counted() -> None:
    near, far = socket.socketpair()
    with near, far:
        inflow = Inflow()
        inflow.connected(near.fileno())
        assert not inflow.counts
    inflow.connected(10**6)  # it has gone already
    assert not inflow.counts

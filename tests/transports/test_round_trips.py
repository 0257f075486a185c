"""What every transport has in common, over every kind of address."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import transports
from tests.transports.conftest import ask_all
from transports import Client, ClientOptions, FrameKind, Message, Server, ServerOptions
from transports.errors import ConnectionLostError, LimitError, ReplyTimeoutError

Serve = Callable[..., Server]
ZMQ_NAMES = tuple(name for name in transports.names() if name != "inprocess")
_numbers = itertools.count()


@pytest.fixture(
    params=[*(("tcp", name) for name in ZMQ_NAMES), ("ipc", "zmq"), ("ipc", "pipelined"), ("in", "inprocess")]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """(transport, address to listen on)"""
    kind, name = request.param
    if kind == "tcp":
        return name, "tcp://127.0.0.1:0"
    return name, f"ipc://{tmp_path}/socket" if kind == "ipc" else f"inprocess://test-{next(_numbers)}"


def do(client: Client, message: Message) -> transports.Reply:
    """One awaited request, whether the client needs an event loop or not."""

    async def main() -> transports.Reply:
        return await client.request_async(message)

    if client.overlaps:
        return asyncio.run(main())
    with pytest.raises(StopIteration) as stopped:
        main().send(None)
    reply: transports.Reply = stopped.value.value
    return reply


@pytest.mark.parametrize("sizes", [[], [0], [1], [0, 7, 0], [65535, 65536, 65537], [5_000_000, 3], [100] * 64])
def test_frames_come_back_as_they_went(serve: Serve, place: tuple[str, str], sizes: list[int]):
    name, address = place
    server = serve(address)
    frames = [bytes([index % 251]) * size for index, size in enumerate(sizes)]
    with transports.connect(name, server.address) as client:
        for reply in (client.request(Message(frames)), do(client, Message(frames)), client.request(Message(frames))):
            assert [bytes(frame) for frame in reply.frames] == frames
            assert reply.bytes_up + reply.up.raw_bytes - reply.up.compressed_bytes >= sum(sizes)
            assert reply.bytes_down + reply.down.raw_bytes - reply.down.compressed_bytes >= sum(sizes)
            assert reply.sent_ns < reply.received_ns


def test_64_megabytes(serve: Serve, place: tuple[str, str]):
    name, address = place
    server = serve(address)
    payload = bytearray(64_000_000)
    payload[::64_000] = bytes(range(250)) * 4
    with transports.connect(name, server.address) as client:
        assert client.request(Message([b"head", payload])).frames[1] == payload
        assert do(client, Message([b"head", payload])).frames[1] == payload


def test_any_buffer_can_be_sent(serve: Serve, place: tuple[str, str]):
    name, address = place
    server = serve(address)
    grid = memoryview(bytearray(range(12))).cast("B", (3, 4))
    wide = memoryview(bytearray(8)).cast("d")
    with transports.connect(name, server.address) as client:
        reply = client.request(Message([grid, wide, memoryview(b"")], [FrameKind("x", 1)] * 3))
        assert [bytes(frame) for frame in reply.frames] == [bytes(range(12)), bytes(8), b""]
        with pytest.raises(TypeError):
            client.request(Message([memoryview(bytearray(8))[::2]]))
        assert bytes(client.request(Message([b"fine"])).frames[0]) == b"fine"


def test_received_frames_may_be_written_to(serve: Serve, place: tuple[str, str]):
    name, address = place
    seen: list[bool] = []

    def check(server: Server, incoming: transports.Incoming) -> None:
        seen.append(incoming.frames[0].readonly)
        server.reply(incoming, Message(incoming.frames))

    server = serve(address, check)
    with transports.connect(name, server.address) as client:
        assert not client.request(Message([bytearray(100)])).frames[0].readonly
        assert not do(client, Message([bytearray(100_000)])).frames[0].readonly
    assert seen == [False, False]


def test_request_all_keeps_the_order(serve: Serve, place: tuple[str, str]):
    name, address = place
    server = serve(address)
    messages = [Message([str(index).encode()]) for index in range(100)]
    with transports.connect(name, server.address, ClientOptions(window_requests=16)) as client:
        replies = ask_all(client, messages)
    assert [bytes(reply.frames[0]) for reply in replies] == [str(index).encode() for index in range(100)]


def test_our_own_limits_are_kept_before_anything_is_sent(serve: Serve, place: tuple[str, str]):
    name, address = place
    server = serve(address)
    with transports.connect(name, server.address, ClientOptions(max_message_bytes=10_000, max_frames=3)) as client:
        with pytest.raises(LimitError, match=r"limits\.message_mib"):
            client.request(Message([bytes(5_000), bytes(5_001)]))
        with pytest.raises(LimitError, match=r"limits\.frames"):
            do(client, Message([b""] * 4))
        assert len(client.request(Message([bytes(10_000)])).frames[0]) == 10_000


def test_a_reply_over_the_limits_fails_and_the_client_goes_on(serve: Serve, place: tuple[str, str]):
    name, address = place

    def answer(server: Server, incoming: transports.Incoming) -> None:
        server.reply(incoming, Message([bytes(600)] * int(bytes(incoming.frames[0]))))

    server = serve(address, answer)
    with transports.connect(name, server.address, ClientOptions(max_message_bytes=1000)) as client:
        with pytest.raises(LimitError):
            client.request(Message([b"2"]))
        assert client.request(Message([b"1"])).bytes_down >= 600


def test_the_servers_limits_come_back_as_a_refusal(serve: Serve, place: tuple[str, str]):
    name, address = place
    server = serve(address, options=ServerOptions(max_message_bytes=1000, max_frames=2))
    with transports.connect(name, server.address) as client:
        with pytest.raises(LimitError, match="refused"):
            client.request(Message([bytes(600), bytes(600)]))
        with pytest.raises(LimitError, match="refused"):
            client.request(Message([b"", b"", b""]))
        assert client.request(Message([b"ok"])).frames


def test_a_late_reply_is_dropped_and_counted(serve: Serve, place: tuple[str, str]):
    name, address = place
    may_answer = threading.Event()

    def answer(server: Server, incoming: transports.Incoming) -> None:
        if bytes(incoming.frames[0]) == b"slow":
            may_answer.wait(10)
        server.reply(incoming, Message(incoming.frames))

    server = serve(address, answer)
    with transports.connect(name, server.address, ClientOptions(reply_timeout_seconds=0.05)) as client:
        client.request(Message([b"first"]), timeout_seconds=10)
        with pytest.raises(ReplyTimeoutError, match=r"0\.05 s \(link\.reply_timeout_seconds\)") as caught:
            client.request(Message([b"slow"]))
        assert caught.value.retryable
        may_answer.set()
        assert bytes(client.request(Message([b"next"]), timeout_seconds=10).frames[0]) == b"next"
        assert client.dropped_replies == 1  # type: ignore[attr-defined]


def test_a_reply_over_the_servers_own_limits_can_be_answered_otherwise(serve: Serve, place: tuple[str, str]):
    name, address = place

    def answer(server: Server, incoming: transports.Incoming) -> None:
        with pytest.raises(LimitError):
            server.reply(incoming, Message([bytes(2000)]))
        server.reply(incoming, Message([b"sorry"]))
        with pytest.raises(ValueError, match="once"):
            server.reply(incoming, Message([b"again"]))

    server = serve(address, answer, ServerOptions(max_message_bytes=1000))
    with transports.connect(name, server.address) as client:
        assert bytes(client.request(Message([b"?"])).frames[0]) == b"sorry"


def test_close_twice_and_use_after(serve: Serve, place: tuple[str, str]):
    name, address = place
    server = serve(address)
    client = transports.connect(name, server.address)
    client.request(Message([b"x"]))
    client.close()
    client.close()
    with pytest.raises(ConnectionLostError, match="closed"):
        client.request(Message([b"x"]))


def test_wake_and_time_out_of_next(place: tuple[str, str]):
    _, address = place
    with transports.listen(address) as server:
        assert server.next(0) is None
        assert server.next(0.01) is None
        server.wake()
        assert server.next() is None
        threading.Timer(0.02, server.wake).start()
        assert server.next(10) is None
        server.close()
        server.close()


def test_several_clients_at_once_get_their_own_replies(serve: Serve, place: tuple[str, str]):
    name, address = place
    server = serve(address)
    failures: list[str] = []

    def use(number: int) -> None:
        with transports.connect(name, server.address) as client:
            for turn in range(30):
                sent = [f"{number}-{turn}".encode(), bytes(1000 * number)]
                if [bytes(frame) for frame in client.request(Message(sent)).frames] != sent:
                    failures.append(f"client {number}, turn {turn}")

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []

"""The server against clients that are many, fast, broken or gone."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

import transports
from tests.transports.conftest import ask_all
from transports import ClientOptions, Message, Server, ServerOptions, envelope
from transports.errors import LimitError
from transports.router import RouterServer

Serve = Callable[..., Server]


@pytest.fixture
def raw() -> Iterator[Callable[[str], zmq.Socket[bytes]]]:
    """``raw(address)`` → a bare DEALER socket connected to it."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    kept: list[zmq.Socket[bytes]] = []

    def connect(address: str) -> zmq.Socket[bytes]:
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.RCVTIMEO, 10_000)
        dealer.connect(address)
        kept.append(dealer)
        return dealer

    yield connect
    context.destroy(linger=0)


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.perf_counter() + seconds
    pause = threading.Event()
    while not condition():
        if time.perf_counter() > deadline:
            return False
        pause.wait(0.001)
    return True


def request(request_id: int, *frames: bytes) -> list[bytes]:
    return [envelope.pack(request_id, [len(frame) for frame in frames]), *frames]


def take(server: Server) -> transports.Incoming:
    incoming = server.next(10)
    assert incoming is not None
    return incoming


def test_requests_wait_in_turn_between_clients(raw: Callable[[str], zmq.Socket[bytes]]):
    with RouterServer("tcp://127.0.0.1:0", ServerOptions()) as server:
        greedy, modest = raw(server.address), raw(server.address)
        for index in range(6):
            greedy.send_multipart(request(index, b"greedy"))
        first = take(server)
        for index in range(2):
            modest.send_multipart(request(index, b"modest"))
        assert eventually(lambda: len(server._queue) == 7)
        order = [bytes(take(server).frames[0]) for _ in range(4)]
        assert bytes(first.frames[0]) == b"greedy"
        assert sorted(order) == [b"greedy"] * 2 + [b"modest"] * 2


def test_arrival_is_stamped_while_the_caller_computes(raw: Callable[[str], zmq.Socket[bytes]]):
    with RouterServer("tcp://127.0.0.1:0", ServerOptions()) as server:
        dealer = raw(server.address)
        dealer.send_multipart(request(1, b"first"))
        take(server)
        sent_ns = time.perf_counter_ns()
        dealer.send_multipart(request(2, b"second"))
        assert eventually(lambda: len(server._queue) == 1)  # read by the I/O thread: nobody is in next()
        asked_ns = time.perf_counter_ns()
        second = take(server)
        assert sent_ns < second.arrived_ns < asked_ns


def test_the_io_thread_wakes_when_quick_lock_step_ends(raw: Callable[[str], zmq.Socket[bytes]]):
    with RouterServer("tcp://127.0.0.1:0", ServerOptions()) as server:
        dealer = raw(server.address)
        woken: list[transports.Incoming] = []

        def answer_quickly() -> None:
            for _ in range(100):
                incoming = take(server)
                server.reply(incoming, Message(incoming.frames))
            woken.append(take(server))

        thread = threading.Thread(target=answer_quickly)
        thread.start()
        for index in range(100):
            dealer.send_multipart(request(index, b"quick"))
            dealer.recv_multipart()
        dealer.send_multipart(request(100, bytes(100_000)))
        thread.join(10)
        # The large request is in hand now, so what comes next has to be read by the I/O thread.
        dealer.send_multipart(request(101, b"next"))
        assert eventually(lambda: len(server._queue) == 1)


def test_the_excess_over_a_clients_bound_is_refused_and_the_rest_served(serve: Serve):
    gate = threading.Event()

    def answer(server: Server, incoming: transports.Incoming) -> None:
        gate.wait(10)
        server.reply(incoming, Message(incoming.frames))

    server = serve(answer=answer, options=ServerOptions(max_client_requests=4))
    assert isinstance(server, RouterServer)
    with transports.connect("pipelined", server.address, ClientOptions(window_requests=32)) as client:
        outcome: list[BaseException] = []

        def use() -> None:
            try:
                ask_all(client, [Message([b"x"])] * 6)
            except LimitError as error:
                outcome.append(error)

        thread = threading.Thread(target=use)
        thread.start()
        assert eventually(lambda: server.refused == 2)
        gate.set()
        thread.join(10)
        assert "limits.client_requests" in str(outcome[0])
        assert client.request(Message([b"x"])).frames


def test_bytes_held_for_a_client_are_bounded(raw: Callable[[str], zmq.Socket[bytes]]):
    with RouterServer("tcp://127.0.0.1:0", ServerOptions(max_client_bytes=1_000_000)) as server:
        dealer = raw(server.address)
        for index in range(4):
            dealer.send_multipart(request(index, bytes(400_000)))
        take(server)
        assert eventually(lambda: server.refused == 2)
        answers = [dealer.recv_multipart() for _ in range(2)]
        assert all(b"limits.client_mib" in reason for _, reason in answers)
        assert [envelope.peek_request_id(head) for head, _ in answers] == [2, 3]


def test_clients_are_bounded(raw: Callable[[str], zmq.Socket[bytes]]):
    with RouterServer("tcp://127.0.0.1:0", ServerOptions(max_clients=2)) as server:
        dealers = [raw(server.address) for _ in range(3)]
        held = []
        for dealer in dealers[:2]:
            dealer.send_multipart(request(1, b"x"))
            held.append(take(server))
        dealers[2].send_multipart(request(1, b"x"))
        assert server.next(0.2) is None
        assert b"limits.clients" in dealers[2].recv_multipart()[1]
        server.reply(held[0], Message([b"done"]))
        dealers[2].send_multipart(request(2, b"x"))
        assert bytes(take(server).frames[0]) == b"x"


def test_reading_pauses_when_too_much_waits_and_goes_on(raw: Callable[[str], zmq.Socket[bytes]]):
    options = ServerOptions(max_client_bytes=1_000_000, max_message_bytes=1_000_000)
    with RouterServer("tcp://127.0.0.1:0", options) as server:
        dealers = [raw(server.address) for _ in range(6)]
        for dealer in dealers:
            dealer.send_multipart(request(1, bytes(900_000)))
        assert eventually(lambda: server._paused)
        assert server._queue.waiting_bytes <= 3_000_000
        for _ in dealers:
            incoming = take(server)
            server.reply(incoming, Message([b"done"]))
        for dealer in dealers:
            assert dealer.recv_multipart()[1] == b"done"


def test_a_client_that_is_gone_harms_nobody(serve: Serve, raw: Callable[[str], zmq.Socket[bytes]]):
    with RouterServer("tcp://127.0.0.1:0", ServerOptions()) as server:
        gone = raw(server.address)
        gone.send_multipart(request(1, b"x"))
        incoming = take(server)
        gone.close(linger=0)

        def undelivered() -> bool:
            probe = raw(server.address)
            probe.send_multipart(request(1, b"probe"))
            reply_to = take(server)
            server.reply(reply_to, Message([b"y"]))
            return probe.recv_multipart()[1] == b"y"

        assert undelivered()
        server.reply(incoming, Message([bytes(1_000_000)]))
        assert undelivered()


def test_a_client_that_never_reads_is_bounded(raw: Callable[[str], zmq.Socket[bytes]]):
    options = ServerOptions(max_client_bytes=4_000_000)
    with RouterServer("tcp://127.0.0.1:0", options) as server:
        deaf = raw(server.address)
        deaf.setsockopt(zmq.RCVHWM, 1)
        served = 0
        for index in range(200):
            deaf.send_multipart(request(index, b"more"))
            incoming = server.next(0.2)
            if incoming is None:
                break
            server.reply(incoming, Message([bytes(1_000_000)]))
            served += 1
        assert server.refused > 0
        # What zmq and the kernel hold for it on both ends comes on top of the bound, and is itself bounded.
        assert served < 100
        server.close(drain_seconds=0)


def test_malformed_messages_are_answered_where_they_can_be(raw: Callable[[str], zmq.Socket[bytes]], serve: Serve):
    server = serve()
    assert isinstance(server, RouterServer)
    dealer = raw(server.address)
    good = request(7, b"hello")
    with transports.connect("zmq", server.address) as client:
        for malformed in ([b""], [b"garbage", b"x"], [b"x" * 24], [b""] * 50):
            dealer.send_multipart(malformed)
            assert client.request(Message([b"ok"])).frames
        assert eventually(lambda: server.malformed == 4)
        for malformed, says in (
            ([good[0], b"hell"], b"claims 5 bytes and holds 4"),
            ([good[0]], b"announces 1 frames"),
            ([good[0][:20]], b"20 bytes"),
            ([good[0][:4] + b"\x07" + good[0][5:], b"hello"], b"version 7"),
        ):
            dealer.send_multipart(malformed)
            head, reason = dealer.recv_multipart()
            assert envelope.peek_request_id(head) == 7
            assert says in reason
            assert client.request(Message([b"ok"])).frames
        dealer.send_multipart(good)
        assert dealer.recv_multipart()[1] == b"hello"
        dealer.send_multipart([envelope.pack(8, [2**40], [envelope.ZSTD]), b"bomb"])
        head, reason = dealer.recv_multipart()
        assert b"limits.message_mib" in reason


def test_garbage_on_the_port_while_a_client_goes_on(serve: Serve):
    server = serve()
    host, port = server.address.removeprefix("tcp://").split(":")
    noise = random.Random(0)
    greeting = bytes.fromhex("ff00000000000000017f03004e554c4c") + bytes(48)
    with transports.connect("pipelined", server.address) as client:
        client.request(Message([b"x"]))
        for index in range(30):
            with socket.create_connection((host, int(port))) as peer:
                start = greeting[: noise.randrange(len(greeting))] if index % 2 else b""
                peer.sendall(start + noise.randbytes(noise.randrange(1, 3000)))
                assert client.request(Message([b"ok", bytes(index)]), timeout_seconds=10).frames
        assert client.dropped_replies == 0  # type: ignore[attr-defined]


def test_close_sends_what_is_queued_and_refuses_what_waits(raw: Callable[[str], zmq.Socket[bytes]]):
    server = RouterServer("tcp://127.0.0.1:0", ServerOptions())
    dealer = raw(server.address)
    dealer.send_multipart(request(1, b"answered"))
    dealer.send_multipart(request(2, b"waiting"))
    incoming = take(server)
    assert eventually(lambda: len(server._queue) == 1)
    server.reply(incoming, Message([bytes(20_000_000)]))
    server.close()
    assert len(dealer.recv_multipart()[1]) == 20_000_000
    head, _ = dealer.recv_multipart()
    assert envelope.unpack(head, [18], max_frames=1, max_message_bytes=99).refusal == envelope.REFUSED_CLOSING


def test_close_waits_no_longer_than_it_is_told(raw: Callable[[str], zmq.Socket[bytes]]):
    server = RouterServer("tcp://127.0.0.1:0", ServerOptions())
    with socket.create_connection(tuple(server.address.removeprefix("tcp://").split(":"))):  # type: ignore[arg-type]
        deaf = raw(server.address)
        deaf.setsockopt(zmq.RCVHWM, 1)
        for index in range(12):
            deaf.send_multipart(request(index, b"x"))
            server.reply(take(server), Message([bytes(5_000_000)]))
        started = time.perf_counter()
        server.close(drain_seconds=0.2)
        assert time.perf_counter() - started < 2.0


def test_a_signal_handler_may_wake(serve: Serve):
    import signal

    with transports.listen("tcp://127.0.0.1:0") as server:
        previous = signal.signal(signal.SIGUSR1, lambda *_: server.wake())
        timer = threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGUSR1])
        timer.start()
        try:
            assert server.next(10) is None
        finally:
            timer.join()
            signal.signal(signal.SIGUSR1, previous)


def test_a_message_that_a_signal_handler_cut_short_is_skipped(raw: Callable[[str], zmq.Socket[bytes]]):
    with RouterServer("tcp://127.0.0.1:0", ServerOptions()) as server:
        dealer = raw(server.address)
        with server._lock:  # so that the I/O thread does not read
            dealer.send_multipart(request(1, b"cut", b"short"))
            assert server._socket.poll(10_000)
            server._mid_message = True
            server._socket.recv()  # the client's id only, as if an exception had come next
        dealer.send_multipart(request(2, b"whole"))
        assert bytes(take(server).frames[0]) == b"whole"


def test_a_reply_that_a_signal_handler_cut_short_harms_only_its_client(raw: Callable[[str], zmq.Socket[bytes]]):
    with RouterServer("tcp://127.0.0.1:0", ServerOptions()) as server:
        dealers = [raw(server.address) for _ in range(2)]
        held = []
        for dealer in dealers:
            dealer.send_multipart(request(1, b"x"))
            held.append(take(server))
        with server._lock:
            server._mid_send = True
            server._socket.send(held[0].client, zmq.SNDMORE)  # as if an exception had come next
        server.reply(held[1], Message([b"whole"]))
        assert dealers[1].recv_multipart()[1] == b"whole"
        assert dealers[0].recv_multipart() == [b""]
        server._mid_send = True  # as if it had come after the last frame
        server.reply(held[0], Message([b"whole"]))
        assert dealers[0].recv_multipart()[1] == b"whole"


def test_many_clients_overlap_without_losing_a_request(serve: Serve):
    server = serve()
    replies: list[int] = []

    def use() -> None:
        with transports.connect("pipelined", server.address, ClientOptions(window_requests=8)) as client:
            messages = [Message([bytes(100 * index)]) for index in range(200)]
            replies.append(sum(len(reply.frames[0]) for reply in ask_all(client, messages)))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert replies == [sum(100 * index for index in range(200))] * 4


def test_a_reply_says_how_long_the_server_had_it(serve: Serve):
    def answer(server: Server, incoming: transports.Incoming) -> None:
        time.sleep(0.05)
        server.reply(incoming, Message(incoming.frames))

    server = serve(answer=answer)
    for name in ("zmq", "pipelined"):
        with transports.connect(name, server.address) as client:
            reply = client.request(Message([b"x"]))
            assert 50_000_000 <= reply.server_ns <= reply.received_ns - reply.sent_ns

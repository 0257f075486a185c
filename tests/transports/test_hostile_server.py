"""A server that sends what nobody can use, against the clients: bounded in memory, and ended in time."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.hostile import CutLine
from tests.transports.conftest import Peer, Script
from transports import Client, ClientOptions, Message, Server, connect, envelope
from transports.dealer import MAX_STRAYS
from transports.errors import ConnectionLostError, FrameError, ReplyTimeoutError
from transports.inflow import Inflow
from transports.sockets import received_bytes

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


class Flooder:
    """A ZMTP server that answers the first request with ``first``, and then sends ``data`` again and again, as soon as
    ``flood`` is set; without ``data`` it ends the connection. ``accepted`` counts connections, ``ended`` tells that one
    of them has ended."""

    def __init__(self, first: bytes, data: bytes, *, handshake: bytes = b"\x04" + bytes([len(READY)]) + READY) -> None:
        self._first, self._data, self._handshake = first, data, handshake
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.accepted = 0
        self.flood, self.ended, self._over = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._listener.accept()
                self.accepted += 1
                peer.settimeout(10.0)
                with peer, contextlib.suppress(OSError):
                    self._serve(peer)
                self.ended.set()

    def _serve(self, peer: socket.socket) -> None:
        peer.sendall(GREETING + self._handshake)
        if self._first:
            seen = b""
            while b"hello" not in seen:
                seen += peer.recv(65536)
            peer.sendall(self._first)
        self.flood.wait(10.0)
        while self._data and not self._over.wait(0.002):  # half a GB a second at most
            peer.sendall(self._data)

    def close(self) -> None:
        self._over.set()
        self.flood.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


ANSWER = b"\x01" + bytes([len(HEAD := envelope.pack(1, [2]))]) + HEAD + b"\x00\x02ok"
LARGE_FRAMES = b"\x03" + MIB.to_bytes(8, "big") + bytes(MIB)
EMPTY_FRAMES = b"\x01\x00" * 32768
SMALL_FRAMES = b"\x01\x03abc" * 16384


@contextlib.contextmanager
def grows_by_less_than(most: int) -> Iterator[None]:
    """The memory of this process, at any moment within the block."""
    process, over, peak = psutil.Process(), threading.Event(), 0

    def look() -> None:
        nonlocal peak
        while not over.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    before = process.memory_info().rss
    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert peak - before < most, f"it grew by {(peak - before) / MIB:.0f} MiB"


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("data", [EMPTY_FRAMES, SMALL_FRAMES], ids=["empty", "of three bytes"])
def test_small_frames_within_what_was_asked(data: bytes, transport: str) -> None:
    """64 MiB of them are a reply of the size that was asked for, and take 2 GiB in zmq, or 0.8."""
    options = ClientOptions(connect_timeout_seconds=5.0, reply_timeout_seconds=30.0)
    with (
        contextlib.closing(Flooder(b"\x01\x00", data)) as server,
        connect(transport, server.address, options) as client,
    ):
        server.flood.set()
        # Or it is seen late, on a busy machine, and by then more has come than was asked for.
        found = "takes far more memory than it has bytes|more than the answer to all that it was asked"
        with grows_by_less_than(320 * MIB), pytest.raises((ConnectionLostError, FrameError), match=found):
            client.request(Message([b"hello"], max_reply_bytes=64 * MIB))


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("data", [LARGE_FRAMES, EMPTY_FRAMES], ids=["large", "empty"])
def test_a_message_without_end_while_nobody_waits(data: bytes, transport: str) -> None:
    """The client is idle, as it is while its user thinks: nothing of ours would call it."""
    with (
        contextlib.closing(Flooder(ANSWER, data)) as server,
        connect(transport, server.address, OPTIONS) as client,
        grows_by_less_than(320 * MIB),
    ):
        assert bytes(client.request(Message([b"hello"])).frames[0]) == b"ok"
        server.flood.set()
        assert server.ended.wait(10.0), "nobody ends it"
        with pytest.raises(FrameError, match="more than the answer to all that it was asked"):
            client.request(Message([b"hello"]))


def test_a_message_without_end_while_the_user_computes() -> None:
    """A request is in flight, and nobody looks whether its reply has come."""
    with (
        contextlib.closing(Flooder(ANSWER, LARGE_FRAMES)) as server,
        connect("pipelined", server.address, OPTIONS) as client,
        grows_by_less_than(320 * MIB),
    ):
        client.request(Message([b"hello"]))
        sent = client.begin(Message([b"hello"], max_reply_bytes=MIB))
        server.flood.set()
        assert server.ended.wait(10.0), "nobody ends it"
        with pytest.raises(FrameError, match="more than the answer to all that it was asked"):
            sent.wait()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_handshake_without_end(transport: str) -> None:
    """zmq takes in as much for a command as a message may have."""
    begun = b"\x06" + (8 * MIB).to_bytes(8, "big")
    with (
        contextlib.closing(Flooder(b"", bytes(MIB), handshake=begun)) as server,
        connect(transport, server.address, OPTIONS) as client,
        grows_by_less_than(320 * MIB),
    ):
        server.flood.set()
        with pytest.raises(FrameError, match="more than the answer to all that it was asked"):
            client.request(Message([b"hello"], max_reply_bytes=MIB))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_lost_connection_is_not_replaced_behind_our_back(transport: str) -> None:
    """What came over one that zmq made by itself, nobody would look after."""
    server = Flooder(ANSWER, b"")
    with contextlib.closing(server), connect(transport, server.address, OPTIONS) as client:
        client.request(Message([b"hello"]))
        server.flood.set()
        assert server.ended.wait(10.0)
        assert not connects_again(server)
        with pytest.raises(ConnectionLostError):
            client.request(Message([b"hello"]))


def connects_again(server: Flooder) -> bool:
    """Whether a second connection comes within the time in which zmq would make several."""
    deadline = time.monotonic() + 0.5
    while server.accepted == 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    return server.accepted > 1


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nothing_is_taken_from_a_connection_that_was_cut(
    transport: str, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was in the kernel's buffer then is thrown away, so the bytes of two replies may look like one."""
    server = serve()
    with connect(transport, server.address, OPTIONS) as client:
        client.request(Message([b"hello"]))
        inflow = client._connection.inflow  # type: ignore[attr-defined]
        monkeypatch.setattr(inflow, "excess", "sends a reply that takes far more memory than it has bytes")
        with pytest.raises(ConnectionLostError, match="takes far more memory than it has bytes, and was disconnected"):
            client.request(Message([b"hello"]))
        assert client.request(Message([b"hello"])).frames  # over a new one


def test_a_process_that_grows_while_a_reply_comes_slowly(scripted: Callable[[Script], str]) -> None:
    """Its own work is no sign of harm."""

    def script(peer: Peer) -> None:
        client, head, _ = peer.receive()
        number = envelope.peek_request_id(head)
        assert number is not None
        peer.send(client, envelope.pack(number, [4 * MIB]), bytes(4 * MIB))

    line = CutLine(scripted(script), cut=MIB, stall=True)
    with contextlib.closing(line), connect("pipelined", line.address, OPTIONS) as client:
        sent = client.begin(Message([b"hello"], max_reply_bytes=4 * MIB), timeout_seconds=1.0)
        grown = [bytes(b"x" * MIB) for _ in range(200)]
        with pytest.raises(ReplyTimeoutError):
            sent.wait()
        del grown


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
        inflow = Inflow(())
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


def test_a_thread_that_has_ended_keeps_nobody_from_looking() -> None:
    """One of ours that began, and ended, beside zmq's: without a look, nothing would be bounded any more."""
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert thread.native_id is not None
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        with far:
            inflow = Inflow((thread.native_id,))
            inflow.connected(near.fileno())
            inflow.awaited_bytes = MIB
            far.sendall(bytes(100_000))
            while inflow.unfinished() < 100_000:
                near.recv(100_000)
            inflow.look()
            inflow.look()
            assert inflow.counts
            inflow.close()


def test_clients_that_begin_at_once_have_threads_of_their_own(serve: Callable[[], Server]) -> None:
    address = serve().address
    with contextlib.ExitStack() as stack:
        clients: list[Client] = []
        begin = threading.Barrier(8)

        def connected() -> None:
            begin.wait(10)
            clients.append(connect("zmq", address, OPTIONS))

        threads = [threading.Thread(target=connected) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client in clients:
            stack.callback(client.close)
        found = [thread for client in clients for thread in vars(client)["_threads"]]
        assert len(found) == len(set(found)) >= len(clients)


def test_over_ipc_nothing_is_counted() -> None:
    near, far = socket.socketpair()
    with near, far:
        inflow = Inflow(())
        inflow.connected(near.fileno())
        assert not inflow.counts
    inflow.connected(10**6)  # it has gone already
    assert not inflow.counts

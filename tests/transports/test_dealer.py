"""What can go wrong for a client of the zmq transports, lock-step and overlapping alike."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import transports
from tests.transports.conftest import free_port
from transports import Client, ClientOptions, Message, Server, envelope
from transports.compression import Compressor
from transports.dealer import CompressedLockStepClient
from transports.errors import ConnectError, ConnectionLostError, FrameError, LimitError, ReplyTimeoutError

BLOCKING = ("zmq", "pipelined")


@pytest.fixture(params=BLOCKING)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def reply_to(parts: list[bytes], *frames: bytes) -> list[bytes]:
    """The parts of a correct reply to the request ``parts``."""
    request_id = envelope.peek_request_id(parts[1])
    assert request_id is not None
    return [parts[0], envelope.pack(request_id, [len(frame) for frame in frames]), *frames]


# ---- no server, lost server


def test_no_server(name: str):
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    with transports.connect(name, endpoint, ClientOptions(connect_timeout_seconds=0.1)) as client:
        started = time.perf_counter()
        with pytest.raises(ConnectError, match=rf"at {endpoint} within 0\.1 s: connection refused, .*serve --bind"):
            client.request(Message([b"x"]))
        assert time.perf_counter() - started < 10.0  # the connection is older than this clock


def test_no_server_whatever_the_request_allows(name: str):
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    with transports.connect(name, endpoint, ClientOptions(connect_timeout_seconds=0.1)) as client:
        with pytest.raises(ConnectError):
            client.request(Message([b"x"]), timeout_seconds=60)
        with pytest.raises(ConnectError):
            client.request(Message([b"x"]), timeout_seconds=0.05)


def test_a_server_that_comes_later_is_found_and_gets_nothing_stale(name: str, serve: Callable[..., Server]):
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    received: list[bytes] = []

    def answer(server: Server, incoming: transports.Incoming) -> None:
        received.append(bytes(incoming.frames[0]))
        server.reply(incoming, Message(incoming.frames))

    with transports.connect(name, endpoint, ClientOptions(connect_timeout_seconds=0.1)) as client:
        with pytest.raises(ConnectError):
            client.request(Message([b"stale"]))
        serve(endpoint, answer)
        client.request(Message([b"fresh"]), timeout_seconds=10)
    assert received == [b"fresh"]


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_a_reply_that_came_before_the_server_closed_is_read(name: str, scheme: str, tmp_path: Path):
    """As that to the last request of a server that was told to end, whose client looks a little late."""
    with (
        transports.listen("tcp://127.0.0.1:0" if scheme == "tcp" else f"ipc://{tmp_path}/gpu") as server,
        transports.connect(name, server.address) as client,
    ):
        sent = client.begin(Message([b"x"]))
        incoming = server.next(10)
        assert incoming is not None
        server.reply(incoming, Message([bytes(100_000)]))
        server.close()
        time.sleep(0.1)  # the end of the connection has come, too
        assert sum(map(len, sent.wait().frames)) == 100_000


def test_a_server_that_is_started_while_we_wait(name: str, serve: Callable[..., Server]):
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    timer = threading.Timer(0.1, serve, [endpoint])
    timer.start()
    started = time.monotonic()
    with transports.connect(name, endpoint) as client:
        assert client.request(Message([b"x"])).frames
    assert time.monotonic() - started < 8.0, "it slept until the time to connect was over"
    timer.join()


def test_something_else_listens_there(name: str):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def speak() -> None:
            listener.settimeout(5)
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                peer.sendall(b"SSH-2.0-OpenSSH_9.2\r\n" * 10)
                peer.close()

        thread = threading.Thread(target=speak)
        thread.start()
        endpoint = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with (
            transports.connect(name, endpoint, ClientOptions(connect_timeout_seconds=0.3)) as client,
            pytest.raises(ConnectError, match="no server answers"),
        ):
            client.request(Message([b"x"]))
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


SERVER_THAT_DIES = """
import os, sys, transports
server = transports.listen(sys.argv[1])
print(server.address, flush=True)
server.reply(first := server.next(), transports.Message(first.frames))
server.next()
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def mortal() -> Iterator[Callable[[str], str]]:
    """``mortal(address)`` → the address of a server process that answers once, and is killed by its second request."""
    processes: list[subprocess.Popen[str]] = []

    def start(address: str) -> str:
        command = [sys.executable, "-c", SERVER_THAT_DIES, address]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        return process.stdout.readline().strip()

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=10)
        assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("kind", ["tcp", "ipc"])
def test_a_server_killed_in_mid_request(name: str, kind: str, mortal: Callable[[str], str], tmp_path: Path):
    address = mortal("tcp://127.0.0.1:0" if kind == "tcp" else f"ipc://{tmp_path}/socket")
    with transports.connect(name, address) as client:
        client.request(Message([b"x"]))
        started = time.perf_counter()
        with pytest.raises(ConnectionLostError, match="with 1 request in flight"):
            client.request(Message([b"x"]))
        assert time.perf_counter() - started < 2.0


def test_a_connection_lost_while_idle_is_told_once_then_opened_anew(name: str, serve: Callable[..., Server]):
    address = f"tcp://127.0.0.1:{free_port()}"
    with transports.connect(name, address) as client:
        with transports.listen(address) as first:
            thread = threading.Thread(target=client.request, args=[Message([b"x"])])
            thread.start()
            incoming = first.next(10)
            assert incoming is not None
            first.reply(incoming, Message([b"y"]))
            thread.join(10)
        serve(address)
        with pytest.raises(ConnectionLostError) as caught:
            # The loss may be noticed before or after the request is sent, but it is always told.
            client.request(Message([b"x"]))
        assert caught.value.retryable
        assert client.request(Message([b"x"])).frames


def test_an_oversized_request_ends_the_connection_not_the_server(name: str, serve: Callable[..., Server]):
    server = serve(options=transports.ServerOptions(max_message_bytes=100_000))
    with transports.connect(name, server.address) as good, transports.connect(name, server.address) as bad:
        good.request(Message([b"x"]))
        with pytest.raises(ConnectionLostError, match=r"limits\.message_mib"):
            bad.request(Message([bytes(200_000)]))
        assert good.request(Message([b"x"])).frames
        assert bad.request(Message([b"x"])).frames


def test_close_while_in_flight(name: str, scripted: Callable[..., str]):
    arrived = threading.Event()
    address = scripted(lambda peer: (peer.receive(), arrived.set()))
    client = transports.connect(name, address)
    failed: list[BaseException] = []

    def use() -> None:
        try:
            client.request(Message([b"x"]), timeout_seconds=0.2)
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    assert arrived.wait(10)
    thread.join(10)
    started = time.perf_counter()
    client.close()
    assert time.perf_counter() - started < 1.0
    assert isinstance(failed[0], ReplyTimeoutError)


# ---- a hostile or broken server


def test_duplicate_reordered_and_unknown_replies(name: str, scripted: Callable[..., str]):
    def script(peer: object) -> None:
        first = peer.receive()  # type: ignore[attr-defined]
        peer.send(*reply_to(first, b"first"))  # type: ignore[attr-defined]
        peer.send(*reply_to(first, b"first again"))  # type: ignore[attr-defined]
        peer.send(first[0], envelope.pack(10**6, [1]), b"?")  # type: ignore[attr-defined]
        second = peer.receive()  # type: ignore[attr-defined]
        peer.send(*reply_to(first, b"first once more"))  # type: ignore[attr-defined]
        peer.send(*reply_to(second, b"second"))  # type: ignore[attr-defined]

    with transports.connect(name, scripted(script)) as client:
        assert bytes(client.request(Message([b"1"])).frames[0]) == b"first"
        assert bytes(client.request(Message([b"2"])).frames[0]) == b"second"
        assert client.dropped_replies == 3  # type: ignore[attr-defined]


def test_a_reply_for_a_request_that_was_never_made_comes_alone(name: str, scripted: Callable[..., str]):
    def script(peer: object) -> None:
        parts = peer.receive()  # type: ignore[attr-defined]
        peer.send(parts[0], envelope.pack(10**6, []))  # type: ignore[attr-defined]

    with transports.connect(name, scripted(script)) as client:
        with pytest.raises(ReplyTimeoutError, match="the limit given for this request"):
            client.request(Message([b"1"]), timeout_seconds=0.2)
        assert client.dropped_replies == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda parts: [*parts[:2], b"shorter"], "claims 5 bytes and holds 7"),
        (lambda parts: parts[:2], "announces 1 frames, 0 came"),
        (lambda parts: [parts[0], parts[1][:30], parts[2]], "30 bytes for 1 frames"),
        (lambda parts: [parts[0], parts[1][:4] + b"\x09" + parts[1][5:], parts[2]], "version 9"),
        (lambda parts: [parts[0], parts[1][:24] + b"\x01" + parts[1][25:], parts[2]], "compressed frames"),
    ],
)
def test_a_reply_that_breaks_the_framing(
    name: str, scripted: Callable[..., str], damage: Callable[..., list[bytes]], says: str
):
    def script(peer: object) -> None:
        peer.send(*damage(reply_to(peer.receive(), b"hello")))  # type: ignore[attr-defined]
        peer.send(*reply_to(peer.receive(), b"hello"))  # type: ignore[attr-defined]

    with transports.connect(name, scripted(script)) as client:
        with pytest.raises(FrameError, match=says):
            client.request(Message([b"1"]))
        assert bytes(client.request(Message([b"2"])).frames[0]) == b"hello"


def test_garbage_instead_of_a_reply_ends_the_connection(name: str, scripted: Callable[..., str]):
    def script(peer: object) -> None:
        parts = peer.receive()  # type: ignore[attr-defined]
        peer.send(parts[0], b"HTTP/1.1 400 Bad Request")  # type: ignore[attr-defined]
        peer.send(*reply_to(peer.receive(), b"hello"))  # type: ignore[attr-defined]

    with transports.connect(name, scripted(script)) as client:
        with pytest.raises(FrameError, match="not a reply"):
            client.request(Message([b"1"]))
        assert bytes(client.request(Message([b"2"])).frames[0]) == b"hello"


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        (envelope.REFUSED_LIMIT, LimitError),
        (envelope.REFUSED_FRAMING, FrameError),
        (envelope.REFUSED_CLOSING, ConnectionLostError),
    ],
)
def test_refusals(name: str, scripted: Callable[..., str], refusal: int, error: type[Exception]):
    def script(peer: object) -> None:
        parts = peer.receive()  # type: ignore[attr-defined]
        request_id = envelope.peek_request_id(parts[1])
        peer.send(parts[0], *envelope.pack_refusal(request_id, refusal, "for \x1b[31mthis\nreason"))  # type: ignore[attr-defined]

    with (
        transports.connect(name, scripted(script)) as client,
        pytest.raises(error, match=r"for \?\[31mthis\?reason"),
    ):
        client.request(Message([b"1"]))


def test_a_reply_time_out_names_its_setting(name: str, scripted: Callable[..., str]):
    def script(peer: object) -> None:
        peer.send(*reply_to(peer.receive(), b"hello"))  # type: ignore[attr-defined]
        peer.receive()  # type: ignore[attr-defined]

    options = ClientOptions(reply_timeout_seconds=0.1)
    with transports.connect(name, scripted(script), options) as client:
        client.request(Message([b"1"]))
        with pytest.raises(ReplyTimeoutError, match=r"within 0\.1 s \(link\.reply_timeout_seconds\)"):
            client.request(Message([b"2"]))


def test_an_interrupt_while_waiting_leaves_a_usable_client(name: str, scripted: Callable[..., str]):
    def script(peer: object) -> None:
        first = peer.receive()  # type: ignore[attr-defined]
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        second = peer.receive()  # type: ignore[attr-defined]
        peer.send(*reply_to(first, b"late"))  # type: ignore[attr-defined]
        peer.send(*reply_to(second, b"hello"))  # type: ignore[attr-defined]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with transports.connect(name, scripted(script), ClientOptions(spin_seconds=0)) as client:
            with pytest.raises(KeyboardInterrupt):
                client.request(Message([b"1"]))
            assert bytes(client.request(Message([b"2"])).frames[0]) == b"hello"
    finally:
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.alone
def test_it_polls_only_while_answers_come_as_quickly_as_that(name: str, scripted: Callable[..., str]):
    looks: list[int] = []
    wait_seconds = [0.0, 0.2, 0.2, 0.0, 0.0]

    def script(peer: object) -> None:
        for seconds in wait_seconds:
            request = peer.receive()  # type: ignore[attr-defined]
            time.sleep(seconds)
            peer.send(*reply_to(request, b"answer"))  # type: ignore[attr-defined]

    with transports.connect(name, scripted(script), ClientOptions(spin_seconds=0.1)) as client:
        connection = client._connection  # type: ignore[attr-defined]
        honest = connection.readable

        def readable() -> bool:
            looks[-1] += 1
            return bool(honest())

        connection.readable = readable
        for _ in wait_seconds:
            looks.append(0)
            client.request(Message([b"question"]))
    # The second is slow, which nobody could know; in the third it sleeps, and after it until one is quick again.
    assert looks[1] > 100 > looks[2]
    assert looks[3] < 100


# ---- compression


def test_both_directions_are_compressed_when_the_client_measures_a_slow_link(serve: Callable[..., Server]):
    server = serve()
    message = Message([b"head", bytes(100_000)])
    with CompressedLockStepClient(server.address, ClientOptions()) as client:
        client._bandwidth.observe(100_000, 0.1)
        reply = client.request(message)
    assert [bytes(frame) for frame in reply.frames] == list(message.frames)
    assert reply.up.raw_bytes == reply.down.raw_bytes == 100_000
    assert reply.bytes_up < 5000
    assert reply.bytes_down < 5000


def test_a_raw_client_gets_raw_replies(serve: Callable[..., Server], name: str):
    server = serve()
    with transports.connect(name, server.address) as client:
        assert client.request(Message([bytes(100_000)])).bytes_down > 100_000


def test_corrupt_compressed_data_from_a_client_is_refused(scripted: Callable[..., str], serve: Callable[..., Server]):
    server = serve()

    class Corrupting(Compressor):
        def compress(self, frames, kinds):  # type: ignore[no-untyped-def]
            return (
                [b"not zstd"] * len(frames),
                [envelope.ZSTD] * len(frames),
                [1] * len(frames),
                transports.Compression(),
            )

    bad = CompressedLockStepClient(server.address, ClientOptions())
    bad._compressor = Corrupting(1, lambda: 1.0)
    with bad, transports.connect("zmq", server.address) as good:
        for _ in range(3):
            with pytest.raises(FrameError, match="could not read the request"):
                bad.request(Message([bytes(5000)]))
            assert good.request(Message([b"x"])).frames


def test_no_descriptor_and_no_thread_is_left_behind(serve: Callable[..., Server], name: str):
    server = serve()

    def use() -> None:
        client: Client
        with transports.connect(name, server.address) as client:
            client.request(Message([bytes(200_000)]))

    use()  # pyzmq starts a thread of its own with the first large frame, and keeps it
    before = sorted(path.name for path in Path("/proc/self/fd").iterdir()), set(threading.enumerate())
    for _ in range(10):
        use()
    # The server's ends close when its own thread has noticed.
    deadline = time.perf_counter() + 5
    while time.perf_counter() < deadline:
        after = sorted(path.name for path in Path("/proc/self/fd").iterdir()), set(threading.enumerate())
        if len(after[0]) <= len(before[0]) and after[1] <= before[1]:
            break
        threading.Event().wait(0.01)
    assert len(after[0]) <= len(before[0])
    assert after[1] <= before[1]

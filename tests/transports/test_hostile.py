"""A server against clients that mean harm: its memory stays bounded, and whoever means well is served meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import transports
from transports import Message, ServerOptions, envelope
from transports.errors import BadAddressError, ConnectionLostError
from transports.router import RouterServer

MIB = 2**20
DEADLINE_SECONDS = 30.0
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
READY = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
MORE, LARGE = 1, 2


class Server:
    """The echo server of ``hostileserver``."""

    def __init__(self, address: str = "tcp://127.0.0.1:0", **options: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.transports.hostileserver", json.dumps(options), address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()

    @property
    def place(self) -> tuple[str, int]:
        host, port = self.address.removeprefix("tcp://").split(":")
        return host, int(port)

    @property
    def resident(self) -> int:
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def peak(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    @property
    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self._process.pid}/fd").iterdir()))

    @property
    def load(self) -> dict[str, int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        found: dict[str, int] = json.loads(self._process.stdout.readline())
        return found

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        if self._process.poll() == -signal.SIGKILL:
            self._process.communicate()
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        code = self._process.wait(DEADLINE_SECONDS)
        self._process.stdout.close()
        assert code == 0


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:

        def make(address: str = "tcp://127.0.0.1:0", **options: float) -> Server:
            server = Server(address, **options)
            stack.callback(server.close)
            return server

        yield make


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def greet(server: Server, ready: bytes = READY) -> socket.socket:
    """A connection whose ZMTP handshake is done, as zmq's own DEALER does it."""
    peer = socket.create_connection(server.place)
    peer.settimeout(DEADLINE_SECONDS)
    peer.sendall(GREETING)
    take(peer, 64)
    peer.sendall(b"\x04" + bytes([len(ready)]) + ready)
    kind, length = take(peer, 2)
    assert kind == 4
    take(peer, length)
    return peer


def take(peer: socket.socket, count: int) -> bytes:
    got = b""
    while len(got) < count:
        part = peer.recv(count - len(got))
        assert part, "the connection ended"
        got += part
    return got


def frame(data: bytes, *, more: bool = False) -> bytes:
    if len(data) < 256:
        return bytes([MORE * more, len(data)]) + data
    return bytes([MORE * more | LARGE]) + struct.pack(">Q", len(data)) + data


def request(number: int, *frames: bytes) -> list[bytes]:
    return [envelope.pack(number, [len(each) for each in frames]), *frames]


def message(number: int, *frames: bytes) -> bytes:
    parts = request(number, *frames)
    return b"".join(frame(part, more=index < len(parts) - 1) for index, part in enumerate(parts))


def pour(peer: socket.socket, blob: bytes, times: int) -> bool:
    """Sends ``blob`` so often; whether the other side ended the connection before that."""
    try:
        for _ in range(times):
            peer.sendall(blob)
    except (BrokenPipeError, ConnectionResetError):
        return True
    return False


def ended(peer: socket.socket) -> bool:
    """Waits for the end of a connection over which nothing is to be read."""
    try:
        while peer.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def well(client: transports.Client) -> None:
    assert bytes(client.request(Message([b"well"]), timeout_seconds=DEADLINE_SECONDS).frames[0]) == b"well"


# Messages without end


@pytest.mark.parametrize("known", [False, True], ids=["stranger", "client"])
def test_small_frames_without_end(start: Callable[..., Server], known: bool) -> None:
    """20 million frames of 2 bytes each, all of one message, would take 1.2 GiB in zmq."""
    server = start()
    with transports.connect("zmq", server.address) as client:
        well(client)
        before = server.peak
        with greet(server) as peer:
            if known:
                peer.sendall(message(1, b"hello"))
                take(peer, 1)
            assert pour(peer, frame(b"", more=True) * 100_000, 200), "the connection is ended"
        well(client)
        until(lambda: server.load["connections"] == 1, "it still knows the connection")
        assert server.load["ended"] == 1
        assert server.peak - before < 160 * MIB


def test_a_hundred_thousand_small_frames_that_do_not_go_on(start: Callable[..., Server]) -> None:
    """Too few for the server to mind their memory: the time-out for hello is what ends them."""
    server = start(hello_timeout_seconds=0.5)
    before = server.peak
    with greet(server) as peer:
        assert not pour(peer, frame(b"", more=True) * 100_000, 1)
        assert ended(peer)
    assert server.peak - before < 64 * MIB


def test_many_at_once(start: Callable[..., Server]) -> None:
    server = start()
    with transports.connect("zmq", server.address) as client, contextlib.ExitStack() as stack:
        well(client)
        before = server.peak
        peers = [stack.enter_context(greet(server)) for _ in range(40)]
        blob = frame(b"", more=True) * 10_000
        left = set(range(len(peers)))
        for _ in range(300):
            left -= {index for index in left if pour(peers[index], blob, 1)}
        assert not left, "all of them are ended"
        well(client)
        assert server.peak - before < 160 * MIB


def test_large_frames_without_end(start: Callable[..., Server]) -> None:
    """Each frame is as large as a message may be; all of them together are what the guard counts."""
    server = start(max_message_bytes=4 * MIB, max_client_bytes=8 * MIB)
    with transports.connect("zmq", server.address) as client:
        well(client)
        before = server.peak
        with greet(server) as peer:
            assert pour(peer, frame(bytes(MIB), more=True), 4000), "the connection is ended"
        well(client)
        assert server.peak - before < 64 * MIB


def test_a_message_with_far_too_many_frames_is_refused_and_the_server_goes_on(start: Callable[..., Server]) -> None:
    server = start()
    with transports.connect("zmq", server.address) as client:
        well(client)
        before = server.peak
        with greet(server) as peer:
            peer.sendall(frame(request(7, b"x")[0], more=True) + frame(b"", more=True) * 50_000 + frame(b""))
            header, length = take(peer, 2)
            assert header == MORE
            assert envelope.peek_request_id(take(peer, length)) == 7
        well(client)
        assert server.peak - before < 64 * MIB


# Connections


def test_connections_that_say_nothing_are_ended(start: Callable[..., Server]) -> None:
    server = start(hello_timeout_seconds=0.5)
    with transports.connect("zmq", server.address) as client:
        well(client)
        descriptors = server.descriptors
        with contextlib.ExitStack() as stack:
            mute = [stack.enter_context(socket.create_connection(server.place)) for _ in range(30)]
            greeted = [stack.enter_context(greet(server)) for _ in range(30)]
            for peer in [*mute, *greeted]:
                peer.settimeout(DEADLINE_SECONDS)
                assert ended(peer)
        until(lambda: server.descriptors == descriptors, "descriptors are left")
        well(client)  # it has said something, and may be silent for as long as it likes
    assert server.load["ended"] >= 30


def test_more_connections_than_clients_are_allowed(start: Callable[..., Server]) -> None:
    """Those that have said nothing make room, the oldest first: a client finds its way in through a flood of them."""
    server = start(max_clients=2)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(greet(server)) for _ in range(80)]
        assert ended(silent[0])
        with transports.connect("zmq", server.address) as client:
            well(client)
        assert server.load["connections"] <= 2 + 64 + 1


def test_what_is_remembered_of_a_silent_client_is_forgotten_and_it_may_come_back(start: Callable[..., Server]) -> None:
    server = start(idle_timeout_seconds=0.1)
    with transports.connect("zmq", server.address) as client:
        well(client)
        assert server.load["connections"] == 1
        until(lambda: server.load["clients"] == 0, "it is still remembered")
        well(client)
        assert server.load["clients"] == 1


def test_who_has_left_is_forgotten_at_once(start: Callable[..., Server]) -> None:
    server = start()
    for _ in range(3):
        with transports.connect("zmq", server.address) as client:
            well(client)
    until(lambda: server.load["clients"] == server.load["connections"] == 0, "they are still remembered")


# Replies


def test_clients_that_never_read(start: Callable[..., Server]) -> None:
    """Each could make the server hold 4 MiB of replies and what zmq holds beside them; the largest are ended."""
    server = start(max_client_bytes=4 * MIB)
    with transports.connect("zmq", server.address) as client, contextlib.ExitStack() as stack:
        well(client)
        before = server.resident
        for _ in range(20):
            deaf = stack.enter_context(socket.socket())
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(server.place)
            deaf.settimeout(DEADLINE_SECONDS)
            deaf.sendall(GREETING + b"\x04" + bytes([len(READY)]) + READY)
            pour(deaf, b"".join(message(number, b"grow") for number in range(40)), 4)
        until(lambda: server.load["waiting_requests"] == 0, "requests wait")
        well(client)
        assert server.resident - before < 64 * MIB


def test_a_flood_of_refusals_that_nobody_reads(start: Callable[..., Server]) -> None:
    server = start()
    with transports.connect("zmq", server.address) as client, greet(server) as peer:
        well(client)
        before = server.peak
        wrong = message(1, b"x").replace(b"tgE\x00\x01", b"tgE\x00\x09")
        pour(peer, wrong * 1000, 60)
        well(client)
        assert server.peak - before < 64 * MIB


def test_a_slow_sender_is_not_taken_for_a_hostile_one(start: Callable[..., Server]) -> None:
    """8 MiB in small steps, while another client makes the server's memory grow."""
    server = start()
    with transports.connect("zmq", server.address) as other, greet(server) as peer:
        content = os.urandom(8 * MIB)
        whole = message(5, content)
        for start_of in range(0, len(whole), MIB):
            peer.sendall(whole[start_of : start_of + MIB])
            other.request(Message([bytes(6 * MIB)]))
        header, length = take(peer, 2)
        assert header == MORE
        assert envelope.peek_request_id(take(peer, length)) == 5
        assert server.load["ended"] == 0


def over_ipc(path: Path) -> socket.socket:
    """A connection that has said no more than zmq's own first words."""
    peer = socket.socket(socket.AF_UNIX)
    peer.settimeout(DEADLINE_SECONDS)
    peer.connect(str(path))
    peer.sendall(GREETING)
    take(peer, 64)
    return peer


def test_over_ipc_connections_are_counted_too(start: Callable[..., Server], tmp_path: Path) -> None:
    """Those that say nothing make room, and are ended in time; who has said something is left alone."""
    server = start(f"ipc://{tmp_path}/socket", max_clients=2, hello_timeout_seconds=1.0)
    with transports.connect("zmq", server.address) as client, contextlib.ExitStack() as stack:
        well(client)
        for _ in range(80):
            stack.enter_context(over_ipc(tmp_path / "socket"))
        well(client)
        until(lambda: server.load["connections"] <= 2 + 64, "more connections are left")
        until(lambda: server.load["connections"] == 1, "they are left")
        well(client)


def test_over_ipc_the_longest_idle_makes_room(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start(f"ipc://{tmp_path}/socket", max_clients=2)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(transports.connect("zmq", server.address)) for _ in range(3)]
        for client in (clients[0], clients[1], clients[0], clients[2], clients[0]):
            well(client)
        assert (server.load["connections"], server.load["ended"]) == (2, 1)
        with pytest.raises(ConnectionLostError):
            well(clients[1])


# After a crash


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_a_killed_server_s_address_can_be_taken_at_once(
    start: Callable[..., Server], scheme: str, tmp_path: Path
) -> None:
    """With a client still connected; and what the killed one left behind is not in the way, unless somebody listens."""
    first = start(f"ipc://{tmp_path}/gpu" if scheme == "ipc" else "tcp://127.0.0.1:0")
    with transports.connect("zmq", first.address) as client:
        well(client)
        first.kill()
        second = start(first.address)
        assert second.address == first.address
        with transports.connect("zmq", second.address) as other:
            well(other)
            with pytest.raises(BadAddressError, match=r"another (server|program) listens there"):
                transports.listen(first.address)
            well(other)


FIRST_NAME = 0x6B8B4567
"""What C's ``rand`` says first where nobody has seeded it, of glibc."""


def test_names_that_zmq_would_give_to_others(start: Callable[..., Server]) -> None:
    """zmq's own are a zero and a number that counts up; it ends the process where the next one's is taken."""
    server = start()
    with contextlib.ExitStack() as stack:
        for ahead in range(32):
            name = b"\x00" + struct.pack(">I", FIRST_NAME + ahead)
            identity = b"\x08Identity" + struct.pack(">I", len(name)) + name
            peer = stack.enter_context(greet(server, READY + identity))
            peer.sendall(message(1, b"x"))
        for _ in range(8):
            well(stack.enter_context(transports.connect("zmq", server.address)))


def test_no_two_servers_begin_with_the_same_name() -> None:
    """Also where something in the process had C's ``rand`` begin at a place that is known."""
    names = []
    for _ in range(2):
        ctypes.CDLL(None).srand(7)
        with (
            RouterServer("tcp://127.0.0.1:0", ServerOptions()) as server,
            transports.connect("zmq", server.address) as client,
        ):
            sent = client.begin(Message([b"x"]))
            incoming = server.next(DEADLINE_SECONDS)
            assert incoming is not None
            names.append(incoming.client)
            server.reply(incoming, Message([b"x"]))
            sent.wait()
    assert names[0] != names[1]

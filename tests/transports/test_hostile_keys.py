"""A server with keys against who has none, and against one key that wants more than its share."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import zmq

import transports
from tests.transports.keyed import GREETING, UP, Relay, SealedDealer
from tests.transports.test_hostile import MIB, Server, greet, message, pour, request, take, until, well
from transports import Client, ClientOptions, Incoming, Message, ServerOptions, security
from transports.errors import AuthenticationError, ConnectionLostError, TransportError
from transports.router import RouterServer
from transports.security import ClientKeys, KeyPair, ServerKeys

LARGE_COMMAND = 6
Raw = Callable[..., SealedDealer]


@dataclass(frozen=True)
class Keys:
    server: KeyPair
    clients: dict[str, KeyPair]
    folder: Path

    def of(self, name: str) -> ClientOptions:
        return ClientOptions(keys=ClientKeys(self.clients[name], self.server.public))

    @property
    def keys(self) -> ServerKeys:
        return ServerKeys(self.server, self.folder)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """Those of a server, and of alice and mallory, who are both allowed."""
    made = Keys(security.new_pair(), {name: security.new_pair() for name in ("alice", "mallory")}, tmp_path / "clients")
    made.folder.mkdir()
    for name, pair in made.clients.items():
        path = made.folder / f"{name}.pub"
        path.write_text(pair.public.text)
        path.chmod(0o644)
    return made


@pytest.fixture
def start(keys: Keys) -> Iterator[Callable[..., Server]]:
    """``start(**options)`` → an echo server with keys, in a process of its own."""
    with contextlib.ExitStack() as stack:

        def make(**options: float) -> Server:
            server = Server(**options, keys=(keys.server.secret.hex(), str(keys.folder)))
            stack.callback(server.close)
            return server

        yield make


@pytest.fixture
def raw(keys: Keys) -> Iterator[Raw]:
    """``raw(server.address, name)`` → a bare DEALER socket with the key of ``name``."""
    with zmq.Context() as context:
        made: list[SealedDealer] = []

        def connect(address: str, name: str) -> SealedDealer:
            made.append(SealedDealer(context, address, ClientKeys(keys.clients[name], keys.server.public)))
            return made[-1]

        yield connect
        for dealer in made:
            dealer.close()


# Before anybody has proved to have a key


def stranger(server: Server) -> socket.socket:
    peer = socket.create_connection(server.place)
    peer.settimeout(30.0)
    peer.sendall(GREETING)
    take(peer, 64)
    return peer


def test_a_large_command_in_place_of_a_handshake(start: Callable[..., Server], keys: Keys) -> None:
    """zmq itself would take in as much as a message may have, and keep it until the handshake's time is over."""
    server = start()
    with transports.connect("zmq", server.address, keys.of("alice")) as client, contextlib.ExitStack() as stack:
        well(client)
        before = server.peak
        for _ in range(3):
            peer = stack.enter_context(stranger(server))
            peer.sendall(bytes([LARGE_COMMAND]) + struct.pack(">Q", 1024 * MIB))
            assert pour(peer, bytes(MIB), 512), "the connection is ended"
        well(client)
        # Of three times 512 MiB, or more: what comes on loopback until the guard looks, on a machine that is busy.
        assert server.peak - before < 768 * MIB


def test_a_command_that_comes_slowly(start: Callable[..., Server]) -> None:
    """Slower than anything that looks at speed would mind."""
    server = start()
    with stranger(server) as peer:
        peer.sendall(bytes([LARGE_COMMAND]) + struct.pack(">Q", MIB))
        steps = 0
        with contextlib.suppress(ConnectionError):
            while steps < 200:
                peer.sendall(bytes(1024))
                steps += 1
                time.sleep(0.01)
        assert 4 <= steps < 100


def test_a_handshake_of_an_old_protocol_with_a_large_frame(start: Callable[..., Server]) -> None:
    """ZMTP 2 knows no keys."""
    server = start()
    before = server.peak
    with socket.create_connection(server.place) as peer:
        peer.settimeout(30.0)
        peer.sendall(b"\xff" + bytes(8) + b"\x7f\x01\x05" + b"\x00\x00" + b"\x02" + struct.pack(">Q", 512 * MIB))
        assert pour(peer, bytes(MIB), 256), "the connection is ended"
    assert server.peak - before < 192 * MIB


def test_many_strangers_at_once(start: Callable[..., Server], keys: Keys) -> None:
    """Each of them stays below what a handshake may have."""
    server = start()
    with transports.connect("zmq", server.address, keys.of("alice")) as client, contextlib.ExitStack() as stack:
        well(client)
        before = server.peak
        for _ in range(60):
            stack.enter_context(stranger(server)).sendall(
                bytes([LARGE_COMMAND]) + struct.pack(">Q", 9000) + bytes(3000)
            )
        well(client)
        assert server.load["ended"] == 0
        assert server.peak - before < 64 * MIB


def test_a_first_message_may_be_large(start: Callable[..., Server], keys: Keys) -> None:
    """Once a key is proved, the bound is that of a message."""
    server = start()
    for _ in range(3):
        with transports.connect("zmq", server.address, keys.of("alice")) as client:
            assert client.request(Message([bytes(24 * MIB)])).frames[0].nbytes == 24 * MIB
    assert server.load["ended"] == 0


# Connections


def test_one_key_can_not_keep_another_out(start: Callable[..., Server], keys: Keys) -> None:
    """Connections that have said one thing, and then nothing: as many as the server takes."""
    server = start(max_clients=8, max_client_connections=64)
    with contextlib.ExitStack() as stack:
        for _ in range(8 + 64):
            well(stack.enter_context(transports.connect("zmq", server.address, keys.of("mallory"))))
        with transports.connect("zmq", server.address, keys.of("alice")) as client:
            well(client)
            until(lambda: server.load["connections"] <= 8 + 64, "more connections are left")


def test_a_key_has_so_many_connections(start: Callable[..., Server], keys: Keys) -> None:
    """The one that was idle longest makes room; those of others are not touched."""
    server = start(max_client_connections=3)
    with contextlib.ExitStack() as stack:
        alice = stack.enter_context(transports.connect("zmq", server.address, keys.of("alice")))
        well(alice)
        clients = [stack.enter_context(transports.connect("zmq", server.address, keys.of("mallory"))) for _ in range(4)]
        for client in clients[:3]:
            well(client)
        well(clients[0])
        well(clients[3])
        until(lambda: server.load["connections"] == 4, "more connections are left")
        well(clients[0])
        with pytest.raises(ConnectionLostError):
            clients[1].request(Message([b"x"]))
        well(alice)


def test_strangers_do_not_keep_out_who_has_a_key(start: Callable[..., Server], keys: Keys) -> None:
    server = start(max_clients=2)
    with transports.connect("zmq", server.address, keys.of("alice")) as client, contextlib.ExitStack() as stack:
        well(client)
        for _ in range(150):
            stack.enter_context(stranger(server))
        well(client)
        until(lambda: server.load["connections"] <= 2 + 64, "more connections are left")


def test_without_keys_the_longest_idle_makes_room() -> None:
    """Each connection is a client then; a newcomer's place is that of who was idle longest, not of who is at work."""
    server = Server(max_clients=4)
    with contextlib.closing(server), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(transports.connect("zmq", server.address)) for _ in range(5)]
        for client in clients[:4]:
            well(client)
        well(clients[0])
        well(clients[4])
        until(lambda: server.load["connections"] == 4, "more connections are left")
        well(clients[0])
        with pytest.raises(ConnectionLostError):
            clients[1].request(Message([b"x"]))
        with greet(server) as another:
            another.sendall(message(1, b"x"))
            assert take(another, 2)


def outcome(sent: transports.Sent) -> str:
    try:
        sent.wait()
    except TransportError as error:
        return type(error).__name__
    return "reply"


def test_who_goes_on_with_what_is_refused_is_ended(start: Callable[..., Server], keys: Keys) -> None:
    """Reading it is work, and it is done while others wait."""
    server = start(max_client_bytes=MIB, max_client_requests=1, max_message_bytes=MIB)
    with transports.connect("zmq", server.address, keys.of("alice")) as client:
        well(client)
        with transports.connect("pipelined", server.address, keys.of("mallory")) as greedy:
            sent = []
            with contextlib.suppress(ConnectionLostError):  # where it is ended before all are on their way
                for _ in range(30):
                    sent.append(greedy.begin(Message([bytes(MIB)])))
            outcomes = [outcome(each) for each in sent]
        assert "ConnectionLostError" in outcomes
        assert server.load["ended"] == 1
        well(client)


def test_who_goes_on_after_it_was_taken_off_the_list_is_ended(start: Callable[..., Server], keys: Keys) -> None:
    server = start(max_client_bytes=MIB, max_message_bytes=MIB)
    told = 0

    def go_on(client: Client) -> None:
        nonlocal told
        while True:
            try:
                client.request(Message([b"x"]))
            except AuthenticationError:
                told += 1

    with transports.connect("zmq", server.address, keys.of("mallory")) as client:
        well(client)
        (keys.folder / "mallory.pub").unlink()
        with pytest.raises(ConnectionLostError):
            go_on(client)
        assert 1 <= told <= 17  # as if each had 64 KiB
        assert server.load["ended"] == 1


# Memory and time


def taken(server: RouterServer, count: int) -> list[Incoming]:
    """The next requests, which are answered at once."""
    found = []
    for _ in range(count):
        incoming = server.next(10)
        assert incoming is not None
        server.reply(incoming, Message([b"done"]))
        found.append(incoming)
    return found


def waits(server: RouterServer, requests: int) -> None:
    until(lambda: server.load.waiting_requests == requests, f"{server.load.waiting_requests} requests wait")


def test_connections_of_one_key_have_one_share(keys: Keys, raw: Raw) -> None:
    with RouterServer("tcp://127.0.0.1:0", ServerOptions(keys=keys.keys)) as server:
        crowd = [raw(server.address, "mallory") for _ in range(8)]
        for number, dealer in enumerate(crowd):
            for step in range(5):
                dealer.send_multipart(request(10 * number + step, b"mallory"))
        waits(server, 40)
        modest = raw(server.address, "alice")
        for number in range(3):
            modest.send_multipart(request(number, b"alice"))
        waits(server, 43)
        order = [bytes(each.frames[0]) for each in taken(server, 8)]
        assert order.count(b"alice") == 3
        assert server.load.clients == 2


def test_connections_of_one_key_are_bounded_together(keys: Keys, raw: Raw) -> None:
    """However many they are, they hold no more than one may, and reading goes on for others."""
    options = ServerOptions(keys=keys.keys, max_client_bytes=4 * MIB, max_message_bytes=4 * MIB)
    with RouterServer("tcp://127.0.0.1:0", options) as server:
        for number in range(1, 13):
            raw(server.address, "mallory").send_multipart(request(1, bytes(int(1.9 * MIB))))
            come = partial(lambda number: server.load.waiting_requests + server.load.refused == number, number)
            until(come, "it has not come")
        assert (server.load.refused, server.load.waiting_requests) == (10, 2)
        modest = raw(server.address, "alice")
        modest.send_multipart(request(1, b"alice"))
        waits(server, 3)
        assert b"alice" in [bytes(each.frames[0]) for each in taken(server, 2)]


def test_few_bytes_that_claim_to_be_many(keys: Keys, raw: Raw) -> None:
    """Compressed zeros count as what they stand for, over all connections of the key."""
    zstandard = pytest.importorskip("zstandard")
    size = int(1.9 * MIB)
    small = zstandard.ZstdCompressor(write_checksum=True, write_content_size=True).compress(bytes(size))
    options = ServerOptions(keys=keys.keys, max_client_bytes=4 * MIB, max_message_bytes=4 * MIB)
    with RouterServer("tcp://127.0.0.1:0", options) as server:
        for _ in range(6):
            head = transports.envelope.pack(1, [size], [transports.envelope.ZSTD], [1])
            raw(server.address, "mallory").send_multipart([head, small])
        until(lambda: server.load.refused == 4, "they are not refused")
        assert server.load.waiting_bytes == 2 * size


def test_a_key_that_connects_anew_for_each_request_has_one_share(keys: Keys, raw: Raw) -> None:
    """Else who leaves before it is its turn to wait would have one long program for each small one of others."""
    with RouterServer("tcp://127.0.0.1:0", ServerOptions(keys=keys.keys)) as server:
        modest = raw(server.address, "alice")
        for number in range(6):
            modest.send_multipart(request(number, b"alice"))
        waits(server, 6)
        order = []
        for number in range(3):
            dealer = raw(server.address, "mallory")
            dealer.send_multipart(request(number, b"mallory"))
            until(lambda: server.load.clients == 2, "it has not come")
            while True:
                incoming = server.next(0.0)
                if incoming is None:
                    break
                order.append(bytes(incoming.frames[0]))
                if order[-1] == b"mallory":
                    time.sleep(0.05)
                server.reply(incoming, Message([b"done"]))
                if order[-1] == b"mallory":
                    break
            dealer.close()
            until(lambda: server.load.connections == 1, "it has not gone")
        assert order.index(b"mallory") <= 1
        assert order[1:].count(b"alice") >= 5


class Valve(Relay):
    """Lets ``most`` bytes of each connection through to the server, and then no more."""

    def __init__(self, target: str, most: int) -> None:
        self._most = most
        super().__init__(target)

    def pass_on(self, way: str, source: socket.socket, sink: socket.socket, number: int) -> None:
        left = self._most if way == UP else None
        while left is None or left > 0:
            data = source.recv(65536 if left is None else min(left, 65536))
            if not data:
                break
            sink.sendall(data)
            left = None if left is None else left - len(data)
        else:
            return
        sink.shutdown(socket.SHUT_RDWR)


def test_unfinished_messages_of_one_key_are_bounded_together(
    keys: Keys, raw: Raw, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of them would be allowed. Those of others are left alone."""
    options = ServerOptions(keys=keys.keys, max_client_bytes=MIB // 8, max_message_bytes=MIB)
    with (
        RouterServer("tcp://127.0.0.1:0", options) as server,
        contextlib.closing(Valve(server.address, 3 * MIB // 4)) as valve,
    ):
        for name in ("alice", "mallory", "mallory", "mallory"):
            dealer = raw(valve.address, name)
            dealer.send_multipart(request(1, b"x"))
            taken(server, 1)
            until(lambda: all(each.settled_messages for each in server._guard._peers.values()), "it is not counted")
            dealer.send_multipart(request(2, bytes(MIB - 4096)))
        until(lambda: server.load.ended == 2, "they go on")
        assert server.next(0.1) is None
        assert server.load.ended == 2
    told = [line for line in caplog.messages if line.startswith("ended")]
    assert all("with other messages of its key" in line for line in told)

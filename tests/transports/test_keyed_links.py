"""Links with keys, with somebody in the middle, and against peers that go through zmq's handshake by hand."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

import transports
from tests.transports.keyed import (
    COMMAND,
    DOWN,
    GREETING,
    UP,
    RawPeer,
    Relay,
    SealedDealer,
    Wire,
    command,
    framed,
    initiate,
)
from tests.transports.test_hostile import MIB
from tests.transports.test_hostile import request as parts_of
from transports import (
    ClientOptions,
    Incoming,
    Message,
    Server,
    ServerOptions,
    admission,
    envelope,
    noise,
    sealing,
    security,
)  # fmt: skip
from transports.base import Buffer
from transports.connection import Connection
from transports.dealer import DealerClient
from transports.errors import (
    AuthenticationError,
    ConnectionLostError,
    FrameError,
    LimitError,
    ReplyTimeoutError,
    SealError,
)
from transports.guard import HANDSHAKE_BYTES
from transports.noise import Initiator, Responder
from transports.pipelined import PipelinedClient
from transports.router import RouterServer
from transports.sealing import PROTOCOL, Session
from transports.security import ClientKeys, KeyPair, ServerKeys

TRANSPORTS = ("zmq", "pipelined")
SERVER, ALICE, MALLORY = (security.pair_of(bytes([number]) * 32) for number in (1, 2, 3))
SECRET = b"the moon has phases"
Serve = Callable[..., Server]
Change = Callable[[str, int, bytes], list[bytes]]
"""Of a frame of a message: its direction, its number and all of it → what is sent in its place."""


@pytest.fixture
def clients(tmp_path: Path) -> Path:
    for name, pair in (("alice", ALICE), ("mallory", MALLORY)):
        path = tmp_path / f"{name}.pub"
        path.write_text(pair.public.text)
        path.chmod(0o644)
    return tmp_path


@pytest.fixture
def options(clients: Path) -> ServerOptions:
    return ServerOptions(keys=ServerKeys(SERVER, clients))


def of(pair: KeyPair = ALICE, server: KeyPair = SERVER) -> ClientOptions:
    return ClientOptions(connect_timeout_seconds=10.0, reply_timeout_seconds=10.0, keys=ClientKeys(pair, server.public))


def place(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.005)


class Counted:
    """Answers with what it got, and keeps that."""

    def __init__(self) -> None:
        self.got: list[bytes] = []

    def __call__(self, server: Server, incoming: Incoming) -> None:
        self.got.append(bytes(incoming.frames[0]))
        server.reply(incoming, Message(incoming.frames))


class Meddler(Relay):
    """Hands what it likes of the frames of the first connection on, and all of the others."""

    def __init__(self, target: str, change: Change) -> None:
        self._change = change
        self.heard = {UP: b"", DOWN: b""}
        super().__init__(target)

    def pass_on(self, way: str, source: socket.socket, sink: socket.socket, number: int) -> None:
        wire, frames, meddles = Wire(source), 0, number == 0
        with contextlib.suppress(OSError):
            for _ in range(64):  # each side waits for the beginning of the other's greeting before it goes on
                self._hand_on(way, sink, wire.take(1), meddles)
            while True:
                flags, _, raw = wire.frame()
                if not meddles or flags & COMMAND:
                    self._hand_on(way, sink, raw, meddles)
                    continue
                for each in self._change(way, frames, raw):
                    self._hand_on(way, sink, each, meddles)
                frames += 1
        sink.shutdown(socket.SHUT_RDWR)

    def _hand_on(self, way: str, sink: socket.socket, data: bytes, first: bool) -> None:
        if first:
            self.heard[way] += data
        sink.sendall(data)


@pytest.fixture
def meddle() -> Iterator[Callable[[str, Change], Meddler]]:
    with contextlib.ExitStack() as stack:
        yield lambda target, change: stack.enter_context(contextlib.closing(Meddler(target, change)))


def flipped(raw: bytes) -> bytes:
    return raw[:-3] + bytes([raw[-3] ^ 4]) + raw[-2:]


def at(way: str, number: int, does: Callable[[bytes], list[bytes]]) -> Change:
    return lambda found, count, raw: does(raw) if (found, count) == (way, number) else [raw]


class Reflected:
    """What the client has sealed comes back to it."""

    def __init__(self) -> None:
        self._kept = b""

    def __call__(self, way: str, number: int, raw: bytes) -> list[bytes]:
        if (way, number) == (UP, 2):
            self._kept = raw
        return [self._kept] if (way, number) == (DOWN, 2) else [raw]


OF_THE_EXCHANGE = "the word that it has its key changed"

# The first two frames of each direction are the exchange of keys, the next one is a request or a reply.
MEDDLING: dict[str, Callable[[], Change]] = {
    "a request changed": lambda: at(UP, 2, lambda raw: [flipped(raw)]),
    "a request changed later": lambda: at(UP, 4, lambda raw: [flipped(raw)]),
    "a request repeated": lambda: at(UP, 3, lambda raw: [raw, raw]),
    "a request left out": lambda: at(UP, 3, lambda _: []),
    "a request cut": lambda: at(UP, 3, lambda raw: [bytes([raw[0], raw[1] - 1]) + raw[2:-1]]),
    "another message put in": lambda: at(UP, 2, lambda raw: [framed([b"", b"x"]), raw]),
    "a reply changed": lambda: at(DOWN, 2, lambda raw: [flipped(raw)]),
    "a reply repeated": lambda: at(DOWN, 3, lambda raw: [raw, raw]),
    "a reply left out": lambda: at(DOWN, 3, lambda _: []),
    "a reply cut": lambda: at(DOWN, 3, lambda raw: [bytes([raw[0], raw[1] - 1]) + raw[2:-1]]),
    "a request in place of a reply": Reflected,
    OF_THE_EXCHANGE: lambda: at(UP, 1, lambda raw: [flipped(raw)]),
    "the word that all is well changed": lambda: at(DOWN, 1, lambda raw: [flipped(raw)]),
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("what", MEDDLING)
def test_somebody_in_the_middle(
    what: str, transport: str, serve: Serve, options: ServerOptions, meddle: Callable[[str, Change], Meddler]
) -> None:
    """Every reply that comes is the right one, no request is worked on twice, one connection is lost and told, another
    client of the server notices nothing, and a new connection goes on."""
    counted = Counted()
    server = serve(answer=counted, options=options)
    relay = meddle(server.address, MEDDLING[what]())
    with (
        transports.connect(transport, server.address, of(MALLORY)) as other,
        transports.connect(transport, relay.address, of()) as client,
    ):
        assert bytes(other.request(Message([b"other"])).frames[0]) == b"other"
        lost = 0
        for number in range(8):
            text = b"%d" % number
            try:
                reply = client.request(Message([text]), timeout_seconds=None if lost else 0.5)
                assert bytes(reply.frames[0]) == text
            except (ConnectionLostError, ReplyTimeoutError):
                lost += 1
        # What was lost, and where nothing was in flight then, the first that finds it so. Before a connection is there,
        # another one is tried.
        assert lost in ((0,) if what == OF_THE_EXCHANGE else (1, 2))
        assert bytes(client.request(Message([b"after"])).frames[0]) == b"after"
        assert bytes(other.request(Message([b"other"])).frames[0]) == b"other"
    assert len(counted.got) == len(set(counted.got)) + 1


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_answer_that_was_changed_is_told_as_another_key(
    transport: str, serve: Serve, options: ServerOptions, meddle: Callable[[str, Change], Meddler]
) -> None:
    server = serve(options=options)
    relay = meddle(server.address, at(DOWN, 0, lambda raw: [flipped(raw)]))
    with (
        transports.connect(transport, relay.address, of()) as client,
        pytest.raises(AuthenticationError, match="has another key than"),
    ):
        client.request(Message([SECRET]))
    assert server.load.refused == 0


def test_what_is_read_too_late_of_an_attempt_that_failed_is_no_agreement(
    serve: Serve, options: ServerOptions, meddle: Callable[[str, Change], Meddler]
) -> None:
    """The monitor may tell that a connection ended before the last word of its exchange of keys is read. Then another
    is made, with keys of its own: nothing of a request may leave before these are agreed on."""
    handed_on = threading.Event()

    def hold(way: str, number: int, raw: bytes) -> list[bytes]:
        if (way, number) == (DOWN, 1):
            handed_on.wait(10)
        return [raw]

    counted = Counted()
    relay = meddle(serve(answer=counted, options=options).address, hold)
    with transports.connect("zmq", relay.address, of()) as client:
        assert isinstance(client, DealerClient)
        request = client.begin(Message([SECRET]))
        connection = client._connection
        assert connection is not None
        while connection._session is None:
            client.look(request)
        connection.on_monitor([struct.pack("=HI", zmq.EVENT_DISCONNECTED, 0)])
        handed_on.set()
        until(connection.readable)
        while connection.readable():
            client._receive(connection)
        assert not connection.handshaken
        connection.reopen()
        assert not connection.handshaken
        with pytest.raises(SealError):
            connection.send([SECRET])
        client.wait_for(request)
        assert bytes(request.result().frames[0]) == SECRET
    assert counted.got == [SECRET]


@pytest.mark.parametrize("keyed", [False, True])
def test_an_attempt_that_can_not_be_made_is_told(keyed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where too many files are open. The next request begins anew."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    opened = Connection._open
    failures = [None, zmq.ZMQError(errno.EMFILE)]

    def fails_once(connection: Connection) -> None:
        if failures and (error := failures.pop(0)):
            raise error
        opened(connection)

    monkeypatch.setattr(Connection, "_open", fails_once)

    async def ask() -> None:
        with transports.connect(
            "pipelined", address, of() if keyed else ClientOptions(connect_timeout_seconds=1)
        ) as one:
            assert isinstance(one, PipelinedClient)
            with pytest.raises(ConnectionLostError, match="no other connection to"):
                await asyncio.wait_for(await one.begin_async(Message([b"x"])), 10)
            assert (await one.begin_async(Message([b"x"]))).error is None

    asyncio.run(ask())


def test_what_fails_in_the_loop_ends_what_waits(
    serve: Serve, options: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All wait for the exchange of keys, and the second can't be sealed: each has its end, and the next one goes."""
    address = serve(options=options).address
    seal = Session.seal

    def failing(session: Session, parts: Sequence[Buffer]) -> list[Buffer]:
        if parts and bytes(parts[-1]) == b"1":
            raise MemoryError
        return seal(session, parts)

    monkeypatch.setattr(Session, "seal", failing)

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        with transports.connect("pipelined", address, of()) as client:
            asked = [await client.begin_async(Message([b"%d" % number])) for number in range(4)]
            for each in asked:
                with pytest.raises(ConnectionLostError, match="given up"):
                    await asyncio.wait_for(each, 5)
            reply = await asyncio.wait_for(await client.begin_async(Message([b"next"])), 5)
            assert bytes(reply.frames[0]) == b"next"

    asyncio.run(ask())


def test_a_client_may_be_idle_before_its_first_request(serve: Serve, options: ServerOptions) -> None:
    server = serve(options=options)
    hasty = replace(of(), connect_timeout_seconds=0.5)
    with transports.connect("zmq", server.address, hasty) as client:
        time.sleep(0.6)
        assert bytes(client.request(Message([b"x"])).frames[0]) == b"x"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_tensor_that_no_seal_holds_is_refused(
    transport: str, serve: Serve, options: ServerOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both sides, before anything is sent; and the link goes on."""
    monkeypatch.setattr(sealing, "MAX_DATA_BYTES", 100_000)
    told: list[LimitError] = []

    def twice(server: Server, incoming: Incoming) -> None:
        try:
            server.reply(incoming, Message([bytes(incoming.frames[0]) * 2]))
        except LimitError as error:
            told.append(error)
            server.reply(incoming, Message([b"no"]))

    with transports.connect(transport, serve(answer=twice, options=options).address, of()) as client:
        with pytest.raises(LimitError, match="a request has a tensor"):
            client.request(Message([bytes(100_001)]))
        assert bytes(client.request(Message([bytes(60_000)])).frames[0]) == b"no"
        assert "a reply has a tensor" in str(told[0])
        assert len(client.request(Message([bytes(50_000)])).frames[0]) == 100_000


def test_a_key_that_was_taken_off_the_list_is_off_it_however_many_strangers_come(
    serve: Serve, options: ServerOptions, clients: Path
) -> None:
    server = serve(options=options)
    over = threading.Event()

    def come() -> None:
        while not over.wait(admission.CHECK_SECONDS / 8):
            RawPeer(place(server.address), b"junk").end.close()

    strangers = threading.Thread(target=come)
    strangers.start()
    try:
        with transports.connect("zmq", server.address, of()) as client:
            client.request(Message([b"x"]))
            (clients / "alice.pub").unlink()
            with pytest.raises(AuthenticationError, match="does not allow this client's key any more"):
                until(lambda: not client.request(Message([b"x"])).frames)
    finally:
        over.set()
        strangers.join()


def test_a_reply_goes_to_no_other_client_of_its_name(serve: Serve, options: ServerOptions) -> None:
    """Clients may name their connections, and one that has gone leaves its name to others."""
    ready, gone = threading.Event(), threading.Event()

    def late(server: Server, incoming: Incoming) -> None:
        if bytes(incoming.frames[0]) == SECRET:
            ready.set()
            gone.wait(10)
        server.reply(incoming, Message(incoming.frames))

    server = serve(answer=late, options=options)
    peer, session = proved(place(server.address), ALICE, Identity=b"NAME")
    peer.send(*map(bytes, session.seal(parts_of(1, SECRET))))
    assert ready.wait(10)
    peer.end.close()
    until(lambda: not server._guard.known(b"NAME"))  # type: ignore[attr-defined]
    other, others = proved(place(server.address), MALLORY, Identity=b"NAME")
    with other:
        gone.set()
        assert said(other, others, b"mine") == b"mine", "the first that comes is its own"


def test_all_that_a_client_sent_sent_again(
    serve: Serve, options: ServerOptions, meddle: Callable[[str, Change], Meddler]
) -> None:
    """The server's part of the exchange is another one each time, so nothing of it opens."""
    counted = Counted()
    server = serve(answer=counted, options=options)
    relay = meddle(server.address, lambda _way, _number, raw: [raw])
    with transports.connect("zmq", relay.address, of()) as client:
        client.request(Message([SECRET]))
    with socket.create_connection(place(server.address)) as again:
        again.settimeout(10)
        again.sendall(relay.heard[UP])
        assert Wire(again).ended()
    assert counted.got == [SECRET]
    with transports.connect("zmq", server.address, of()) as client:
        assert bytes(client.request(Message([b"on"])).frames[0]) == b"on"


def test_each_connection_has_keys_of_its_own(
    serve: Serve, options: ServerOptions, meddle: Callable[[str, Change], Meddler]
) -> None:
    heard = []
    for _ in range(2):
        server = serve(options=options)
        relay = meddle(server.address, lambda _way, _number, raw: [raw])
        with transports.connect("zmq", relay.address, of()) as client:
            client.request(Message([SECRET]))
        heard.append(relay.heard[UP] + relay.heard[DOWN])
    assert SECRET not in heard[0] + heard[1]
    for secret in (SERVER, ALICE):
        assert secret.public.raw not in heard[0]  # the client's is sealed for the server
    pieces = [{one[start : start + 16] for start in range(64, len(one) - 16)} for one in heard]
    shared = pieces[0] & pieces[1]
    assert not any(len(set(piece)) > 14 and not piece.isascii() for piece in shared)


# Peers by hand


def first_message(pair: KeyPair = ALICE, server: KeyPair = SERVER) -> bytes:
    return Initiator(pair.secret, server.public.raw, PROTOCOL).write()


def proved(place: tuple[str, int], pair: KeyPair = ALICE, **properties: bytes) -> tuple[RawPeer, Session]:
    """A client by hand that has proved its key."""
    exchange = Initiator(pair.secret, SERVER.public.raw, PROTOCOL)
    peer = RawPeer(place, exchange.write(), **properties)
    peer.send(b"")
    (answer,) = peer.message()
    _, sending, receiving = exchange.read(answer)
    session = Session(sending, receiving)
    peer.send(*map(bytes, session.seal([])))
    assert session.open([memoryview(bytearray(part)) for part in peer.message()]) == []
    return peer, session


def said(peer: RawPeer, session: Session, text: bytes) -> bytes:
    peer.send(*map(bytes, session.seal(parts_of(1, text))))
    return bytes(session.open([memoryview(bytearray(part)) for part in peer.message()])[1])


def test_a_client_by_hand(serve: Serve, options: ServerOptions) -> None:
    peer, session = proved(place(serve(options=options).address))
    with peer:
        assert said(peer, session, b"hello") == b"hello"


@pytest.mark.parametrize(
    ("name", "first"),
    [
        (PROTOCOL, b""),
        (PROTOCOL, bytes(noise.FIRST_BYTES)),
        (PROTOCOL, bytes(range(95))),
        (PROTOCOL, b"\xff" * 255),
        (PROTOCOL, first_message() + b"x"),
        (PROTOCOL, first_message(server=MALLORY)),
        (PROTOCOL[:-1] + b"1", first_message()),
        (b"", first_message()),
        (b"admin", b"password"),
    ],
    ids=["nothing", "zeros", "short", "no exchange", "too long", "another server", "older", "no name", "a password"],
)
def test_a_stranger_gets_no_further_than_the_first_word(
    serve: Serve, options: ServerOptions, name: bytes, first: bytes
) -> None:
    counted = Counted()
    server = serve(answer=counted, options=options)
    with RawPeer(place(server.address), first, name=name) as peer:
        assert peer.answer.endswith(b"RROR\x03500")
        peer.end.sendall(initiate() + framed([b""]) + framed(parts_of(1, b"x")))
        with transports.connect("zmq", server.address, of()) as client:
            client.request(Message([b"on"]))
    assert counted.got == [b"on"]


def test_who_is_not_on_the_list_is_told_so(serve: Serve, options: ServerOptions) -> None:
    with RawPeer(place(serve(options=options).address), first_message(security.new_pair())) as peer:
        assert peer.answer.endswith(b"RROR\x03400")


@pytest.fixture
def recorded(clients: Path) -> Iterator[tuple[RouterServer, Callable[..., RawPeer]]]:
    """A server, and ``connect(**properties)`` → a peer that says what alice once said, without her key."""
    made: list[RawPeer] = []
    with RouterServer("tcp://127.0.0.1:0", ServerOptions(keys=ServerKeys(SERVER, clients))) as server:

        def connect(**properties: bytes) -> RawPeer:
            made.append(RawPeer(place(server.address), first_message(), **properties))
            assert made[-1].answer == b"\x07WELCOME"
            return made[-1]

        yield server, connect
        for peer in made:
            peer.end.close()


Recorded = tuple[RouterServer, Callable[..., RawPeer]]


def test_a_recorded_beginning_gets_an_answer_and_nothing_else(recorded: Recorded) -> None:
    server, connect = recorded
    peer = connect()
    peer.send(b"")
    assert len(peer.message()[0]) == noise.SECOND_BYTES
    peer.send(*parts_of(1, b"x"))
    assert peer.ended()
    assert server.load.ended == 1
    assert server.next(0.05) is None


@pytest.mark.parametrize("frames", [[b"x"], [b"", b""], [b"", b"x"], parts_of(1, b"x"), [b"x" * 300]], ids=range(5))
def test_a_request_before_the_exchange_is_nothing(recorded: Recorded, frames: list[bytes]) -> None:
    server, connect = recorded
    peer = connect()
    for _ in range(3):
        peer.send(*frames)
    assert server.next(0.1) is None
    peer.send(b"")
    assert len(peer.message()[0]) == noise.SECOND_BYTES


def test_an_exchange_is_answered_once(recorded: Recorded) -> None:
    """A second session of the same keys would use the same numbers again."""
    server, connect = recorded
    peer = connect()
    peer.send(b"")
    assert len(peer.message()[0]) == noise.SECOND_BYTES
    peer.send(b"")
    assert peer.ended()
    assert server.load.ended == 1


@pytest.mark.parametrize("asks", [False, True], ids=["before its question", "after its answer"])
def test_no_more_than_a_handshake_is_taken_of_who_has_not_proved_a_key(recorded: Recorded, asks: bool) -> None:
    server, connect = recorded
    peer = connect()
    if asks:
        peer.send(b"")
        peer.message()
    sent = 0
    with contextlib.suppress(OSError):
        peer.end.sendall(b"\x02" + (2**30).to_bytes(8, "big"))
        while sent < 64 * HANDSHAKE_BYTES:
            peer.end.sendall(bytes(512))
            sent += 512
            time.sleep(0.005)
    assert HANDSHAKE_BYTES <= sent + 512 < 64 * HANDSHAKE_BYTES
    until(lambda: server.load.ended == 1)


def test_small_messages_of_who_has_not_proved_a_key_add_up(recorded: Recorded) -> None:
    server, connect = recorded
    peer = connect()
    sent = 0
    with contextlib.suppress(OSError):
        while sent < 64 * HANDSHAKE_BYTES:
            peer.send(b"x" * 200)
            sent += 202
            time.sleep(0.002)
    assert sent < 64 * HANDSHAKE_BYTES
    until(lambda: server.load.ended == 1)


def test_who_never_proves_a_key_is_ended_in_time(clients: Path) -> None:
    keys = ServerKeys(SERVER, clients)
    with RouterServer("tcp://127.0.0.1:0", ServerOptions(keys=keys, hello_timeout_seconds=0.3)) as server:
        for asks in (False, True):
            with RawPeer(place(server.address), first_message()) as peer:
                if asks:
                    peer.send(b"")
                    peer.message()
                assert peer.ended()
        assert server.load.clients == 0


def test_exchanges_that_nobody_goes_on_with_are_bounded(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    server, connect = recorded
    monkeypatch.setattr(admission, "MAX_PLEDGES", 3)
    peers = [connect() for _ in range(6)]
    assert server._gatekeeper is not None
    assert len(server._gatekeeper._pledges) == 3
    peers[0].send(b"")
    peers[-1].send(b"")
    assert len(peers[-1].message()[0]) == noise.SECOND_BYTES
    peers[0].end.settimeout(0.1)
    with pytest.raises(TimeoutError):
        peers[0].message()


def test_nobody_says_himself_whose_connection_it_is(serve: Serve, options: ServerOptions) -> None:
    """zmq takes properties of all names from a peer; its own come first."""
    server = serve(options=options)
    assert isinstance(server, RouterServer)
    waiting = RawPeer(place(server.address), first_message(ALICE))  # exchange 1, of alice, is not claimed yet
    peer, session = proved(place(server.address), MALLORY, User_Id=b"1", Identity=b"alice")
    with waiting, peer:
        assert said(peer, session, b"x") == b"x"
        with server._lock:
            accounts = {each.account.decode() for each in server._guard._peers.values() if each.messages}
        assert accounts == {MALLORY.public.raw.hex()}


def test_two_connections_with_one_name_of_their_own_choice(serve: Serve, options: ServerOptions) -> None:
    """zmq serves the first of them; the second is nobody's, and takes nothing of the first."""
    server = serve(options=options)
    peer, session = proved(place(server.address), ALICE, Identity=b"same")
    with peer, RawPeer(place(server.address), first_message(MALLORY), Identity=b"same") as second:
        second.send(b"")
        assert said(peer, session, b"x") == b"x"
        second.end.settimeout(0.1)
        with pytest.raises(TimeoutError):
            second.message()


def test_a_message_of_too_many_parts_is_refused_and_the_connection_goes_on(serve: Serve, clients: Path) -> None:
    server = serve(options=ServerOptions(keys=ServerKeys(SERVER, clients), max_frames=4))
    with transports.connect("zmq", server.address, of()) as client:
        with pytest.raises(LimitError, match=r"limits\.frames"):
            client.request(Message([b"x"] * 5))
        assert bytes(client.request(Message([b"on"])).frames[0]) == b"on"


def test_a_peer_with_a_key_whose_messages_do_not_add_up_loses_its_connection_alone(
    serve: Serve, options: ServerOptions
) -> None:
    server = serve(options=options)
    with zmq.Context() as context, transports.connect("zmq", server.address, of()) as client:
        dealer = SealedDealer(context, server.address, ClientKeys(MALLORY, SERVER.public))
        dealer.send_multipart([envelope.pack(1, [5]), b"four"])
        head, reason = dealer.recv_multipart()
        assert b"claims 5 bytes" in reason
        assert envelope.peek_request_id(head) == 1
        dealer.socket.send(os.urandom(64))
        until(lambda: server.load.ended == 1)
        assert bytes(client.request(Message([b"on"])).frames[0]) == b"on"
        dealer.close()


def test_numbers_that_are_used_up_cost_a_connection(serve: Serve, options: ServerOptions) -> None:
    """The next request has a new one."""
    server = serve(options=options)
    with transports.connect("zmq", server.address, of()) as client:
        client.request(Message([b"x"]))
        session: Any = vars(client)["_connection"]._session
        session._sending._nonce = 2**64 - 1
        with pytest.raises(ConnectionLostError, match="all numbers of this connection are used up"):
            client.request(Message([b"x"]))
        assert bytes(client.request(Message([b"on"])).frames[0]) == b"on"
        assert isinstance(server, RouterServer)
        with server._lock:
            peer = max((each for each in server._guard._peers.values() if each.messages), key=lambda each: each.number)
            assert peer.session is not None
            peer.session._sending._nonce = 2**64 - 1
        with pytest.raises(ConnectionLostError):
            client.request(Message([b"x"]))
        assert bytes(client.request(Message([b"on"])).frames[0]) == b"on"


# Servers by hand


class Imposter:
    """A server that takes everybody, and answers the exchange with ``answer(the client's first message)``."""

    def __init__(self, answer: Callable[[bytes], bytes]) -> None:
        self.got: list[list[bytes]] = []
        self._answer = answer
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._zap = self._context.socket(zmq.REP)
        self._zap.bind("inproc://zeromq.zap.01")
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.PLAIN_SERVER, 1)
        self._router.setsockopt(zmq.ZAP_DOMAIN, b"x")
        self.address = f"tcp://127.0.0.1:{self._router.bind_to_random_port('tcp://127.0.0.1')}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        first = b""
        while not self._over.is_set():
            if self._zap.poll(5):
                _, number, *_, first = self._zap.recv_multipart()
                self._zap.send_multipart([b"1.0", number, b"200", b"OK", b"x", b""])
            if self._router.poll(5):
                client, *frames = self._router.recv_multipart()
                self.got.append(frames)
                self._router.send_multipart([client, self._answer(first)])

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._context.destroy(linger=0)


def own_answer(_: bytes) -> bytes:
    """By somebody with a key of his own, to what the client would have sent him."""
    exchange = Responder(MALLORY.secret, PROTOCOL)
    exchange.read(first_message(server=MALLORY))
    return exchange.write()[0]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "answer",
    [own_answer, lambda _: os.urandom(noise.SECOND_BYTES), lambda _: bytes(noise.SECOND_BYTES), lambda first: first]
    + [lambda _, size=size: bytes(size) for size in (0, 1, 47, 49, 10_000)],
)
def test_who_has_not_the_server_s_key_gets_nothing_of_a_request(
    transport: str, answer: Callable[[bytes], bytes]
) -> None:
    with (
        contextlib.closing(Imposter(answer)) as imposter,
        transports.connect(transport, imposter.address, of()) as client,
        pytest.raises(AuthenticationError, match=f"has another key than {SERVER.public}"),
    ):
        client.request(Message([SECRET]))
    assert {tuple(frames) for frames in imposter.got} == {(b"",)}


AS_SERVER = GREETING[:32] + b"\x01" + GREETING[33:]


def test_no_more_than_an_exchange_is_taken_of_who_has_not_proved_the_server_s_key() -> None:
    """However long the answer may be that was asked of the server."""
    poured = 0
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "tcp://{}:{}".format(*listener.getsockname())

        def pour() -> None:
            nonlocal poured
            wire = Wire(listener.accept()[0])
            with wire.end, contextlib.suppress(OSError):
                wire.end.sendall(AS_SERVER)
                wire.take(64)
                wire.frame()
                wire.end.sendall(command(b"\x07WELCOME"))
                wire.frame()
                wire.end.sendall(command(b"\x05READY\x0bSocket-Type\x00\x00\x00\x06ROUTER"))
                wire.message()
                wire.end.sendall(b"\x02" + (64 * MIB).to_bytes(8, "big"))
                while poured < 32 * MIB:
                    wire.end.sendall(bytes(65536))
                    poured += 65536
                    time.sleep(0.002)  # 32 MB/s at most

        server = threading.Thread(target=pour)
        server.start()
        with (
            transports.connect("zmq", address, of()) as client,
            pytest.raises(FrameError, match="more than the answer"),
        ):
            client.request(Message([SECRET], max_reply_bytes=64 * MIB))
        server.join()
    assert poured < 16 * MIB


def test_a_server_of_an_older_release(clients: Path) -> None:
    with zmq.Context() as context:
        old = context.socket(zmq.ROUTER)
        old.setsockopt(zmq.LINGER, 0)
        old.setsockopt(zmq.CURVE_SERVER, 1)
        old.setsockopt(zmq.CURVE_SECRETKEY, SERVER.secret)
        address = f"tcp://127.0.0.1:{old.bind_to_random_port('tcp://127.0.0.1')}"
        for options, told in ((of(), "encrypts as older releases did"), (ClientOptions(), "takes clients with keys")):
            with (
                transports.connect("zmq", address, options) as client,
                pytest.raises(AuthenticationError, match=told),
            ):
                client.request(Message([SECRET]))
        old.close()


def test_a_client_of_an_older_release(serve: Serve, options: ServerOptions, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = serve(options=options)
    with zmq.Context() as context:
        old = context.socket(zmq.DEALER)
        old.setsockopt(zmq.LINGER, 0)
        old.setsockopt(zmq.CURVE_SERVERKEY, SERVER.public.raw)
        old.setsockopt(zmq.CURVE_PUBLICKEY, ALICE.public.raw)
        old.setsockopt(zmq.CURVE_SECRETKEY, ALICE.secret)
        old.connect(server.address)
        kinds = ("or is of an older release", "a connection ended before any key was shown")
        until(lambda: any(kind in caplog.text for kind in kinds))
        old.close()
    assert server.load.clients == 0

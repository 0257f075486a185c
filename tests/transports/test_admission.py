"""Who gets in: real sockets with keys, the allow-list while it changes, and a log that nobody can flood."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import zmq

import transports
from transports import Client, ClientOptions, Message, Server, ServerOptions, security
from transports.admission import MAX_KINDS, REPEAT_SECONDS, ZAP_DOMAIN, AllowList, FailureLog
from transports.connection import CUT_HANDSHAKES, KEYS, NO_KEYS, ask_mechanism
from transports.dealer import DealerClient
from transports.errors import AuthenticationError, BadKeyError, ConnectError
from transports.security import ClientKeys, KeyPair, ServerKeys

BLOCKING = ("zmq", "pipelined")
TIMEOUT_SECONDS = 10.0
Serve = Callable[..., Server]


@dataclass(frozen=True)
class Keys:
    server: KeyPair
    alice: KeyPair
    mallory: KeyPair
    folder: Path

    @property
    def options(self) -> ServerOptions:
        return ServerOptions(keys=ServerKeys(self.server, self.folder))

    def of(self, client: KeyPair, server: KeyPair | None = None) -> ClientOptions:
        keys = ClientKeys(client, (server or self.server).public)
        return ClientOptions(connect_timeout_seconds=TIMEOUT_SECONDS, keys=keys)

    def allow(self, name: str, pair: KeyPair) -> None:
        path = self.folder / f"{name}.pub"
        path.write_text(pair.public.text)
        path.chmod(0o644)  # whatever the umask is


@pytest.fixture(scope="module")
def pairs() -> list[KeyPair]:
    return [security.new_pair() for _ in range(3)]


@pytest.fixture
def keys(pairs: list[KeyPair], tmp_path: Path) -> Keys:
    """The server's, those of alice, who is allowed, and those of mallory, who is not."""
    made = Keys(*pairs, tmp_path)
    made.allow("alice", made.alice)
    return made


@pytest.fixture(params=BLOCKING)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Recording:
    """A relay of one connection that keeps all bytes of both directions."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("tcp://").partition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._bytes: list[bytes] = []
        self._thread = threading.Thread(target=self._relay)
        self._thread.start()

    def _relay(self) -> None:
        with self._listener, self._listener.accept()[0] as client, socket.create_connection(self._target) as server:
            other = {client: server, server: client}
            while True:
                for end in select.select([client, server], [], [])[0]:
                    data = end.recv(65536)
                    if not data:
                        return
                    self._bytes.append(data)
                    other[end].sendall(data)

    def heard(self) -> bytes:
        self._thread.join(TIMEOUT_SECONDS)
        assert not self._thread.is_alive()
        return b"".join(self._bytes)


def said(client: Client, text: bytes = b"hello") -> bytes:
    return bytes(client.request(Message([text])).frames[0])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.005)


def refused(name: str, address: str, options: ClientOptions) -> str:
    """What a client is told that does not get in. It is told long before the connect time-out."""
    started = time.monotonic()
    with transports.connect(name, address, options) as client, pytest.raises(AuthenticationError) as raised:
        client.request(Message([b"x"]), timeout_seconds=60)
    assert time.monotonic() - started < TIMEOUT_SECONDS
    assert "\n" not in str(raised.value)
    assert not raised.value.retryable
    return str(raised.value)


# ---- handshakes


@pytest.mark.parametrize("size", [1, 100_000, 5 * 2**20])
def test_with_the_right_keys(name: str, serve: Serve, keys: Keys, size: int) -> None:
    server = serve(options=keys.options)
    with transports.connect(name, server.address, keys.of(keys.alice)) as client:
        assert said(client, bytes(size)) == bytes(size)


def test_over_ipc(name: str, serve: Serve, keys: Keys, tmp_path: Path) -> None:
    server = serve(f"ipc://{tmp_path}/socket", options=keys.options)
    with transports.connect(name, server.address, keys.of(keys.alice)) as client:
        assert said(client) == b"hello"
    assert "does not know this client's key" in refused(name, server.address, keys.of(keys.mallory))
    assert "has another key than" in refused(name, server.address, keys.of(keys.alice, keys.mallory))


def test_a_client_that_is_not_on_the_list(name: str, serve: Serve, keys: Keys) -> None:
    told = refused(name, serve(options=keys.options).address, keys.of(keys.mallory))
    assert f"does not know this client's key (link.client_key, fingerprint {keys.mallory.public})" in told


def test_a_server_with_another_key(name: str, serve: Serve, keys: Keys) -> None:
    told = refused(name, serve(options=keys.options).address, keys.of(keys.alice, keys.mallory))
    assert f"has another key than {keys.mallory.public} (link.server_key)" in told


def test_a_client_without_keys(name: str, serve: Serve, keys: Keys) -> None:
    server = serve(options=keys.options)
    told = refused(name, server.address, ClientOptions(connect_timeout_seconds=TIMEOUT_SECONDS))
    assert "takes clients with keys only: set link.server_key and link.client_key" in told


def test_a_server_without_keys(name: str, serve: Serve, keys: Keys) -> None:
    told = refused(name, serve().address, keys.of(keys.alice))
    assert f"has no key, and link.server_key says that it must prove to have {keys.server.public}" in told


def test_what_went_wrong_before_the_first_request_is_told_with_it(name: str, serve: Serve, keys: Keys) -> None:
    """zmq connects when a client is made. Where that has failed since, there is nothing to send to."""
    plain, locked = serve(), serve(options=keys.options)
    for address, options, told in (
        (plain.address, keys.of(keys.alice), "has no key"),
        (locked.address, keys.of(keys.mallory), "does not know this client's key"),
    ):
        with transports.connect(name, address, options) as client:
            assert isinstance(client, DealerClient)
            connection = client._connection
            assert connection is not None
            until(lambda connection=connection: connection.check_monitor() or connection.retry_at_ns > 0)
            with pytest.raises(AuthenticationError, match=told):
                client.request(Message([b"x"]))


def test_nobody_there_is_not_a_question_of_keys(name: str, keys: Keys) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    options = ClientOptions(connect_timeout_seconds=0.1, keys=ClientKeys(keys.alice, keys.server.public))
    with transports.connect(name, address, options) as client, pytest.raises(ConnectError, match="no server answers"):
        client.request(Message([b"x"]))


def test_a_listener_that_cuts_every_connection_is_not_taken_for_a_wrong_key(name: str, keys: Keys) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.02)
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        options = ClientOptions(connect_timeout_seconds=0.4, keys=ClientKeys(keys.alice, keys.server.public))
        with transports.connect(name, address, options) as client:
            poll = client.begin(Message([b"x"])).poll
            cut = 0

            def ended() -> bool:
                nonlocal cut
                try:
                    listener.accept()[0].close()
                    cut += 1
                except TimeoutError:
                    pass
                return poll() is not None

            with pytest.raises(ConnectError, match="no server answers"):
                until(ended)
        assert cut >= CUT_HANDSHAKES


def test_no_handshake_without_the_guard(serve: Serve, keys: Keys) -> None:
    """Fails closed: where nobody answers zmq's question about a key, nobody gets in."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        bare = context.socket(zmq.ROUTER)
        bare.setsockopt(zmq.PLAIN_SERVER, 1)
        bare.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        bare.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        port = bare.bind_to_random_port("tcp://127.0.0.1")
        options = ClientOptions(connect_timeout_seconds=0.3, keys=ClientKeys(keys.alice, keys.server.public))
        with (
            transports.connect("zmq", f"tcp://127.0.0.1:{port}", options) as client,
            pytest.raises((ConnectError, AuthenticationError)),
        ):
            client.request(Message([b"x"]))
        assert not bare.poll(0)
    finally:
        context.destroy(linger=0)


def test_a_server_for_all_who_know_its_key(name: str, serve: Serve, keys: Keys) -> None:
    server = serve(options=ServerOptions(keys=ServerKeys(keys.server, None)))
    with transports.connect(name, server.address, keys.of(keys.mallory)) as client:
        assert said(client) == b"hello"
    assert "has another key" in refused(name, server.address, keys.of(keys.alice, keys.mallory))


def test_valid_clients_go_on_beside_those_who_are_refused(serve: Serve, keys: Keys) -> None:
    server = serve(options=keys.options)
    with transports.connect("zmq", server.address, keys.of(keys.alice)) as client:
        for _ in range(5):
            refused("zmq", server.address, keys.of(keys.mallory))
            assert said(client) == b"hello"


def test_what_crosses_the_link_can_not_be_read(serve: Serve, keys: Keys) -> None:
    words = b"the moon has phases " * 20
    seen: dict[bool, bytes] = {}
    for encrypted in (False, True):
        server = serve(options=keys.options if encrypted else ServerOptions())
        tap = Recording(server.address)
        options = keys.of(keys.alice) if encrypted else ClientOptions()
        with transports.connect("zmq", tap.address, options) as client:
            assert said(client, words) == words
        seen[encrypted] = tap.heard()
    assert seen[False].count(words) == 2
    assert b"the moon" not in seen[True]
    assert len(seen[True]) > 2 * len(words)


# ---- the list while it changes


def test_a_client_that_is_added_gets_in_at_once(name: str, serve: Serve, keys: Keys) -> None:
    server = serve(options=keys.options)
    refused(name, server.address, keys.of(keys.mallory))
    keys.allow("mallory", keys.mallory)
    with transports.connect(name, server.address, keys.of(keys.mallory)) as client:
        assert said(client) == b"hello"


def test_a_client_that_is_removed_is_refused_though_it_is_connected(name: str, serve: Serve, keys: Keys) -> None:
    keys.allow("mallory", keys.mallory)
    server = serve(options=keys.options)
    with (
        transports.connect(name, server.address, keys.of(keys.mallory)) as client,
        transports.connect(name, server.address, keys.of(keys.alice)) as other,
    ):
        assert said(client) == said(other) == b"hello"
        (keys.folder / "mallory.pub").unlink()
        refused(name, server.address, keys.of(keys.mallory))  # the list is read with each handshake

        with pytest.raises(AuthenticationError, match="does not allow this client's key any more"):
            client.request(Message([b"x"]))
        assert said(other) == b"hello"


def test_a_removal_is_seen_without_any_handshake(serve: Serve, keys: Keys) -> None:
    server = serve(options=keys.options)
    with transports.connect("zmq", server.address, keys.of(keys.alice)) as client:
        said(client)
        (keys.folder / "alice.pub").unlink()

        def is_refused() -> bool:
            try:
                said(client)
            except AuthenticationError:
                return True
            return False

        until(is_refused)


# ---- the list itself


def names(allowed: AllowList) -> set[str]:
    return set(allowed.names.values())


def test_the_list_is_that_of_the_folder(keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    allowed = AllowList(keys.folder)
    assert allowed.names == {keys.alice.public.raw.hex(): "alice"}
    keys.allow("mallory", keys.mallory)
    (keys.folder / "alice.pub").unlink()
    allowed.refresh()
    assert names(allowed) == {"mallory"}
    assert f"client mallory may connect (key {keys.mallory.public})" in caplog.text
    assert f"client alice may not connect any more (key {keys.alice.public})" in caplog.text


def test_a_file_that_is_written_over_within_one_tick(keys: Keys) -> None:
    """Same file, same size, same time stamps: it is read once more for a while."""
    allowed = AllowList(keys.folder)
    path = keys.folder / "alice.pub"
    before = path.stat()
    with path.open("r+") as file:
        file.write(keys.mallory.public.text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    allowed.refresh()
    assert set(allowed.names) == {keys.mallory.public.raw.hex()}


def test_what_does_not_belong_into_the_folder(keys: Keys, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    folder = keys.folder
    (folder / "README").write_text("who may connect")
    (folder / "damaged.pub").write_text("teegpu-public:" + "#" * 45)
    security.write_pair(keys.mallory, tmp_path / "own" / "m.pub", tmp_path / "own" / "m.key")
    (folder / "secret.pub").write_text((tmp_path / "own" / "m.key").read_text())
    (folder / "open.pub").write_text(keys.mallory.public.text)
    (folder / "open.pub").chmod(0o666)
    (folder / "gone.pub").symlink_to(folder / "nothing")
    (folder / ".hidden.pub").write_text(keys.mallory.public.text)
    allowed = AllowList(folder)
    allowed.refresh()
    assert names(allowed) == {"alice"}
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 3  # once, however often the folder is looked at
    for part in ("damaged.pub: the key is damaged", "secret.pub: this is a secret key", "open.pub: others could have"):
        assert any(part in line for line in told)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadKeyError, match="this folder of clients' keys can't be read: no such file"):
        AllowList(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadKeyError, match="is to be a folder"):
        AllowList(tmp_path / "file")


@pytest.mark.parametrize("mode", [0o777, 0o775])
@pytest.mark.parametrize("above", [False, True], ids=["the folder", "the folder above"])
def test_a_folder_that_others_can_write_to(
    keys: Keys, caplog: pytest.LogCaptureFixture, mode: int, above: bool
) -> None:
    """Who can write into the folder above can put another one in its place."""
    folder = keys.folder / "clients"
    folder.mkdir(mode=0o755)
    (keys.folder / "alice.pub").rename(folder / "alice.pub")
    allowed = AllowList(folder)
    (keys.folder if above else folder).chmod(mode)
    with pytest.raises(BadKeyError, match=r"others can admit clients there.*chmod go-w"):
        AllowList(folder)
    allowed.refresh()
    assert allowed.names == {}
    (keys.folder if above else folder).chmod(0o755)
    allowed.refresh()
    assert names(allowed) == {"alice"}
    assert caplog.text.count("nobody is admitted") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
@pytest.mark.parametrize("what", ["file", "target of a link", "folder"])
def test_what_belongs_to_another_user(keys: Keys, what: str) -> None:
    allowed, theirs = AllowList(keys.folder), keys.folder / "alice.pub"
    if what == "target of a link":
        theirs = theirs.rename(keys.folder / "elsewhere")
        (keys.folder / "alice.pub").symlink_to(theirs)
    os.chown(keys.folder if what == "folder" else theirs, 4242, -1)
    allowed.refresh()
    assert allowed.names == {}
    if what == "folder":
        with pytest.raises(BadKeyError, match="belongs to another user"):
            AllowList(keys.folder)


def test_a_link_to_a_file_in_a_folder_of_others(keys: Keys) -> None:
    """The file itself is as it should be, and can be replaced by others."""
    open_to_all = keys.folder / "open"
    open_to_all.mkdir()
    theirs = (keys.folder / "alice.pub").rename(open_to_all / "alice.pub")
    open_to_all.chmod(0o777)
    (keys.folder / "alice.pub").symlink_to(theirs)
    assert AllowList(keys.folder).names == {}
    open_to_all.chmod(0o1777)  # as /tmp: nobody can replace what is another's
    assert names(AllowList(keys.folder)) == {"alice"}


def test_a_folder_that_goes_lets_nobody_in_until_it_is_back(
    keys: Keys, tmp_path_factory: pytest.TempPathFactory
) -> None:
    allowed = AllowList(keys.folder)
    away = tmp_path_factory.mktemp("away") / "keys"
    keys.folder.rename(away)
    allowed.refresh()
    assert allowed.names == {}
    away.rename(keys.folder)
    allowed.refresh()
    assert names(allowed) == {"alice"}


def test_a_machine_without_descriptors_turns_nobody_away(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = AllowList(keys.folder)

    def fail(_: Path) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "scandir", fail)
    allowed.refresh()
    assert names(allowed) == {"alice"}


def test_a_server_whose_folder_can_not_be_used_is_not_started(keys: Keys, tmp_path: Path) -> None:
    options = ServerOptions(keys=ServerKeys(keys.server, tmp_path / "nothing"))
    with pytest.raises(BadKeyError):
        transports.listen("tcp://127.0.0.1:0", options)


# ---- the log


def test_failures_are_logged(serve: Serve, keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = serve(options=keys.options)
    refused("zmq", server.address, keys.of(keys.mallory))
    refused("zmq", server.address, keys.of(keys.alice, keys.mallory))
    refused("zmq", server.address, ClientOptions(connect_timeout_seconds=TIMEOUT_SECONDS))
    for line in (
        f"turned away: 127.0.0.1 with key {keys.mallory.public}, which is not allowed",
        "turned away: a client that expects another key of this server",
    ):
        until(lambda line=line: line in caplog.text)
        assert caplog.text.count(line) == 1
    # whichever side sees it first
    kinds = ("turned away: a client that uses no keys", "a connection ended before any key was shown")
    until(lambda: any(line in caplog.text for line in kinds))


def test_the_same_failure_is_counted_and_told_once_a_minute() -> None:
    lines: list[str] = []
    now = [0.0]
    failures = FailureLog(lines.append, lambda: now[0])
    for _ in range(1000):
        failures.failed("knock")
    assert lines == ["knock"]
    now[0] = REPEAT_SECONDS
    failures.tick()
    assert lines == ["knock", "knock (999 times more in 60 s)"]
    now[0] = 3 * REPEAT_SECONDS
    failures.tick()
    failures.failed("knock")
    assert lines[2:] == ["knock"]


def test_many_kinds_of_failures_neither_fill_the_log_nor_the_memory() -> None:
    lines: list[str] = []
    failures = FailureLog(lines.append, lambda: 0.0)
    for number in range(10_000):
        failures.failed(f"knock {number}")
    assert len(lines) == MAX_KINDS + 1
    assert lines[-1] == "failed handshakes of more kinds than are told apart"


# ---- what a peer says of itself


def test_the_mechanism_of_a_peer(serve: Serve, keys: Keys, tmp_path: Path) -> None:
    assert ask_mechanism(serve(options=keys.options).address, 5) == KEYS
    assert ask_mechanism(serve().address, 5) == NO_KEYS
    assert ask_mechanism(serve(f"ipc://{tmp_path}/s").address, 5) == NO_KEYS
    assert ask_mechanism(f"ipc://{tmp_path}/nothing", 5) == ""


def test_the_mechanism_of_what_is_no_peer() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        started = time.monotonic()
        assert ask_mechanism(f"tcp://127.0.0.1:{listener.getsockname()[1]}", 0.1) == ""
        assert time.monotonic() - started < 5

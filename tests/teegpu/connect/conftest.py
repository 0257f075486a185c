"""Endpoints that prove what they are by a vendor of our own, proxies before them, and servers that are strangers."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from teegpu.attest import identity, sources
from teegpu.attest.binding import ENDPOINT, Binding
from teegpu.attest.evidence import TDX, Evidence
from teegpu.attest.policy import Policy
from teegpu.attest.sources import Quoted
from teegpu.connect.serving import Serving
from teegpu.connect.upstream import Seen, Upstream
from tests.teegpu.api.conftest import start as start
from tests.teegpu.attest import pki
from tests.teegpu.attest.test_verify import SETTINGS, accepting, make

DEADLINE_SECONDS = 30.0


class SignedSource:
    """A TDX guest of our own vendor."""

    describe = "a vendor of our own"

    def quote(self, report_data: bytes) -> Quoted:
        vendor = pki.intel()
        return Quoted(TDX, vendor.quote(TDX, pki.td_report(report_data=report_data)), vendor.collateral(TDX))


@pytest.fixture
def in_a_tee(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is a TDX guest of our own vendor."""
    monkeypatch.setattr(sources, "find", SignedSource)


def policy(**settings: Any) -> Policy:
    """Accepts what ``SignedSource`` is, with any settings but those that are named."""
    made = accepting(make(TDX))
    return replace(made, rules={**made.rules, "settings": dict.fromkeys(SETTINGS) | settings})


class Proxy:
    """``url`` is the proxy's; ``keys`` has each key that was attested, ``error`` what ended it."""

    def __init__(self, upstream: str, accepted: Policy | None, **options: Any) -> None:
        self.keys: list[Seen] = []
        self.error: BaseException | None = None
        self.url = ""
        self._ready = threading.Event()
        given = {"roots": pki.intel().roots, "now": lambda: pki.NOW} | options
        self.upstream = Upstream(upstream, accepted, on_key=self.keys.append, **given)
        self.serving = Serving("127.0.0.1:0", self.upstream, self._on_ready)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(DEADLINE_SECONDS)

    def _on_ready(self, where: str, _: Seen) -> None:
        self.url = where
        self._ready.set()

    def _run(self) -> None:
        try:
            self.serving.run()
        except BaseException as error:  # noqa: BLE001 (for the test to look at)
            self.error = error
        self._ready.set()

    def end(self) -> None:
        with suppress(RuntimeError):
            self.serving.end()
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive()


MakeProxy = Callable[..., Proxy]


@pytest.fixture
def proxy() -> Iterator[MakeProxy]:
    made: list[Proxy] = []

    def start_one(upstream: str, accepted: Policy | None, **options: Any) -> Proxy:
        made.append(Proxy(upstream, accepted, **options))
        return made[-1]

    yield start_one
    for each in made:
        each.end()


class Stranger:
    """A TLS server that answers each request with what ``answer`` gives for its path: the raw bytes of an answer, or
    None to close. ``heard`` is all that it was sent."""

    def __init__(self, answer: Callable[[str], bytes | None]) -> None:
        self.own = identity.new()
        self.answer = answer
        self.heard = bytearray()
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(DEADLINE_SECONDS)
        with suppress(OSError), self.own.context.wrap_socket(connection, server_side=True) as secured:
            self._open.append(secured)
            waiting = b""
            while data := secured.recv(65536):
                self.heard += data
                waiting += data
                while b"\r\n\r\n" in waiting:
                    head, _, waiting = waiting.partition(b"\r\n\r\n")
                    reply = self.answer(head.split()[1].decode())
                    if reply is None:
                        return
                    secured.sendall(reply)

    def hang_up(self) -> None:
        for each in self._open:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.hang_up()


@pytest.fixture
def stranger() -> Iterator[Callable[..., Stranger]]:
    made: list[Stranger] = []

    def make_one(answer: Callable[[str], bytes | None]) -> Stranger:
        made.append(Stranger(answer))
        return made[-1]

    yield make_one
    for each in made:
        each.close()


def http(body: object, status: str = "200 OK") -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(raw)}\r\n\r\n".encode() + raw


def nonce_of(path: str) -> bytes:
    return bytes.fromhex(parse_qs(urlsplit(path).query)["nonce"][0])


def evidence_for(key: bytes, nonce: bytes, **changes: Any) -> dict[str, Any]:
    """Genuine evidence of our own vendor's."""
    binding = Binding(ENDPOINT, key, nonce, SETTINGS)
    quoted = SignedSource().quote(binding.report_data)
    return Evidence(quoted.kind, quoted.quote, binding, quoted.collateral).to_json() | changes


def client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context

"""The proxy: OpenAI's own client through it, and what may not get through."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest

from teegpu.attest import identity
from teegpu.connect import upstream as upstreams
from teegpu.connect.upstream import Upstream, observe
from teegpu.errors import AttestationError, ConfigError, ConnectionFailedError, EvidenceError, TeegpuError
from tests.teegpu.api.conftest import Endpoint, StartEndpoint, until
from tests.teegpu.attest import pki
from tests.teegpu.connect.conftest import MakeProxy, Proxy, Stranger, client_context, evidence_for, nonce_of, policy
from tests.teegpu.connect.conftest import http as reply

SECRET = "a prompt that nobody but the endpoint may read"
MODEL = "tiny-llama"

Strange = Callable[[Callable[[str], bytes | None]], Stranger]


@pytest.fixture
def endpoint(in_a_tee: None, start: StartEndpoint) -> Iterator[Endpoint]:
    made = start(api__attest="required")
    yield made
    made.end()


def client(made: Proxy) -> openai.OpenAI:
    return openai.OpenAI(base_url=made.url + "/v1", api_key="key", max_retries=0, timeout=30)


def complete(made: Proxy, **more: Any) -> Any:
    with client(made) as asking:
        return asking.completions.with_raw_response.create(model=MODEL, prompt=SECRET, max_tokens=4, **more)


def refused(made: Proxy) -> str:
    """What an application is told, which is not asked to try again."""
    with client(made) as asking, pytest.raises(openai.APIStatusError) as caught:
        asking.completions.create(model=MODEL, prompt=SECRET)
    assert caught.value.status_code == 502
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.code == "attestation_refused"
    return str(caught.value)


def test_openai_s_client_through_the_proxy(endpoint: Endpoint, proxy: MakeProxy) -> None:
    made = proxy(endpoint.url, policy(privacy=("local",), verify=("on",), model=(endpoint.runner.model_digest,)))
    raw = complete(made)
    (seen,) = made.keys
    assert raw.headers["x-teegpu-verified"] == f"tdx; key={seen.key.hex()}"
    assert "x-teegpu-insecure" not in raw.headers
    text = raw.parse().choices[0].text
    with client(made) as asking:
        pieces = list(asking.completions.create(model=MODEL, prompt=SECRET, max_tokens=4, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == text
        assert len(pieces) > 1
        assert asking.models.list().data[0].id == MODEL
        with pytest.raises(openai.BadRequestError):
            asking.completions.create(model=MODEL, prompt=SECRET, temperature=-1)


def test_streams_are_passed_on_as_they_come_and_end_with_their_reader(endpoint: Endpoint, proxy: MakeProxy) -> None:
    made = proxy(endpoint.url, policy())
    with endpoint.gated() as gate, client(made) as asking:
        stream = asking.completions.create(
            model=MODEL, prompt="a", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
        )
        gate.release(3)
        assert next(stream).choices
        stream.close()
        until(lambda: gate.release() or endpoint.engine.running == 0)  # type: ignore[func-returns-value]


def test_a_server_that_starts_again_with_another_key(
    endpoint: Endpoint, start: StartEndpoint, proxy: MakeProxy, in_a_tee: None
) -> None:
    made = proxy(endpoint.url, policy())
    before = complete(made)
    host, port = endpoint.address
    endpoint.end()
    with client(made) as asking, pytest.raises(openai.InternalServerError) as caught:
        asking.completions.create(model=MODEL, prompt=SECRET)
    assert caught.value.status_code == 503
    again = start(api__attest="required", api__listen=f"{host}:{port}")
    after = complete(made)
    again.end()
    assert before.parse().choices[0].text == after.parse().choices[0].text
    assert len({seen.key for seen in made.keys}) == 2
    assert before.headers["x-teegpu-verified"] != after.headers["x-teegpu-verified"]


def test_a_server_that_starts_again_as_something_else_is_refused(
    endpoint: Endpoint, start: StartEndpoint, proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = proxy(endpoint.url, policy())
    complete(made)
    host, port = endpoint.address
    endpoint.end()
    for attest, rule in (("simulated", "'kinds'"), ("off", "")):
        again = start(api__attest=attest, api__listen=f"{host}:{port}")
        if rule:
            assert rule in refused(made)
        else:  # it speaks no TLS at all
            with client(made) as asking, pytest.raises(openai.InternalServerError):
                asking.completions.create(model=MODEL, prompt=SECRET)
        again.end()
        assert again.answered == 0


class Relay:
    """Stands in between with a key of its own, and passes all on: to be believed it would need evidence for its key."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.heard = bytearray()
        self._target = target
        self._own = identity.new()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), self._own.context.wrap_socket(connection, server_side=True) as near:
            raw = socket.create_connection(self._target)
            with client_context().wrap_socket(raw) as far:
                # In turn, by one thread: two must not use a TLS connection at once.
                near.settimeout(0.02)
                far.settimeout(0.02)
                while self._passed(near, far) and self._passed(far, near):
                    pass

    def _passed(self, source: socket.socket, target: socket.socket) -> bool:
        """Passes on what has come. False at its end."""
        try:
            data = source.recv(65536)
        except TimeoutError:
            return True
        if target.getpeername() == self._target:
            self.heard += data
        target.sendall(data)
        return bool(data)

    def close(self) -> None:
        self._listener.close()


def test_a_relay_in_the_middle_has_no_evidence_for_its_key(endpoint: Endpoint, proxy: MakeProxy) -> None:
    relay = Relay(endpoint.address)
    made = proxy(relay.url, policy())
    assert isinstance(made.error, AttestationError)
    assert made.error.rule == "binding.key"
    # And where it comes in between later on:
    honest = proxy(endpoint.url, policy())
    complete(honest)
    until(lambda: honest.upstream._idle)
    honest.upstream.port = int(relay.url.rpartition(":")[2])
    for link in honest.upstream._idle:
        link.used -= 100  # it is made anew
    assert "'binding.key'" in refused(honest)
    assert relay.heard.count(b"GET /v1/attestation?nonce=") == 2
    assert SECRET.encode() not in relay.heard
    assert b"key" not in relay.heard
    relay.close()


def hello(stranger: Strange, answer: Callable[[bytes, bytes], bytes | None]) -> Stranger:
    """A stranger that answers challenges by ``answer(key, nonce)``."""
    made = stranger(lambda path: answer(made.own.key, nonce_of(path)))
    return made


OLD = bytes(32)


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        (lambda key, nonce: reply(evidence_for(key, OLD)), "binding.nonce"),
        (lambda key, nonce: reply(evidence_for(bytes(32), nonce)), "binding.key"),
        (lambda key, nonce: reply(evidence_for(key, nonce, kind="sgx")), "kinds"),
        (lambda key, nonce: reply(evidence_for(key, nonce) | {"binding": evidence_for(key, OLD)["binding"]}),
         "binding.nonce"),
        (lambda key, nonce: reply(evidence_for(key, OLD) | {"binding": evidence_for(key, nonce)["binding"]}),
         "binding"),
        (lambda key, nonce: reply({"format": "teegpu.evidence/1", "kind": "none", "note": "none"}), "kinds"),
        (lambda key, nonce: reply({"detail": "Not Found"}, "404 Not Found"), "evidence"),
        (lambda key, nonce: reply({}, "302 Found"), "evidence"),
    ],
)  # fmt: skip
def test_what_is_refused_with_its_rule(
    answer: Callable[[bytes, bytes], bytes], rule: str, stranger: Strange, proxy: MakeProxy
) -> None:
    false = hello(stranger, answer)
    made = proxy(false.url, policy())
    assert isinstance(made.error, AttestationError)
    assert made.error.rule == rule
    assert false.heard.count(b"\r\n\r\n") == 1


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda key, nonce: reply(b"no json"), EvidenceError),
        (lambda key, nonce: reply({"format": "x"}), EvidenceError),
        (lambda key, nonce: reply(b" " * 300_000), EvidenceError),
        (lambda key, nonce: b"SSH-2.0-x\r\n", ConnectionFailedError),
        (lambda key, nonce: b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{}", ConnectionFailedError),
        (lambda key, nonce: None, ConnectionFailedError),
        (lambda key, nonce: reply({}, "503 Service Unavailable"), ConnectionFailedError),
        (lambda key, nonce: b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}", TeegpuError),
        (lambda key, nonce: b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000, ConnectionFailedError),
        (lambda key, nonce: b"", ConnectionFailedError),
    ],
)
def test_strangers_that_answer_anything(
    answer: Callable[[bytes, bytes], bytes],
    kind: type[Exception],
    stranger: Strange,
    proxy: MakeProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upstreams, "CHALLENGE_SECONDS", 0.5)
    false = hello(stranger, answer)
    made = proxy(false.url, policy())
    assert isinstance(made.error, kind)
    assert "\n" not in str(made.error)


def test_nothing_of_a_prompt_reaches_who_turns_out_to_be_another(stranger: Strange, proxy: MakeProxy) -> None:
    """At first it proves what it should; then it does not, in one of its settings."""
    wrong = False

    def answer(path: str) -> bytes:
        if path.startswith("/v1/attestation"):
            return reply(evidence_for(false.own.key, nonce_of(path) if not wrong else OLD))
        return reply({"choices": []})

    false = stranger(answer)
    made = proxy(false.url, policy())
    assert complete(made).http_response.status_code == 200
    # It answers as soon as it has read a head.
    until(lambda: SECRET.encode() in false.heard and made.upstream._idle)
    false.heard.clear()
    wrong = True
    for link in made.upstream._idle:
        link.made -= 10_000  # its evidence has aged
    assert "'binding.nonce'" in refused(made)
    assert SECRET.encode() not in false.heard
    assert false.heard.count(b"GET /v1/attestation") == 1


def test_an_idle_connection_that_was_closed_is_made_anew_with_a_challenge(endpoint: Endpoint, proxy: MakeProxy) -> None:
    made = proxy(endpoint.url, policy())
    first = complete(made).parse().choices[0].text

    def close_all() -> None:
        for each in list(endpoint.serving._server.server_state.connections):
            each.transport.abort()

    endpoint.serving._loop.call_soon_threadsafe(close_all)
    until(lambda: not endpoint.serving._server.server_state.connections)
    assert complete(made).parse().choices[0].text == first
    assert len({seen.key for seen in made.keys}) == 1


def test_insecure_goes_on_and_says_so_in_each_answer(stranger: Strange, proxy: MakeProxy, endpoint: Endpoint) -> None:
    false = stranger(lambda path: reply({"x": 1}, "404 Not Found" if "attestation" in path else "200 OK"))
    made = proxy(false.url, policy(), insecure=True)
    for _ in range(2):
        raw = complete(made)
        assert "refused by rule 'evidence'" in raw.headers["x-teegpu-insecure"]
        assert "x-teegpu-verified" not in raw.headers
    assert SECRET.encode() in false.heard
    # Also where all is as the policy asks: it would not have mattered.
    raw = complete(proxy(endpoint.url, policy(), insecure=True))
    assert "an unverified one would be used" in raw.headers["x-teegpu-insecure"]
    assert "x-teegpu-verified" not in raw.headers


def test_an_endpoint_does_not_say_itself_that_it_was_verified(stranger: Strange, proxy: MakeProxy) -> None:
    def answer(path: str) -> bytes:
        if "attestation" in path:
            return reply({})
        return b"HTTP/1.1 200 OK\r\nX-Teegpu-Verified: tdx\r\nconnection: x-y\r\nx-y: 1\r\ncontent-length: 2\r\n\r\n{}"

    raw = complete(proxy(stranger(answer).url, None, insecure=True))
    assert "x-teegpu-verified" not in raw.headers
    assert "x-y" not in raw.headers


def test_an_answer_that_breaks_off_is_seen_to(stranger: Strange, proxy: MakeProxy) -> None:
    def answer(path: str) -> bytes:
        if "attestation" in path:
            return reply(evidence_for(false.own.key, nonce_of(path)))
        return b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{" if "completions" in path else reply({})

    false = stranger(answer)
    made = proxy(false.url, policy())
    host, _, port = made.url.rpartition("//")[2].rpartition(":")
    asking = http.client.HTTPConnection(host, int(port), timeout=10)
    asking.request("POST", "/v1/completions", b"{}")
    found = asking.getresponse()
    false.hang_up()
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        found.read()
    asking.close()


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1", "https://[", "127.0.0.1:80", "https://", "https://h:0", "https://h:x", "https://h/v1", "https://h?x=1",
     "https://u:p@h", "https://h:99999"],
)  # fmt: skip
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="URL of an endpoint"):
        Upstream(url, policy())


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "10.0.0.1:80"])
def test_others_do_not_reach_the_proxy(listen: str) -> None:
    from teegpu.connect.serving import Serving

    with pytest.raises(ConfigError, match="in the clear"):
        Serving(listen, Upstream("https://h", policy()), lambda *_: None)


def test_what_is_observed_is_genuine_or_not_written_down(endpoint: Endpoint, stranger: Strange) -> None:
    roots = pki.intel().roots
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: float(pki.NOW))
        evidence, claims = asyncio.run(observe(endpoint.url, None, roots))
        assert (evidence.kind, claims.measurements["mrtd"]) == ("tdx", "a0" * 48)
        for answer, rule in (
            (lambda key, nonce: evidence_for(bytes(32), nonce), "binding.key"),
            (lambda key, nonce: evidence_for(key, OLD) | {"binding": evidence_for(key, nonce)["binding"]}, "binding"),
        ):
            false = hello(stranger, lambda key, nonce, made=answer: reply(made(key, nonce)))
            with pytest.raises(AttestationError) as caught:
                asyncio.run(observe(false.url, None, roots))
            assert caught.value.rule == rule


def test_the_key_of_an_endpoint_is_in_no_file_in_the_clear(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where the system has no files in memory."""
    written: list[bytes] = []
    real = identity.ssl.SSLContext.load_cert_chain

    def load(context: Any, path: str, password: bytes) -> None:
        written.append(Path(path).read_bytes())
        real(context, path, password=password)

    monkeypatch.setattr(identity.ssl.SSLContext, "load_cert_chain", load)
    monkeypatch.setattr(identity.tempfile, "tempdir", str(tmp_path))
    first = identity.new()
    monkeypatch.delattr(identity.os, "memfd_create")
    assert first.key != identity.new().key
    assert len(written) == 2
    assert all(b"ENCRYPTED PRIVATE KEY" in each and b"BEGIN PRIVATE" not in each for each in written)
    assert list(tmp_path.iterdir()) == []


def test_evidence_is_json_that_a_person_can_read(endpoint: Endpoint) -> None:
    host, port = endpoint.address
    asking = http.client.HTTPSConnection(host, port, context=client_context(), timeout=30)
    asking.request("GET", "/v1/attestation?nonce=" + "ab" * 32)
    document = json.loads(asking.getresponse().read())
    assert document["binding"]["nonce"] == "ab" * 32
    assert document["binding"]["settings"]["privacy"] == "local"
    for wrong in ("", "?nonce=ab", "?nonce=" + "AB" * 32, "?nonce=" + "ab" * 65, "?nonce=" + "xy" * 32):
        asking.request("GET", "/v1/attestation" + wrong)
        answer = asking.getresponse()
        assert (answer.status, "nonce" in json.loads(answer.read())["error"]["message"]) == (400, True)
    asking.close()

"""Connections to an endpoint, each of which has proved what it is before anything of a request is sent on it.

The challenge goes over the connection itself: what the endpoint has signed names the key with which it made this
connection, and a nonce of ours. Who stands in between has another key, and no evidence for that one."""

from __future__ import annotations

import asyncio
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

import h11

from teegpu.attest import identity
from teegpu.attest.binding import ENDPOINT, NONCE_BYTES
from teegpu.attest.claims import Claims
from teegpu.attest.evidence import MAX_BYTES, Collateral, Evidence, read_json
from teegpu.attest.policy import Policy
from teegpu.attest.verify import VENDORS, Roots, Wanted, claims_of, judge
from teegpu.errors import AttestationError, ConfigError, ConnectionFailedError, EvidenceError, refusal

CONNECT_SECONDS: Final = 10.0
CHALLENGE_SECONDS: Final = 30.0
IDLE_SECONDS: Final = 8.0
"""How long a connection is kept for the next request: an endpoint closes idle ones after 10 s."""

_READ_BYTES: Final = 64 * 1024
_ANY_POLICY_SECONDS: Final = 300

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Seen:
    """What a connection proved. ``problem``: why it is not what the policy asks, where that was accepted with
    ``--insecure``; ``evidence`` and ``claims`` are None where there was none, or none that is genuine."""

    key: bytes
    evidence: Evidence | None = None
    claims: Claims | None = None
    problem: str = ""


class Link:
    """One connection, and its state of HTTP."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.CLIENT)
        self.made = self.used = time.monotonic()
        self.seen: Seen | None = None

    @property
    def key(self) -> bytes:
        """The digest of the key with which the other side made this connection."""
        own: ssl.SSLObject = self._writer.get_extra_info("ssl_object")
        certificate = own.getpeercert(binary_form=True)
        if certificate is None:
            raise ConnectionFailedError("the endpoint has no certificate")
        try:
            return identity.key_digest(certificate)
        except Exception:  # noqa: BLE001 (what a stranger sends as a certificate)
            raise ConnectionFailedError("the endpoint's certificate can't be read") from None

    @property
    def gone(self) -> bool:
        return self._reader.at_eof() or self._writer.is_closing()

    async def ask(self, method: bytes, target: bytes, headers: Headers, body: bytes) -> h11.Response:
        """Sends a request; the head of its answer. Raises ``ConnectionError``."""
        length = [(b"content-length", str(len(body)).encode())] if body or method not in (b"GET", b"HEAD") else []
        request = h11.Request(method=method, target=target, headers=[*headers, *length])
        events = (request, h11.Data(data=body), h11.EndOfMessage()) if body else (request, h11.EndOfMessage())
        for event in events:
            self._writer.write(self._http.send(event) or b"")
        try:
            await self._writer.drain()
        except OSError as error:
            raise _lost(error) from None
        while True:
            found = await self._next()
            if isinstance(found, h11.Response):
                return found
            if not isinstance(found, h11.InformationalResponse):
                raise ConnectionResetError("the endpoint closed the connection")

    async def body(self) -> AsyncIterator[bytes]:
        """The answer's body as it comes. Raises ``ConnectionError``."""
        while True:
            event = await self._next()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                return
            else:
                raise ConnectionResetError("the endpoint closed the connection within an answer")

    async def _next(self) -> object:
        try:
            while True:
                event = self._http.next_event()
                if event is not h11.NEED_DATA:
                    return event
                self._http.receive_data(await self._reader.read(_READ_BYTES))
        except h11.RemoteProtocolError:
            raise ConnectionResetError("the endpoint does not speak HTTP") from None
        except OSError as error:
            raise _lost(error) from None

    def next(self) -> bool:
        """Whether another request may go over this connection, which it is then ready for."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        self.used = time.monotonic()
        return True

    def close(self) -> None:
        self._writer.transport.abort()


@dataclass
class Upstream:
    """The endpoint at ``url``. ``policy`` None asks for nothing, which ``insecure`` has to allow. ``on_key`` is told
    when another key than before has been attested. Raises ``ConfigError`` for a URL that can't be."""

    url: str
    policy: Policy | None
    insecure: bool = False
    collateral: Collateral | None = None
    roots: Roots = VENDORS
    on_key: Callable[[Seen], None] = lambda _: None
    now: Callable[[], float] = time.time
    pinned: bytes = b""
    _idle: list[Link] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            port = 443 if parts.port is None else parts.port
        except ValueError:
            parts, port = urlsplit(""), 0
        if parts.scheme != "https" or not parts.hostname or not port or parts.path.strip("/") or parts.query:
            raise ConfigError(f"{self.url!r} is not the URL of an endpoint: https://host or https://host:port")
        if parts.username or parts.password:
            raise ConfigError("the URL of an endpoint has no user and no password")
        self.host, self.port = parts.hostname, port
        self.authority = parts.netloc.encode("idna" if not parts.netloc.isascii() else "ascii")
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        # Who it is, evidence says, and no authority of names.
        self._context.check_hostname = False
        self._context.verify_mode = ssl.CERT_NONE

    async def take(self) -> tuple[Link, bool]:
        """A connection that has proved what it is, and whether it was in use before. Raises ``AttestationError``,
        ``EvidenceError`` and ``ConnectionFailedError``."""
        most = self.policy.evidence_seconds if self.policy is not None else _ANY_POLICY_SECONDS
        now = time.monotonic()
        while self._idle:
            link = self._idle.pop()
            if not link.gone and now - link.used < IDLE_SECONDS and now - link.made < most:
                return link, True
            link.close()
        return await self.connect(), False

    def give_back(self, link: Link) -> None:
        if not link.gone and link.next():
            self.keep(link)
        else:
            link.close()

    async def connect(self) -> Link:
        """A new connection, after its challenge. Raises as ``take`` does."""
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self._context)
        except TimeoutError:
            raise ConnectionFailedError(f"{self.url} did not answer within {CONNECT_SECONDS:g} s") from None
        except OSError as error:
            reason = getattr(error, "reason", None) or error.strerror or type(error).__name__
            raise ConnectionFailedError(f"{self.url} can't be reached: {reason}") from None
        link = Link(reader, writer)
        try:
            async with asyncio.timeout(CHALLENGE_SECONDS):
                link.seen = await self._challenge(link)
        except BaseException as error:
            link.close()
            if isinstance(error, TimeoutError):
                raise ConnectionFailedError(f"{self.url} gave no evidence in {CHALLENGE_SECONDS:g} s") from None
            if isinstance(error, ConnectionError):
                raise ConnectionFailedError(f"{self.url}: {error}") from None
            raise
        if link.seen.key != self.pinned:
            self.pinned = link.seen.key
            self.on_key(link.seen)
        return link

    async def _challenge(self, link: Link) -> Seen:
        key, nonce = link.key, secrets.token_bytes(NONCE_BYTES)
        evidence = claims = None
        problem = ""
        try:
            evidence = await self._evidence(link, nonce)
            if self.policy is None:
                raise refusal("policy", "there is none, so that nothing is asked of the endpoint")
            wanted = Wanted(ENDPOINT, key, nonce)
            claims = judge(evidence, self.policy, wanted, int(self.now()), collateral=self.collateral, roots=self.roots)
        except (AttestationError, EvidenceError) as error:
            if not self.insecure:
                raise
            problem = str(error)
        return Seen(key, evidence, claims, problem)

    async def _evidence(self, link: Link, nonce: bytes) -> Evidence:
        target = f"/v1/attestation?nonce={nonce.hex()}".encode()
        response = await link.ask(b"GET", target, [(b"host", self.authority)], b"")
        body = bytearray()
        async for part in link.body():
            body += part
            if len(body) > MAX_BYTES:
                raise EvidenceError(f"the endpoint's evidence is longer than {MAX_BYTES:,} bytes")
        if not link.next():
            raise ConnectionResetError("the endpoint closes the connection after its evidence, which is for that alone")
        if response.status_code == 503:
            raise ConnectionResetError("it is not ready yet, or ending (503)")
        if response.status_code != 200:
            raise refusal("evidence", f"the endpoint gives none (status {response.status_code} at /v1/attestation)")
        document = read_json(bytes(body))
        if isinstance(document, dict) and document.get("kind") == "none":
            raise refusal("kinds", f"the endpoint attests nothing: {_line(document.get('note'))}")
        return Evidence.from_json(document)

    def keep(self, link: Link) -> None:
        """``link`` is there for the next request."""
        self._idle.append(link)

    def close(self) -> None:
        for link in self._idle:
            link.close()
        self._idle.clear()


async def observe(url: str, collateral: Collateral | None, roots: Roots = VENDORS) -> tuple[Evidence, Claims]:
    """Genuine evidence of the endpoint at ``url`` for its connection, whatever it runs: for a policy to be written
    from. Raises what ``Upstream.connect`` does."""
    upstream = Upstream(url, None, insecure=True)
    link = await upstream.connect()
    link.close()
    seen = link.seen
    if seen is None or seen.evidence is None:
        raise EvidenceError(f"{url}: {'no evidence' if seen is None else seen.problem}")
    evidence = seen.evidence
    if evidence.binding.key != seen.key:
        raise refusal("binding.key", "the evidence speaks for another key: somebody stands in between")
    given = evidence.collateral if collateral is None else collateral.over(evidence.collateral)
    claims = claims_of(evidence.kind, evidence.quote, given, int(time.time()), roots)
    if claims.report_data != evidence.binding.report_data:
        raise refusal("binding", "what the TEE had signed is not what was sent beside it")
    return evidence, claims


def _lost(error: OSError) -> ConnectionError:
    """``error`` of a socket, or of TLS over it."""
    return ConnectionResetError(f"the connection was lost ({error.strerror or type(error).__name__})")


def _line(text: object) -> str:
    return " ".join(str(text)[:300].split()) if isinstance(text, str) and text.isprintable() else "it does not say why"

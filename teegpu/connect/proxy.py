"""What applications talk to: each request goes on as it is, over a connection that has proved what it is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from typing import Final

import h11
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from teegpu.connect.upstream import Headers, Link, Upstream
from teegpu.errors import AttestationError, ConnectionFailedError, EvidenceError

log = logging.getLogger("teegpu.connect")

MAX_BODY_BYTES: Final = 64 * 2**20
"""Of a request: it is held, so that it can be sent again where an idle connection turns out to be closed."""

OWN: Final = b"x-teegpu-"
"""How the names of headers begin that say what was verified; an endpoint's own ones are taken off."""

_HOP: Final = frozenset(
    {b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer", b"upgrade",
     b"transfer-encoding", b"host", b"content-length", b"expect"}
)  # fmt: skip
"""Headers that are for one connection, or made anew for the next."""

_ANSWER: Final = (_HOP | {b"date"}) - {b"content-length"}
"""The same of an answer, whose length stays as it is."""


class Proxy:
    """An ASGI application before ``upstream``."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            body = await _body(receive)
        except ClientDisconnect:
            return
        if body is None:
            await _told(send, 413, "too_large", f"the body is longer than {MAX_BODY_BYTES:,} bytes")
            return
        work = asyncio.ensure_future(self._forward(scope, body, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            for task in (work, gone):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _forward(self, scope: Scope, body: bytes, send: Send) -> None:
        try:
            link, response = await self._ask(scope, body)
        except (AttestationError, EvidenceError) as error:
            log.warning("%s", error, extra={"event": "refused"})
            await _told(send, 502, "attestation_refused", f"nothing was sent: {error}")
            return
        except (ConnectionFailedError, ConnectionError) as error:
            log.warning("%s", error, extra={"event": "lost"})
            await _told(send, 503, "endpoint_unavailable", str(error))
            return
        whole = False
        try:
            await send({"type": "http.response.start", "status": response.status_code,
                        "headers": [*_kept(list(response.headers), answer=True), *self._verdict(link)]})  # fmt: skip
            async for part in link.body():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
            whole = True
        except ConnectionError as error:
            log.warning("%s", error, extra={"event": "lost"})
            raise  # the answer has begun: its end is missing, and the application sees that
        finally:
            if whole:
                self._upstream.give_back(link)
            else:
                link.close()

    async def _ask(self, scope: Scope, body: bytes) -> tuple[Link, h11.Response]:
        """Sends the request over a connection that is verified; once more where one that was idle is closed."""
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        headers = [(b"host", self._upstream.authority), *_kept(scope["headers"], answer=False)]
        while True:
            link, used = await self._upstream.take()
            try:
                return link, await link.ask(scope["method"].encode("ascii"), target, headers, body)
            except ConnectionError:
                link.close()
                if not used:
                    raise
            except BaseException:
                link.close()
                raise

    def _verdict(self, link: Link) -> list[tuple[bytes, bytes]]:
        """What each answer says of its connection."""
        seen = link.seen
        if self._upstream.insecure or seen is None or seen.claims is None:
            problem = seen.problem if seen is not None else ""
            return [(OWN + b"insecure", (problem or "an unverified one would be used").encode("ascii", "replace"))]
        return [(OWN + b"verified", f"{seen.claims.kind}; key={seen.key.hex()}".encode())]


def _kept(headers: Headers, *, answer: bool) -> list[tuple[bytes, bytes]]:
    """``headers`` for the next connection."""
    named = {part.strip().lower() for name, value in headers if name.lower() == b"connection"
             for part in value.split(b",")}  # fmt: skip
    drop = (_ANSWER if answer else _HOP) | named
    return [(name.lower(), value) for name, value in headers if name.lower() not in drop
            and not name.lower().startswith(OWN)]  # fmt: skip


async def _body(receive: Receive) -> bytes | None:
    """A request's body; None where it is too long."""
    found = bytearray()
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        found += message.get("body", b"")
        if len(found) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body"):
            return bytes(found)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _told(send: Send, status: int, code: str, message: str) -> None:
    """An error in OpenAI's form, that its client does not answer by asking again."""
    error = {"message": message, "type": "attestation_error" if status == 502 else "connection_error", "code": code}
    body = json.dumps({"error": {**error, "param": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 502:
        headers.append((b"x-should-retry", b"false"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

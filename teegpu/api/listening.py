"""Where the endpoint listens, who may reach it, and how it ends: uvicorn, held by a few rules of our own."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from teegpu.errors import ConfigError
from teegpu.files import expanded
from transports import addresses
from transports.errors import BadAddressError
from transports.sockets import Binding, private_socket, remove_stale

HEAD_SECONDS: Final = 10.0
"""How long a connection may take to send the head of its first request, and how long it may be idle afterwards."""

UNREAD_SECONDS: Final = 30.0
"""How long a client may leave unread what fills a connection before that is given up."""


@dataclass(frozen=True)
class Address:
    """``host`` and ``port``, or ``path`` of a unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str, setting: str) -> Address:
        """``host:port`` or ``unix:/path``. Raises ``ConfigError``."""
        if text.startswith("unix:/") and "\0" not in text:
            return cls(path=text.removeprefix("unix:"))
        try:
            found = addresses.parse(f"tcp://{text}", listening=True)
        except BadAddressError:
            raise ConfigError(f"{setting}: {text!r} is not host:port, such as 127.0.0.1:8000, or unix:/path") from None
        return cls("0.0.0.0" if found.host == "*" else found.host.strip("[]"), found.port)

    @property
    def local(self) -> bool:
        """Whether nobody reaches it from another machine."""
        return bool(self.path) or addresses.is_local(f"tcp://{self.text}")

    @property
    def text(self) -> str:
        return f"unix:{self.path}" if self.path else addresses.at(self.host, self.port)

    def listen(self, setting: str) -> tuple[socket.socket, Binding]:
        """A socket that listens here, and what to release when it is closed; a unix socket is for its own user. Raises
        ``ConfigError``, also where another listens, or where there is a file that is no socket."""
        try:
            if not self.path:
                return socket.create_server((self.host, self.port), family=_family(self.host)), Binding(self.text)
            path = Path(self.path)
            remove_stale(path, self.text)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                with private_socket():
                    listener.bind(self.path)
                listener.listen()
            except OSError:
                listener.close()
                raise
            return listener, Binding(self.text, path, path.lstat().st_ino)
        except OSError as error:
            raise ConfigError(f"{setting}: can't listen at {self.text} ({error.strerror or error})") from None
        except BadAddressError as error:
            raise ConfigError(f"{setting}: {error}") from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def tls(certificate: str, key: str) -> ssl.SSLContext | None:
    """What both files make, None without them. Raises ``ConfigError``."""
    if not certificate and not key:
        return None
    if not certificate or not key:
        raise ConfigError("api.tls_cert and api.tls_key go together: give both, or none")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(expanded(certificate, "api.tls_cert"), expanded(key, "api.tls_key"))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"api.tls_cert, api.tls_key: no certificate with its key can be read ({error})") from None
    return context


class _Protocol(H11Protocol):
    """A connection that says nothing is closed: h11's own time-out begins after the first answer only."""

    _head_until: float | None = None
    """When the head that has begun to come has to be whole, by the loop's clock."""
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_a_head()

    def data_received(self, data: bytes) -> None:
        waiting = self._waiting
        super().data_received(data)
        if not waiting or not self._waiting:
            self._head_until = None
        elif not self.timeout_keep_alive_task:  # still no whole head: the clock goes on from where it was
            self._wait_for_a_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._read()

    def _read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    @property
    def _waiting(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _wait_for_a_head(self) -> None:
        if self._head_until is None:
            self._head_until = self.loop.time() + HEAD_SECONDS
        self.timeout_keep_alive_task = self.loop.call_at(self._head_until, self._say_something)

    def _say_something(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """``on_signal`` is called on the loop with each signal that asks the process to end; nothing ends by itself."""

    def __init__(self, app: ASGIApp, context: ssl.SSLContext | None, on_signal: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=True,
            proxy_headers=False,
            timeout_keep_alive=int(HEAD_SECONDS),
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=32 * 1024,
            ssl_context_factory=None if context is None else (lambda _, __: context),
        )
        # What uvicorn would say of a request may quote it; what we have to say is said in app.
        quiet = logging.getLogger("uvicorn")
        quiet.setLevel(logging.CRITICAL)
        super().__init__(config)
        self._on_signal = on_signal
        self._own_loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._own_loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._own_loop is not None:
            self._own_loop.call_soon_threadsafe(self._on_signal)

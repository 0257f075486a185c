"""Addresses: ``tcp://host:port``, ``ipc:///absolute/path``, ``inprocess://name``. Syntax only, no I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass

from transports.errors import BadAddressError

SCHEMES = ("tcp", "ipc", "inprocess")
MAX_IPC_PATH_BYTES = 107
"""A Unix socket's path has to fit into sockaddr_un with its final zero."""

_TCP = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[A-Za-z0-9._-]+|\*):(?P<port>\d{1,5}|\*)")
_LOOPBACK = re.compile(r"127(\.\d{1,10}){1,3}|\[(0{0,4}:){2,7}0{0,3}1\]", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")


@dataclass(frozen=True, slots=True)
class Address:
    """A checked address. ``host`` and ``port`` are set for tcp (port 0: any free one), ``path`` for the others."""

    scheme: str
    text: str
    path: str = ""
    host: str = ""
    port: int = 0

    @property
    def local(self) -> bool:
        """Whether it is on this machine, and nobody reaches it from another one."""
        host = self.host.lower()
        return self.scheme != "tcp" or host == "localhost" or _LOOPBACK.fullmatch(host) is not None


def at(host: str, port: int) -> str:
    """``host:port`` as addresses have it, with brackets around IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_local(text: str) -> bool:
    """``Address.local`` of an address as it was written; False for what is none."""
    try:
        return parse(text, listening=True).local
    except BadAddressError:
        return False


def parse(text: str, *, listening: bool = False) -> Address:
    """Check an address. ``listening`` allows what only a server can use: port 0 or ``*``, host ``*``.

    Raises ``BadAddressError``, which says what an address looks like.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in SCHEMES:
        raise BadAddressError(
            f"'{text}' is not an address: write tcp://host:port, ipc:///path/to/socket or inprocess://name"
        )
    if scheme == "tcp":
        return _parse_tcp(text, rest, listening)
    if scheme == "inprocess":
        if not _NAME.fullmatch(rest):
            raise BadAddressError(f"'{text}': the name after inprocess:// is 1 to 100 letters, digits, '.', '_', '-'")
        return Address(scheme, text, path=rest)
    if not rest.startswith("/") or rest.endswith("/") or "\x00" in rest:
        raise BadAddressError(
            f"'{text}': after ipc:// comes the absolute path of a socket, as in ipc:///run/teegpu.sock"
        )
    if len(rest.encode()) > MAX_IPC_PATH_BYTES:
        raise BadAddressError(f"'{text}': a socket's path has at most {MAX_IPC_PATH_BYTES} bytes; choose a shorter one")
    return Address(scheme, text, path=rest)


def _parse_tcp(text: str, rest: str, listening: bool) -> Address:
    match = _TCP.fullmatch(rest)
    if match is None:
        raise BadAddressError(f"'{text}': after tcp:// comes host:port, as in tcp://127.0.0.1:5555 or tcp://[::1]:5555")
    host, port_text = match["host"], match["port"]
    port = 0 if port_text == "*" else int(port_text)
    if port > 65535:
        raise BadAddressError(f"'{text}': port {port} is above 65535")
    if not listening and (port == 0 or host == "*"):
        raise BadAddressError(f"'{text}': a client needs the server's own host and port, not a wildcard")
    return Address("tcp", f"tcp://{host}:{port if port else '*'}", host=host, port=port)

"""Transports by name. The table holds names of modules and classes, so that listing them imports none of them."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module

from transports import addresses
from transports.base import Client, ClientOptions, Server, ServerOptions
from transports.errors import UnknownTransportError

_CLIENTS = {
    "zmq": ("transports.dealer", "LockStepClient"),
    "zmq+zstd": ("transports.dealer", "CompressedLockStepClient"),
    "pipelined": ("transports.pipelined", "PipelinedClient"),
    "pipelined+zstd": ("transports.pipelined", "CompressedPipelinedClient"),
    "inprocess": ("transports.inprocess", "InprocessClient"),
}
_SERVERS = {
    "tcp": ("transports.router", "RouterServer"),
    "ipc": ("transports.router", "RouterServer"),
    "inprocess": ("transports.inprocess", "InprocessServer"),
}


def names() -> tuple[str, ...]:
    """The names that ``connect`` knows."""
    return tuple(_CLIENTS)


def client_class(name: str) -> type[Client]:
    """The class of transport ``name``: it says whether requests overlap, and whether frames are compressed.

    Raises ``UnknownTransportError``.
    """
    if name not in _CLIENTS:
        match = get_close_matches(name, _CLIENTS, n=1, cutoff=0.5)
        hint = f", did you mean '{match[0]}'?" if match else ""
        raise UnknownTransportError(f"there is no transport '{name}'{hint} (run.transport: {', '.join(_CLIENTS)})")
    module_name, class_name = _CLIENTS[name]
    found: type[Client] = vars(import_module(module_name))[class_name]
    return found


def connect(name: str, endpoint: str, options: ClientOptions | None = None) -> Client:
    """A client of the server at ``endpoint``. Returns at once: the first request finds out whether a server is there.

    Raises ``UnknownTransportError`` and ``BadAddressError``.
    """
    make: Callable[[str, ClientOptions], Client] = client_class(name)
    return make(endpoint, options or ClientOptions())


def listen(address: str, options: ServerOptions | None = None) -> Server:
    """A server on ``address``. One server serves all clients whose transport reaches that kind of address.

    Raises ``BadAddressError``, and ``LimitError`` where the system allows too few descriptors for so many clients.
    """
    options = options or ServerOptions()
    scheme = addresses.parse(address, listening=True).scheme
    module_name, class_name = _SERVERS[scheme]
    server_class = vars(import_module(module_name))[class_name]
    server: Server = server_class(address, options)
    return server

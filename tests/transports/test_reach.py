"""Why nobody answers, in words."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import transports
from transports import Server, addresses
from transports.reach import why_silent


def listening(speak: bytes = b"", *, then_close: bool = False) -> socket.socket:
    """A listener that says something of its own to the first who connects."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        peer, _ = listener.accept()
        peer.sendall(speak)
        if then_close:
            peer.close()
        else:
            peer.recv(1 << 16)
            peer.recv(1)  # until the other side has had enough
            peer.close()

    threading.Thread(target=serve, daemon=True).start()
    return listener


def address_of(listener: socket.socket) -> str:
    return f"tcp://127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_answers(serve: Callable[..., Server]) -> None:
    server = serve("tcp://127.0.0.1:0", lambda *_: None)
    assert why_silent(server.address, 5.0) == ""


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = address_of(taken)
    assert why_silent(address, 5.0) == "connection refused, nobody listens there"
    assert why_silent(f"ipc://{tmp_path}/none", 5.0) == "there is no such socket"


def test_a_name_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> list[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert why_silent("tcp://gpu.example:5555", 5.0) == "the name 'gpu.example' can't be resolved"


def test_something_else_listens() -> None:
    with listening(b"SSH-2.0-OpenSSH_9.2\r\n") as other:
        assert why_silent(address_of(other), 5.0) == "what listens there is not a teegpu server"
    with listening() as mute:
        assert why_silent(address_of(mute), 0.1) == "what listens there says nothing"


def test_a_server_in_this_process_is_not_looked_for() -> None:
    assert why_silent("inprocess://here", 0.1) == ""
    with pytest.raises(transports.errors.BadAddressError):
        why_silent("tcp://", 0.1)
    assert addresses.parse("inprocess://here").scheme == "inprocess"

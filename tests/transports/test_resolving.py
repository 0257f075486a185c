"""What a name stands for: many addresses of both kinds, or itself."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from transports import resolving

FOUR, SIX = socket.AF_INET, socket.AF_INET6


def answering(monkeypatch: pytest.MonkeyPatch, *found: tuple[socket.AddressFamily, str]) -> list[tuple[Any, ...]]:
    """The name service knows one name. → what it was asked."""
    asked: list[tuple[Any, ...]] = []

    def getaddrinfo(*args: Any, **_: Any) -> list[Any]:
        asked.append(args)
        return [(family, socket.SOCK_STREAM, 6, "", (host, args[1], 0, 0)[: 2 if family == FOUR else 4])
                for family, host in found]  # fmt: skip

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.parametrize(
    ("found", "addresses"),
    [
        ([(FOUR, "10.0.0.1")], ["tcp://gpu.local:5555"]),
        ([(SIX, "fd00::1")], ["tcp://[fd00::1]:5555"]),
        ([(FOUR, "10.0.0.1"), (FOUR, "10.0.0.2")], ["tcp://10.0.0.1:5555", "tcp://10.0.0.2:5555"]),
        ([(SIX, "fd00::1"), (FOUR, "10.0.0.1")], ["tcp://[fd00::1]:5555", "tcp://10.0.0.1:5555"]),
        ([(FOUR, "10.0.0.1"), (FOUR, "10.0.0.1")], ["tcp://gpu.local:5555"]),
    ],
)
def test_a_name(
    found: list[tuple[socket.AddressFamily, str]], addresses: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = answering(monkeypatch, *found)
    assert resolving.resolve("tcp://gpu.local:5555") == addresses
    assert asked == [("gpu.local", 5555)]


@pytest.mark.parametrize(
    "text",
    ["tcp://127.0.0.1:1", "tcp://10.0.0.1:1", "tcp://[fd00::1]:1", "tcp://[fe80::1%eth0]:1", "tcp://localhost:1",
     "ipc:///run/gpu", "inprocess://a"],
)  # fmt: skip
def test_what_is_no_name_stands_for_itself(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch)
    assert not resolving.is_name(text)
    assert resolving.resolve(text) == [text]
    assert asked == []


def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(OSError, match="not known"):
        resolving.resolve("tcp://gpu.local:5555")

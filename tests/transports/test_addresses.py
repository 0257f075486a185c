from __future__ import annotations

import pytest

from transports import addresses
from transports.errors import BadAddressError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("tcp://127.0.0.1:5555", "127.0.0.1", 5555),
        ("tcp://gpu-1.example.org:1", "gpu-1.example.org", 1),
        ("tcp://[::1]:65535", "[::1]", 65535),
    ],
)
def test_tcp(text: str, host: str, port: int):
    address = addresses.parse(text)
    assert (address.scheme, address.host, address.port, address.text) == ("tcp", host, port, text)


@pytest.mark.parametrize("text", ["tcp://127.0.0.1:0", "tcp://127.0.0.1:*", "tcp://*:5555"])
def test_wildcards_are_for_servers(text: str):
    assert addresses.parse(text, listening=True).scheme == "tcp"
    with pytest.raises(BadAddressError, match="wildcard"):
        addresses.parse(text)


def test_ipc_and_inprocess():
    assert addresses.parse("ipc:///run/teegpu.sock").path == "/run/teegpu.sock"
    assert addresses.parse("inprocess://one").path == "one"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not an address"),
        ("127.0.0.1:5555", "not an address"),
        ("udp://127.0.0.1:5555", "not an address"),
        ("tcp://127.0.0.1", "host:port"),
        ("tcp://:5555", "host:port"),
        ("tcp://a b:5555", "host:port"),
        ("tcp://127.0.0.1:70000", "65535"),
        ("tcp://127.0.0.1:5555;tcp://x:1", "host:port"),
        ("ipc://relative", "absolute"),
        ("ipc:///run/", "absolute"),
        ("ipc:///" + "x" * 107, "107 bytes"),
        ("inprocess://", "letters"),
        ("inprocess://a/b", "letters"),
    ],
)
def test_bad_addresses_say_what_a_good_one_looks_like(text: str, says: str):
    with pytest.raises(BadAddressError, match=says):
        addresses.parse(text, listening=True)


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("tcp://127.0.0.1:5555", True),
        ("tcp://127.1.2.3:0", True),
        ("tcp://localhost:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://[0:0:0:0:0:0:0:1]:1", True),
        ("ipc:///run/teegpu.sock", True),
        ("inprocess://one", True),
        ("tcp://127.example.org:1", False),
        ("tcp://10.0.0.1:1", False),
        ("tcp://[::]:1", False),
        ("tcp://[2001:db8::1]:1", False),
        ("tcp://*:1", False),
        ("no address", False),
    ],
)
def test_what_only_this_machine_reaches(text: str, local: bool):
    assert addresses.is_local(text) is local

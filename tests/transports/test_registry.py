from __future__ import annotations

import subprocess
import sys

import pytest

import transports
from transports.errors import BadAddressError, UnknownTransportError


def test_names():
    assert transports.names() == ("zmq", "zmq+zstd", "pipelined", "pipelined+zstd", "inprocess")


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    with pytest.raises(UnknownTransportError, match=r"did you mean 'pipelined'\?.*zmq, zmq\+zstd, .*inprocess"):
        transports.connect("pipelned", "tcp://127.0.0.1:5555")
    with pytest.raises(UnknownTransportError) as caught:
        transports.connect("carrier-pigeon", "tcp://127.0.0.1:5555")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "endpoint"),
    [
        ("zmq", "inprocess://x"),
        ("pipelined+zstd", "inprocess://x"),
        ("inprocess", "tcp://127.0.0.1:5555"),
        ("zmq", "nonsense"),
        ("pipelined", "tcp://127.0.0.1:0"),
    ],
)
def test_an_address_that_the_transport_does_not_reach(name: str, endpoint: str):
    with pytest.raises(BadAddressError):
        transports.connect(name, endpoint)


def test_a_bad_address_to_listen_on():
    with pytest.raises(BadAddressError):
        transports.listen("http://127.0.0.1:80")


@pytest.mark.parametrize("name", transports.names())
def test_each_name_gives_a_client_that_knows_it(name: str):
    endpoint = "inprocess://nobody" if name == "inprocess" else "tcp://127.0.0.1:9"
    with transports.connect(name, endpoint) as client:
        assert client.name == name
        assert client.endpoint == endpoint
        assert client.overlaps == name.startswith("pipelined")


def test_importing_transports_imports_none_of_them():
    code = (
        "import sys, transports; transports.names(); print({'zmq', 'zstandard', 'asyncio', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"

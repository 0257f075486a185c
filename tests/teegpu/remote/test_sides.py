"""Two servers that are visibly one are refused: by address, by key, and by who answers."""

from __future__ import annotations

import pytest

from teegpu import config, endpoints, keys
from teegpu.errors import ConfigError, ShieldError
from teegpu.remote.sides import Instances, check_apart, divide


def parsed(*texts: str) -> list[endpoints.Endpoint]:
    return endpoints.parse_all(texts)


def test_two_endpoints_get_a_share_each() -> None:
    first, second = divide("two-server", parsed("tcp://a:1", "tcp://b:1"))
    assert (first.share, second.share) == (1, 2)
    assert [first.endpoints[0].address, second.endpoints[0].address] == ["tcp://a:1", "tcp://b:1"]
    assert (first.indices, second.indices) == ((0,), (1,))


def test_more_are_marked_and_stand_in_for_each_other() -> None:
    texts = ("tcp://a:1#share=2", "tcp://b:1#share=1", "tcp://c:1#layers=0-1,share=1,key=c")
    first, second = divide("two-server", parsed(*texts))
    assert [endpoint.address for endpoint in first.endpoints] == ["tcp://b:1", "tcp://c:1"]
    assert (first.indices, second.indices) == ((1, 2), (0,))
    assert str(first.endpoints[1]) == "tcp://c:1#layers=0-1,key=c,share=1"


@pytest.mark.parametrize(
    "texts",
    [
        ("tcp://a:1",),
        ("tcp://a:1", "tcp://b:1", "tcp://c:1"),
        ("tcp://a:1#share=1", "tcp://b:1"),
        ("tcp://a:1#share=1", "tcp://b:1#share=1"),
    ],
)
def test_what_does_not_make_two_sides(texts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="takes two endpoints"):
        divide("two-server", parsed(*texts))


def test_shares_mean_two_servers() -> None:
    with pytest.raises(ConfigError, match=r"shares are for run.privacy = two-server, and it is pads"):
        divide("pads", parsed("tcp://a:1#share=1"))
    with pytest.raises(ConfigError, match="share=3 is neither"):
        parsed("tcp://a:1#share=3")
    (only,) = divide("none", parsed("tcp://a:1", "tcp://b:1"))
    assert only.share == 0
    assert only.indices == (0, 1)


def apart(*texts: str, **flags: object) -> list[str]:
    settings = config.load({"run.endpoints": texts} | {key.replace("__", "."): value for key, value in flags.items()})
    return check_apart(settings, divide("two-server", parsed(*texts)))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tcp://localhost:5555", "tcp://127.0.0.1:5555"),
        ("tcp://gpu.example:5555#share=1", "tcp://GPU.example:5555#share=2,layers=0-1"),
    ],
)
def test_one_address_is_one_server(first: str, second: str) -> None:
    with pytest.raises(ShieldError, match="are one server"):
        apart(first, second)


def test_one_machine_is_said_to_be_one() -> None:
    line, *_ = apart("tcp://gpu.example:5555", "tcp://gpu.example:5556", link__insecure=True)
    assert "on one machine" in line
    assert len(apart("ipc:///a", "tcp://127.0.0.1:5556")) == 1


def test_two_shares_never_cross_a_network_without_keys() -> None:
    texts = ("ipc:///a", "tcp://b.example:5555")
    with pytest.raises(ShieldError, match=r"the link to tcp://b.example:5555 has no keys, .* with --insecure"):
        apart(*texts)
    assert "warning: --insecure: the link to tcp://b.example:5555 has no keys" in apart(*texts, link__insecure=True)[-1]


def test_one_key_is_one_server() -> None:
    for name in ("me", "gpu-a", "gpu-b"):
        keys.new(name)
    texts = ("tcp://a.example:5555#key=gpu-a", "tcp://b.example:5555#key=gpu-b")
    assert apart(*texts, link__client_key="me") == []
    with pytest.raises(ShieldError, match="same key"):
        apart(texts[0], "tcp://b.example:5555", link__client_key="me", link__server_key="gpu-a")
    with pytest.raises(ShieldError, match="same key"):
        apart("tcp://a.example:1", "tcp://b.example:1", link__client_key="me", link__server_key="gpu-a")


def test_a_server_that_was_met_on_one_side_is_never_taken_on_the_other() -> None:
    met = Instances()
    met.meet(1, "one", "tcp://a:1")
    met.meet(2, "two", "tcp://b:1")
    met.meet(1, "one", "tcp://a:1")  # it answers again
    met.meet(1, "another", "tcp://a:1")  # it was restarted
    with pytest.raises(ShieldError, match="tcp://b:1 is the one that answers at tcp://a:1"):
        met.meet(2, "another", "tcp://b:1")
    with pytest.raises(ShieldError, match="both shares"):
        met.meet(1, "two", "tcp://a:1")

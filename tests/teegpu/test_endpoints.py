"""What ``run.endpoints`` may say: the syntax of one, and whether several cover the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from teegpu.endpoints import Endpoint, parse, parse_all, ranges, write
from teegpu.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("tcp://a:5555", Endpoint("tcp://a:5555", None, "")),
        ("ipc:///run/gpu", Endpoint("ipc:///run/gpu", None, "")),
        ("tcp://[::1]:5555#layers=0-10", Endpoint("tcp://[::1]:5555", (0, 10), "")),
        ("tcp://a:5555#key=big", Endpoint("tcp://a:5555", None, "big")),
        ("tcp://a:5555#layers=3-3,key=big", Endpoint("tcp://a:5555", (3, 3), "big")),
        ("tcp://a:5555#key=big,layers=11-21", Endpoint("tcp://a:5555", (11, 21), "big")),
        (" tcp://a:5555# layers = 0-10 , key = big ", Endpoint("tcp://a:5555", (0, 10), "big")),
    ],
)
def test_an_endpoint(text: str, endpoint: Endpoint) -> None:
    assert parse(text) == endpoint
    assert parse(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not an address"),
        ("a:5555", "is not an address: write tcp://host:port"),
        ("#layers=0-1", "is not an address"),
        ("tcp://a:1#", "unknown option ''"),
        ("tcp://a:1#layer=0-1", "unknown option 'layer', did you mean 'layers'?"),
        ("tcp://a:1#layers=0-1,", "unknown option ''"),
        ("tcp://a:1#layers", "layers= is empty"),
        ("tcp://a:1#key=", "key= is empty"),
        ("tcp://a:1#key=a,key=b", "key= is there twice"),
        ("tcp://a:1#layers=3", "layers=3 is not a range: write the first and the last one"),
        ("tcp://a:1#layers=0-1-2", "is not a range"),
        ("tcp://a:1#layers=-1-2", "is not a range"),
        ("tcp://a:1#layers=٠-١", "is not a range"),
        ("tcp://a:1#layers=5-4", "layers=5-4 begins after its end"),
    ],
)
def test_what_is_none(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text)
    assert message in str(raised.value)
    assert "run.endpoints" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_one_endpoint_twice() -> None:
    assert len(parse_all(["tcp://a:1#layers=0-1", "tcp://a:1#layers=2-3", "tcp://b:1#layers=0-1"])) == 3
    with pytest.raises(ConfigError, match="'tcp://a:1#key=x' is there twice"):
        parse_all(["tcp://a:1", "tcp://b:1", "tcp://a:1#key=x"])


def of(*texts: str) -> list[Endpoint]:
    return [parse(f"tcp://a:{number}#layers={text}" if text else f"tcp://a:{number}")
            for number, text in enumerate(texts, 1)]  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (("",), [(0, 21)]),
        (("", ""), [(0, 21)]),
        (("0-21", ""), [(0, 21)]),
        (("11-21", "0-10"), [(0, 10), (11, 21)]),
        (("0-10", "0-10", "11-11", "12-21", "12-21"), [(0, 10), (11, 11), (12, 21)]),
    ],
)
def test_ranges_that_cover_a_model(texts: tuple[str, ...], expected: list[tuple[int, int]]) -> None:
    assert ranges(of(*texts), 22) == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("0-10",), "no server for layers 11 to 21 of the model's 22"),
        (("1-21",), "no server for layer 0 of the model's 22"),
        (("0-9", "11-21"), "no server for layer 10 of"),
        (("0-10", "10-21"), "layer 10 would be on servers whose ranges differ"),
        (("0-10", "5-21"), "layers 5 to 10 would be on servers whose ranges differ"),
        (("", "0-10"), "layers 0 to 10 would be on servers whose ranges differ"),
        (("0-22",), "layers=0-22, and the model's layers end at 21"),
    ],
)
def test_gaps_and_overlaps(texts: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ranges(of(*texts), 22)


def test_a_file_that_is_written_is_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.json"
    given = [parse("tcp://10.0.0.1:5555#layers=0-3,key=gpu"), parse("tcp://[fd00::1]:5555#layers=4-7")]
    write(path, given)
    assert parse_all([f"@{path}"]) == given
    # Nobody finds half of another one, and nobody an empty one or both sides of two-server.
    inode = path.stat().st_ino
    write(path, given[:1])
    assert path.stat().st_ino != inode
    for wrong in ([], [parse("tcp://10.0.0.1:5555#share=1"), parse("tcp://10.0.0.2:5555#share=2")]):
        with pytest.raises(ValueError, match="one operator"):
            write(path, wrong)
    assert parse_all([f"@{path}"]) == given[:1]

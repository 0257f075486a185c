"""msgpack from a peer: plain values within bounds, or WireError."""

from __future__ import annotations

import datetime
import tracemalloc

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teegpu.errors import WireError
from teegpu.wire.unpacking import MAX_ITEMS, unpack


@pytest.mark.parametrize(
    "value", [None, True, 0, -1, 2**64 - 1, 1.5, "text", "größer", b"\x00\xff", [1, [2]], {"a": [b""]}]
)
def test_plain_values_come_back(value: object) -> None:
    assert unpack(msgpack.packb(value), "it") == value


@pytest.mark.parametrize(
    "packed",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xc1", id="the byte that msgpack never uses"),
        pytest.param(b"\x92\x01", id="an item is missing"),
        pytest.param(b"\x01\x02", id="a byte is left over"),
        pytest.param(b"\x91" * 5000 + b"\xc0", id="nested too deeply"),
        pytest.param(b"\xa2\xff\xfe", id="not UTF-8"),
        pytest.param(b"\xa3\xed\xa0\x80", id="a lone surrogate"),
        pytest.param(msgpack.packb({1: 2}), id="a key that is a number"),
        pytest.param(b"\x81\x90\x01", id="a key that is a list"),
        pytest.param(msgpack.packb(msgpack.ExtType(5, b"x")), id="an extension"),
        pytest.param(msgpack.packb(msgpack.ExtType(5, b"")), id="an empty extension"),
        pytest.param(
            msgpack.packb(datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), datetime=True), id="a timestamp"
        ),
        pytest.param(b"\xd6\xff\x00\x00\x00\x01", id="a short timestamp"),
        pytest.param(b"\xdd\xff\xff\xff\xff", id="a list of 2**32 - 1 items"),
        pytest.param(msgpack.packb([None] * (MAX_ITEMS + 1)), id="a list with too many items"),
        pytest.param(msgpack.packb({str(key): None for key in range(MAX_ITEMS + 1)}), id="a map with too many items"),
    ],
)
def test_anything_else_is_refused_by_name(packed: bytes) -> None:
    with pytest.raises(WireError, match="the thing is not valid msgpack"):
        unpack(packed, "the thing")


def test_the_last_of_two_equal_keys_counts() -> None:
    assert unpack(b"\x82\xa1a\x01\xa1a\x02", "it") == {"a": 2}


def test_nested_lists_that_declare_much_are_not_allocated() -> None:
    bomb = (b"\xdd" + (200_000).to_bytes(4, "big")) * 500 + b"\xc0" * 200_000
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            unpack(bomb, "it")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_or_a_wire_error(packed: bytes) -> None:
    try:
        unpack(packed, "it")
    except WireError:
        return

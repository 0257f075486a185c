"""Messages of programs in the ring: int32 both ways, or a seed in the place of an input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest
import torch

from teegpu.errors import WireError
from teegpu.ring import SEED_BYTES, Seed
from teegpu.wire import codec
from teegpu.wire.messages import PROTOCOL_VERSION, Execute, Hello, Result, Welcome
from tests.teegpu.wire.samples import LIMITS, RING, WELCOME, decoder, in_ring, result_of

SEED = Seed(bytes(range(SEED_BYTES)), (3, 5))
EXTREMES = torch.tensor([[-(2**31), -1, 0], [1, 2**31 - 1, 255]], dtype=torch.int32)


def received(encoded: codec.Encoded) -> list[memoryview]:
    return [memoryview(bytearray(frame)) for frame in encoded.frames]


def raw(header: Any, *frames: bytes) -> list[memoryview]:
    return [memoryview(bytearray(part)) for part in (msgpack.packb(header), *frames)]


def call(row: object, frame: bytes, replies: object = ("int32",)) -> list[memoryview]:
    return raw([PROTOCOL_VERSION, "execute", 0, RING.packed, replies, msgpack.packb([row])], frame)


def refused(frames: list[memoryview]) -> str:
    with pytest.raises(WireError) as caught:
        decoder().decode(frames)
    return str(caught.value)


def test_values_come_back_exactly() -> None:
    message = decoder().decode(received(in_ring(EXTREMES)))
    assert isinstance(message, Execute)
    assert message.program.in_ring
    found = message.tensors["n"]
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, EXTREMES)
    assert message.reply_encodings == {"qk": "int32"}


def test_a_seed_travels_in_its_own_bytes_whatever_it_stands_for() -> None:
    for shape in ((3, 5), (1024, 576)):
        encoded = in_ring(replace(SEED, shape=shape))
        assert [memoryview(frame).nbytes for frame in encoded.frames][1:] == [SEED_BYTES]
        message = decoder().decode(received(encoded))
        assert isinstance(message, Execute)
        assert message.tensors == {"n": replace(SEED, shape=shape)}
        assert message.encodings == {"n": "seed"}


def test_a_seed_is_not_shown() -> None:
    assert "0102" not in repr(SEED).replace("\\x", "")
    assert "(3, 5)" in repr(SEED)


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_seed_has_one_length(length: int) -> None:
    assert "a seed is 32 bytes" in refused(call(["n", [3, 5], "seed"], bytes(length)))
    with pytest.raises(ValueError, match="a seed is a key of 32 bytes"):
        Seed(bytes(length), (3, 5))


@pytest.mark.parametrize("shape", [[15], [1, 3, 5], [1, 1, 3, 5]])
def test_a_seed_stands_for_rows_and_columns(shape: list[int]) -> None:
    assert "(rows, columns)" in refused(call(["n", shape, "seed"], bytes(SEED_BYTES)))


@pytest.mark.parametrize("shape", [[4097, 1], [4096, 4096], [2**63, 2**63], [0, 5], [-1, 5], []])
def test_what_a_seed_stands_for_is_limited(shape: list[int]) -> None:
    assert LIMITS.message_bytes < 4096 * 4096
    refused(call(["n", shape, "seed"], bytes(SEED_BYTES)))


@pytest.mark.parametrize("replies", [["fp32"], ["seed"], ["int8"], ["int32", "int32"], [], [None]])
def test_replies_in_the_ring_are_int32(replies: list[object]) -> None:
    refused(call(["n", [3, 5], "seed"], bytes(SEED_BYTES), replies))


def test_a_result_holds_no_seed() -> None:
    packed = msgpack.packb([["q", [3, 5], "seed"]])
    frames = raw([PROTOCOL_VERSION, "result", 0, [0, 0, 0, 0, {}], packed], bytes(SEED_BYTES))
    assert "no seeds" in refused(frames)


def test_a_result_in_the_ring() -> None:
    encoded = result_of({"q": EXTREMES}, {"q": "int32"})
    message = decoder().decode(received(encoded))
    assert isinstance(message, Result)
    assert torch.equal(message.tensors["q"], EXTREMES)


def test_a_hello_asks_for_the_digest_and_a_welcome_tells_it() -> None:
    for asks in (True, False):
        hello = Hello(1, "0.1.0", ring=asks)
        assert decoder().decode(received(codec.encode_hello(hello))) == hello
    welcome = replace(WELCOME, ring_digest="cd" * 32)
    assert decoder().decode(received(codec.encode_welcome(welcome))) == welcome
    for value in (None, 7, b"cd", "x" * 257):
        body: dict[str, Any] = msgpack.unpackb(codec.encode_welcome(WELCOME).frames[0])[3]
        refused(raw([PROTOCOL_VERSION, "welcome", 1, {**body, "ring_digest": value}]))
    for asks_what in (None, 1, "yes"):
        refused(raw([PROTOCOL_VERSION, "hello", 1, "0.1.0", asks_what]))
    assert isinstance(welcome, Welcome)

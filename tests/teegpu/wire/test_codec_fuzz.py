"""Whatever the bytes are, a decoder gives a message or refuses them."""

from __future__ import annotations

import msgpack
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teegpu.errors import WireError
from teegpu.ring import Seed
from teegpu.wire import codec, dtypes
from teegpu.wire.messages import (
    PROTOCOL_VERSION,
    Execute,
    Health,
    HealthReport,
    Hello,
    Refusal,
    Result,
    Welcome,
)
from tests.teegpu.wire.samples import EMBED, HEALTH, WELCOME, decoder, execute, in_ring, result

SEEDS = [
    codec.encode_hello(Hello(1, "0.1.0")),
    codec.encode_welcome(WELCOME),
    codec.encode_health(Health(1, "0.1.0")),
    codec.encode_health_report(HEALTH),
    codec.encode_refusal(Refusal(2, "malformed", "why")),
    execute("fp32"),
    execute("int8"),
    result("bf16"),
    in_ring(torch.tensor([[1, -(2**31)]], dtype=torch.int32)),
    in_ring(Seed(bytes(range(32)), (3, 5))),
    codec.encode_execute(Execute(1, EMBED, {"ids": torch.tensor([1, 2])}, {"ids": "int32"}, {"x": "fp32"})),
]
MESSAGES = (Hello, Welcome, Health, HealthReport, Execute, Result, Refusal)
KINDS = ("hello", "welcome", "health", "health-report", "execute", "result", "refusal")

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=20)
    | st.text(max_size=10) | st.sampled_from([*KINDS, "x", *dtypes.NAMES]),
    lambda children: st.lists(children, max_size=6) | st.dictionaries(st.text(max_size=4), children, max_size=4),
    max_leaves=40,
)  # fmt: skip

headers = st.builds(
    lambda kind, number, body: msgpack.packb([PROTOCOL_VERSION, kind, number, *body]),
    st.sampled_from(KINDS),
    st.integers(0, 2**64 - 1),
    st.lists(anything, min_size=1, max_size=4),
)


def survives(frames: list[bytes]) -> None:
    try:
        message = decoder().decode([memoryview(bytearray(frame)) for frame in frames])
    except (WireError, codec.VersionError) as error:
        told = str(error)
    else:
        assert isinstance(message, MESSAGES)
        told = message.text if isinstance(message, Refusal) else ""
    assert told.isprintable()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.binary(max_size=60), max_size=5))
def test_any_frames_are_a_message_or_refused(frames: list[bytes]) -> None:
    survives(frames)


@settings(deadline=None, max_examples=300)
@given(headers | anything.map(msgpack.packb), st.lists(st.binary(max_size=24), max_size=4))
def test_any_header_is_a_message_or_refused(header: bytes, frames: list[bytes]) -> None:
    survives([header, *frames])


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(SEEDS), st.data())
def test_a_damaged_message_is_a_message_or_refused(seed: codec.Encoded, data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in seed.frames]
    for _ in range(data.draw(st.integers(1, 3))):
        frame = data.draw(st.sampled_from(frames))
        match data.draw(st.sampled_from(["flip", "cut", "grow", "drop", "swap", "repeat"])):
            case "flip" if frame:
                position = data.draw(st.integers(0, len(frame) - 1))
                frame[position] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del frame[data.draw(st.integers(0, len(frame))) :]
            case "grow":
                frame += data.draw(st.binary(min_size=1, max_size=8))
            case "drop" if len(frames) > 1:
                frames.pop(data.draw(st.integers(0, len(frames) - 1)))
            case "swap":
                frames = data.draw(st.permutations(frames))
            case "repeat":
                frames.insert(data.draw(st.integers(0, len(frames))), bytearray(frame))
    survives([bytes(frame) for frame in frames])


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(SEEDS), st.sampled_from(SEEDS))
def test_the_header_of_one_message_with_the_frames_of_another(one: codec.Encoded, other: codec.Encoded) -> None:
    survives([bytes(one.frames[0]), *(bytes(frame) for frame in other.frames[1:])])

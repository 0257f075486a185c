from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transports import envelope
from transports.envelope import ACCEPTS_ZSTD, RAW, REFUSED_CLOSING, REFUSED_LIMIT, SHUFFLED_ZSTD, ZSTD
from transports.errors import FrameError, LimitError

LIMITS = {"max_frames": 8, "max_message_bytes": 1000}


def head(magic: bytes = envelope.MAGIC, version: int = 1, flags: int = 0, count: int = 0) -> bytes:
    return struct.pack("<4sBBHQQ", magic, version, flags, count, 7, 0)


def entry(codec: int = RAW, itemsize: int = 1, length: int = 3) -> bytes:
    return struct.pack("<BBQ", codec, itemsize, length)


def test_raw_frames_come_back():
    packed = envelope.pack(2**64 - 1, [3, 0, 500], flags=ACCEPTS_ZSTD, measured=12345)
    read = envelope.unpack(packed, [3, 0, 500], **LIMITS)
    assert read.request_id == 2**64 - 1
    assert read.accepts_zstd
    assert read.refusal == 0
    assert read.measured == 12345
    assert read.raw_lengths == (3, 0, 500)
    assert read.raw_bytes == 503
    assert not read.compressed


def test_compressed_frames_say_their_true_length():
    packed = envelope.pack(1, [900, 3], [SHUFFLED_ZSTD, RAW], [2, 1])
    read = envelope.unpack(memoryview(packed), [400, 3], **LIMITS)
    assert read.compressed
    assert read.codecs == (SHUFFLED_ZSTD, RAW)
    assert read.itemsizes == (2, 1)


def test_many_frames_need_no_prepared_packer():
    lengths = list(range(200))
    read = envelope.unpack(envelope.pack(1, lengths), lengths, max_frames=200, max_message_bytes=10**6)
    assert read.raw_lengths == tuple(lengths)


@pytest.mark.parametrize(
    ("frame", "sizes", "says"),
    [
        (b"", [], "0 bytes"),
        (head()[:-1], [], "23 bytes"),
        (head(magic=b"HTTP"), [], "magic"),
        (head(version=2), [], "version 2"),
        (head(flags=0x20), [], "flags"),
        (head(flags=2 | 4, count=1) + entry(), [3], "flags"),
        (head() + b"x", [], "25 bytes for 0 frames"),
        (head(count=1), [3], "24 bytes for 1 frames"),
        (head(count=1) + entry(), [], "announces 1 frames, 0 came"),
        (head(count=2) + entry() * 2, [3], "announces 2 frames, 1 came"),
        (head(flags=2), [], "refusal with 0 frames"),
        (head(count=1) + entry(length=4), [3], "claims 4 bytes and holds 3"),
        (head(count=1) + entry(codec=3), [3], "unknown codec 3"),
        (head(count=1) + entry(itemsize=0), [3], "itemsize 0"),
    ],
)
def test_malformed(frame: bytes, sizes: list[int], says: str):
    with pytest.raises(FrameError, match=says):
        envelope.unpack(frame, sizes, **LIMITS)


def test_too_many_frames():
    with pytest.raises(LimitError, match=r"limits\.frames"):
        envelope.unpack(envelope.pack(1, [0] * 9), [0] * 9, **LIMITS)


def test_a_compressed_frame_is_held_to_its_true_length():
    packed = envelope.pack(1, [2**63, 2**63], [ZSTD, ZSTD], [1, 1])
    with pytest.raises(LimitError, match=r"limits\.message_mib"):
        envelope.unpack(packed, [10, 10], **LIMITS)


def test_the_request_id_of_another_version_can_be_read():
    assert envelope.peek_request_id(head(version=9)[:16] + b"whatever comes later") == 7
    assert envelope.peek_request_id(head(magic=b"HTTP")) is None
    assert envelope.peek_request_id(head()[:15]) is None


def test_refusal():
    packed, reason = envelope.pack_refusal(5, REFUSED_LIMIT, "too much")
    assert envelope.unpack(packed, [len(reason)], **LIMITS).refusal == REFUSED_LIMIT
    assert envelope.read_reason(reason) == "too much"


def test_a_reason_is_short_and_printable():
    _packed, reason = envelope.pack_refusal(5, REFUSED_CLOSING, "é" * 5000)
    assert len(reason) == envelope.MAX_REASON_BYTES
    assert envelope.read_reason(b"\x1b[31mred\nline\xff" + b"x" * 10**6).startswith("?[31mred?line")
    assert len(envelope.read_reason(b"x" * 10**6)) == envelope.MAX_REASON_BYTES


@given(st.binary(max_size=200), st.lists(st.integers(0, 2000), max_size=10))
def test_any_bytes_give_an_envelope_or_an_error(frame: bytes, sizes: list[int]):
    try:
        envelope.unpack(frame, sizes, **LIMITS)
    except (FrameError, LimitError):
        return
    raise AssertionError("random bytes were taken for an envelope")


@given(st.lists(st.integers(0, 300), max_size=8), st.data())
def test_a_damaged_envelope_never_yields_more_than_it_may(sizes: list[int], data: st.DataObject):
    damaged = bytearray(envelope.pack(1, sizes))
    position = data.draw(st.integers(0, len(damaged) - 1))
    damaged[position] = data.draw(st.integers(0, 255))
    try:
        read = envelope.unpack(damaged, sizes, **LIMITS)
    except (FrameError, LimitError):
        return
    assert read.raw_bytes <= LIMITS["max_message_bytes"]
    assert len(read.raw_lengths) == len(sizes) <= LIMITS["max_frames"]
    assert all(read.codecs[i] or read.raw_lengths[i] == sizes[i] for i in range(len(sizes)))


@given(
    st.integers(0, 2**64 - 1),
    st.lists(
        st.tuples(st.integers(0, 100), st.sampled_from([RAW, ZSTD, SHUFFLED_ZSTD]), st.integers(1, 255)), max_size=8
    ),
    st.sampled_from([0, ACCEPTS_ZSTD]),
    st.integers(0, 2**64 - 1),
)
def test_what_is_packed_is_unpacked(request_id: int, frames: list[tuple[int, int, int]], flags: int, measured: int):
    lengths, codecs, itemsizes = ([frame[i] for frame in frames] for i in range(3))
    packed = envelope.pack(request_id, lengths, codecs, itemsizes, flags=flags, measured=measured)
    read = envelope.unpack(packed, lengths, **LIMITS)
    expected = (request_id, flags, measured, tuple(codecs), tuple(itemsizes), tuple(lengths))
    assert (read.request_id, read.flags, read.measured, read.codecs, read.itemsizes, read.raw_lengths) == expected

"""The codec on good and bad data, and the policy with an injected clock and bandwidth."""

from __future__ import annotations

import contextlib
import struct
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from transports.base import COMPRESSED_FROM_BYTES, FrameKind
from transports.compression import RESAMPLE_FRAMES, WINDOW, Bandwidth, Compressor, spread
from transports.errors import FrameError
from transports.framecodec import RAW, SHUFFLED_ZSTD, ZSTD, FrameCodec, shuffle, unshuffle

MB = 10**6
FP16 = FrameKind("hidden/fp16", 2)


def activations(count: int = 2**20, dtype: type = np.float16) -> bytes:
    """Like the real ones: normally distributed values of few exponents."""
    return np.random.default_rng(0).standard_normal(count).astype(dtype).tobytes()


def noise(size: int = 2**21) -> bytes:
    return np.random.default_rng(1).bytes(size)


class TickingClock:
    """Each reading is ``step`` seconds after the last, so the codec seems to take exactly that long."""

    def __init__(self, step: float) -> None:
        self.now = 0.0
        self.step = step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def compressor(bandwidth: float | Callable[[], float | None] | None = None) -> Compressor:
    source = bandwidth if callable(bandwidth) else lambda: bandwidth
    return Compressor(1, source, min_bytes=0, cost_clock=TickingClock(1e-4))


def round_trip(data: bytes, itemsize: int) -> tuple[memoryview, int]:
    compressed, codec = FrameCodec(1).encode(np.frombuffer(data, np.uint8), itemsize)
    received, _ = compressor().decompress([memoryview(compressed)], [codec], [itemsize], [len(data)])
    return received[0], codec


# ---- the codec


@given(data=st.binary(max_size=4000), itemsize=st.sampled_from([2, 4]))
@settings(deadline=None)
def test_shuffle_round_trip(data: bytes, itemsize: int) -> None:
    source = np.frombuffer(data, np.uint8)
    there, back = np.empty_like(source), np.empty_like(source)
    shuffle(source, itemsize, there)
    unshuffle(there, itemsize, back)
    assert back.tobytes() == data


def test_shuffle_groups_bytes_by_their_place_and_keeps_the_tail() -> None:
    source = np.frombuffer(bytes([1, 10, 2, 20, 3, 30, 99]), np.uint8)
    out = np.empty_like(source)
    shuffle(source, 2, out)
    assert out.tolist() == [1, 2, 3, 10, 20, 30, 99]
    wide = np.frombuffer(bytes(range(8)) + b"xyz", np.uint8)
    out = np.empty_like(wide)
    shuffle(wide, 4, out)
    assert out.tobytes() == bytes([0, 4, 1, 5, 2, 6, 3, 7]) + b"xyz"


@given(data=st.binary(min_size=1, max_size=4000), itemsize=st.integers(1, 8))
@settings(deadline=None, max_examples=50)
def test_frames_of_any_length_and_item_size_survive(data: bytes, itemsize: int) -> None:
    received, codec = round_trip(data, itemsize)
    assert bytes(received) == data
    assert codec == (SHUFFLED_ZSTD if itemsize in (2, 4) else ZSTD)


def test_received_frames_are_writable_bytes() -> None:
    received, _ = round_trip(activations(1000), 2)
    assert not received.readonly
    assert received.format == "B"
    raw, _ = compressor().decompress([memoryview(b"read-only")], [RAW], [1], [9])
    raw[0][0] = 0
    own = bytearray(b"ours")
    same, _ = compressor().decompress([memoryview(own)], [RAW], [1], [4])
    same[0][0] = 0
    assert own[0] == 0, "a writable raw frame is passed on, not copied"


def test_shuffling_helps_on_activations() -> None:
    data = np.frombuffer(activations(), np.uint8)
    codec = FrameCodec(1)
    assert len(codec.encode(data, 2)[0]) < 0.95 * len(codec.encode(data, 1)[0])


def test_decompression_reports_sizes_before_and_after() -> None:
    ours = compressor(1)
    data = activations(5000)
    frames, codecs, itemsizes, up = ours.compress([data], [FP16])
    _, down = ours.decompress([memoryview(frames[0])], codecs, itemsizes, [len(data)])
    assert (down.raw_bytes, down.compressed_bytes) == (up.raw_bytes, up.compressed_bytes) == (10000, len(frames[0]))
    assert down.seconds > 0


# ---- bad data


def decode(frame: bytes, raw_length: int, codec: int = ZSTD, itemsize: int = 1) -> bytes:
    received, _ = compressor().decompress([memoryview(frame)], [codec], [itemsize], [raw_length])
    return bytes(received[0])


def test_every_flipped_byte_of_the_payload_is_noticed() -> None:
    data = activations(600)
    frame = bytearray(FrameCodec(1).encode(np.frombuffer(data, np.uint8), 2)[0])
    header_bytes = zstandard.frame_header_size(bytes(frame))
    for place in range(header_bytes, len(frame)):
        frame[place] ^= 0x41
        with pytest.raises(FrameError):
            decode(bytes(frame), len(data), SHUFFLED_ZSTD, 2)
        frame[place] ^= 0x41
    assert decode(bytes(frame), len(data), SHUFFLED_ZSTD, 2) == data


@given(
    garbage=st.binary(max_size=300), length=st.integers(0, 5000), codec=st.integers(0, 4), itemsize=st.integers(0, 9)
)
@settings(deadline=None)
def test_garbage_gives_bytes_or_a_frame_error(garbage: bytes, length: int, codec: int, itemsize: int) -> None:
    for frame in (garbage, b"\x28\xb5\x2f\xfd" + garbage):
        with contextlib.suppress(FrameError):
            assert len(decode(frame, length, codec, itemsize)) == length


@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
@settings(deadline=None)
def test_a_changed_byte_anywhere_gives_the_same_data_or_a_frame_error(place: int, value: int) -> None:
    frame = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(b"some text, some more text " * 50))
    frame[place % len(frame)] = value
    with contextlib.suppress(FrameError):
        assert decode(bytes(frame), 1300) == b"some text, some more text " * 50


@pytest.mark.parametrize("cut", [1, 3, 5, 100, 1005])
def test_truncated(cut: int) -> None:
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(noise(1000))
    with pytest.raises(FrameError, match="frame 0"):
        decode(frame[:-cut], 1000)


def test_a_zip_bomb_is_refused_before_memory_is_taken() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(256 * 2**20))
    assert len(bomb) < 50_000
    tracemalloc.start()
    try:
        with pytest.raises(FrameError, match="claims to hold 1000 bytes, its zstd header says 268435456 bytes"):
            decode(bomb, 1000)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_a_bomb_whose_header_lies_stops_at_the_declared_size() -> None:
    # Header: magic, single segment with a one-byte size of 100; block: last, run-length, 128 KiB of one byte.
    frame = b"\x28\xb5\x2f\xfd" + b"\x20\x64" + struct.pack("<I", 1 | 1 << 1 | 131072 << 3)[:3] + b"\x07"
    assert zstandard.frame_content_size(frame) == 100
    with pytest.raises(FrameError):
        decode(frame, 100)
    honest = b"\x28\xb5\x2f\xfd" + b"\x20\x64" + struct.pack("<I", 1 | 1 << 1 | 100 << 3)[:3] + b"\x07"
    assert decode(honest, 100) == b"\x07" * 100


@pytest.mark.parametrize("length", [0, 999, 1001, 2**62])
def test_false_length(length: int) -> None:
    frame = zstandard.ZstdCompressor().compress(noise(1000))
    with pytest.raises(FrameError, match="claims to hold"):
        decode(frame, length)
    with pytest.raises(FrameError, match="claims to hold"):
        decode(noise(1000), length, RAW)


def test_an_undeclared_size_is_refused() -> None:
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(b"abc")
    with pytest.raises(FrameError, match="no length"):
        decode(frame, 3)


def test_nothing_may_hide_behind_a_frame() -> None:
    frame = zstandard.ZstdCompressor().compress(b"abc" * 100)
    for hidden in (b"t", b"tail", frame, zstandard.ZstdCompressor().compress(b"")):
        with pytest.raises(FrameError):
            decode(frame + hidden, 300)


@pytest.mark.parametrize(("codec", "itemsize"), [(3, 1), (255, 2), (2, 1), (2, 0), (2, 3), (2, 8)])
def test_bad_codec_or_item_size(codec: int, itemsize: int) -> None:
    frame = zstandard.ZstdCompressor().compress(bytes(64))
    with pytest.raises(FrameError, match=r"unknown codec|item size"):
        decode(frame, 64, codec, itemsize)


def test_lists_of_different_lengths() -> None:
    with pytest.raises(FrameError, match="bad envelope"):
        compressor().decompress([memoryview(b"x")], [0], [1], [1, 1])
    with pytest.raises(ValueError, match="one kind per frame"):
        compressor().compress([b"x", b"y"], [FP16])


def test_a_bad_frame_does_not_spoil_the_next() -> None:
    ours = compressor(1)
    data = activations(5000)
    frames, codecs, itemsizes, _ = ours.compress([data], [FP16])
    with pytest.raises(FrameError):
        ours.decompress([memoryview(frames[0])[:-20]], codecs, itemsizes, [len(data)])
    received, _ = ours.decompress([memoryview(frames[0])], codecs, itemsizes, [len(data)])
    assert bytes(received[0]) == data


# ---- the policy


@pytest.mark.parametrize("level", [0, 20])
def test_levels_that_cannot_be(level: int) -> None:
    with pytest.raises(ValueError, match="level"):
        Compressor(level, lambda: None)


def test_what_is_random_goes_raw_and_is_not_sampled() -> None:
    data = activations()
    frames, codecs, itemsizes, done = compressor(MB).compress([data], [FrameKind("x/int32", 4, random=True)])
    assert frames[0] is data
    assert (codecs, itemsizes, done.tried_bytes) == ([RAW], [1], 0)


def test_a_slow_link_compresses_and_a_fast_one_does_not() -> None:
    data = activations()
    # By the injected clock, 128 KiB take 0.2 ms both ways: 1.5 ms per MB. Saving 15 % pays below some 100 MB/s.
    frames, codecs, itemsizes, done = compressor(10 * MB).compress([data], [FP16])
    assert (codecs, itemsizes) == ([SHUFFLED_ZSTD], [2])
    assert len(data) == done.raw_bytes > done.compressed_bytes == len(frames[0])
    frames, codecs, itemsizes, done = compressor(500 * MB).compress([data], [FP16])
    assert frames[0] is data
    assert (codecs, itemsizes, done.raw_bytes) == ([RAW], [1], 0)


def test_the_threshold_is_where_time_saved_equals_time_spent() -> None:
    data = activations()
    sample = spread(np.frombuffer(data, np.uint8), 8, 16384)
    ratio = FrameCodec(1).trial(sample, 2, time.perf_counter)[0] / sample.size
    # By the injected clock the sample takes 0.1 ms one way: three readings, two steps, 128 KiB.
    threshold = (1 - ratio) / (2e-4 / sample.size)
    for factor, codec in ((0.8, SHUFFLED_ZSTD), (1.25, RAW)):
        assert compressor(threshold * factor).compress([data], [FP16])[1] == [codec]


@pytest.mark.parametrize(("dtype", "itemsize"), [(np.float16, 2), (np.float32, 4), (np.int8, 1)])
def test_a_sample_predicts_the_ratio_of_the_whole_frame(dtype: type, itemsize: int) -> None:
    values = np.random.default_rng(2).standard_normal(2**21) * 30
    data = values.clip(-127, 127).astype(dtype).view(np.uint8)
    codec = FrameCodec(1)
    sample = spread(data, 8, 16384)
    predicted = codec.trial(sample, itemsize, time.perf_counter)[0] / sample.size
    assert predicted == pytest.approx(len(codec.encode(data, itemsize)[0]) / data.size, abs=0.02)


def test_noise_is_sent_raw_even_on_a_slow_link() -> None:
    assert compressor(1 * MB).compress([noise()], [FrameKind("noise", 2)])[1] == [RAW]


def test_frames_go_raw_until_the_first_large_exchange_has_measured_the_link() -> None:
    data = activations()
    link = Bandwidth()
    ours = compressor(lambda: link.bytes_per_second)
    _, codecs, _, done = ours.compress([data], [FP16])
    assert codecs == [RAW]
    assert done.tried_bytes == 0
    link.observe(len(data), 1.0)
    assert link.bytes_per_second == len(data)
    assert ours.compress([data], [FP16])[1] == [SHUFFLED_ZSTD]


def test_the_decision_follows_the_bandwidth_at_once() -> None:
    bandwidth = [5 * MB]
    ours = compressor(lambda: bandwidth[0])
    data = activations()
    for now, codec, tried in ((5, SHUFFLED_ZSTD, True), (5000, RAW, False), (5, SHUFFLED_ZSTD, True)):
        bandwidth[0] = now * MB
        _, codecs, _, done = ours.compress([data], [FP16])
        assert (codecs, done.tried_bytes >= len(data)) == ([codec], tried)


def test_kinds_are_decided_apart() -> None:
    ours = compressor(10 * MB)
    _, codecs, _, _ = ours.compress([activations(), noise()], [FP16, FrameKind("noise", 1)])
    assert codecs == [SHUFFLED_ZSTD, RAW]


def test_a_kind_that_changes_is_sampled_again() -> None:
    ours = compressor(10 * MB)
    kind = FrameKind("changing", 1)
    assert ours.compress([noise()], [kind])[1] == [RAW]
    text = b"all work and no play " * 2**16
    codecs = [ours.compress([text], [kind])[1][0] for _ in range(RESAMPLE_FRAMES)]
    assert codecs[:-1] == [RAW] * (RESAMPLE_FRAMES - 1)
    assert codecs[-1] == ZSTD


def test_frames_that_stop_shrinking_go_raw() -> None:
    ours = compressor(10 * MB)
    kind = FrameKind("changing", 1)
    assert ours.compress([b"all work and no play " * 2**16], [kind])[1] == [ZSTD]
    frame = noise()
    sent = [ours.compress([frame], [kind]) for _ in range(40)]
    assert all(frames[0] is frame for frames, _, _, _ in sent)
    assert sent[-1][3].tried_bytes == 0, "one that is not compressed is not tried either"


def test_small_frames_and_empty_frames_stay_raw() -> None:
    ours = Compressor(1, lambda: 1.0)
    small, empty = bytes(COMPRESSED_FROM_BYTES - 1), b""
    _, codecs, itemsizes, _ = ours.compress([small, empty, bytes(COMPRESSED_FROM_BYTES)], [])
    assert codecs == [RAW, RAW, ZSTD]
    assert itemsizes == [1, 1, 1]
    assert compressor(1).compress([empty], [])[1] == [RAW]


def test_a_fast_link_costs_less_than_one_per_cent() -> None:
    """The processor time that the policy takes, of the time that a 2 GB/s loopback needs for the same frames."""
    ours = Compressor(1, lambda: 2e9)
    data = activations(2**17)  # as a chunk's frames are
    kinds = [FrameKind(f"kind {index}", 2) for index in range(4)]
    ours.compress([data], kinds[:1])  # the one sample that tells how fast the codec is
    started = time.thread_time()  # not the wall clock: another process on this core is not the policy's cost
    for _ in range(200):
        assert ours.compress([data] * 4, kinds)[1] == [RAW] * 4
    share = (time.thread_time() - started) / (200 * 4 * len(data) / 2e9)
    print(f"compression policy on loopback: {share:.2%} of the transfer")
    assert share < 0.05  # the transfer is a tenth of the time that the frame takes


# ---- the link estimate


def test_latency_is_taken_off_the_bandwidth_samples() -> None:
    link = Bandwidth()
    for _ in range(3):
        link.observe(200, 0.005)
    link.observe(4_000_000, 0.005 + 0.032)
    assert link.bytes_per_second == pytest.approx(125e6)


def test_a_latency_that_is_wrong_makes_the_link_look_a_third_faster_at_most() -> None:
    link = Bandwidth()
    link.observe(200, 5.0)
    link.observe(1_000_000, 0.5)
    assert link.bytes_per_second == pytest.approx(4e6 / 1.5)


def test_the_estimate_is_the_largest_recent_rate() -> None:
    link = Bandwidth()
    link.observe(10 * MB, 0.1)
    for _ in range(WINDOW - 1):
        link.observe(10 * MB, 1.0)  # it waited behind others, or the peer was busy
    assert link.bytes_per_second == pytest.approx(100 * MB)
    link.observe(10 * MB, 1.0)  # no: the link has become slower
    assert link.bytes_per_second == pytest.approx(10 * MB)


def test_samples_that_cannot_be_are_ignored() -> None:
    link = Bandwidth()
    for size, seconds in ((0, 1.0), (MB, 0.0), (MB, -1.0), (MB, float("nan")), (-5, 1.0)):
        link.observe(size, seconds)
    assert link.bytes_per_second is None

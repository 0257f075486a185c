"""When to compress a frame: where that is quicker than to send it as it is, by measurement.

Activations hardly compress as they lie: the exponent bytes repeat, the mantissa bytes are noise, and the two alternate.
So values of 2 or 4 bytes are shuffled first (see ``framecodec``): on real activations in fp16 zstd then saves 13 % in
place of 7 %, at about twice the speed.

Compression trades processor time for time on the link, and on a fast link that is a loss. A frame of at least
``COMPRESSED_FROM_BYTES`` is compressed when

    bytes saved / link bandwidth  >  seconds to compress it here + seconds to undo that at the peer

How far a kind of frame shrinks and what the codec costs is measured on a sample of the first such frame, again after
``RESAMPLE_FRAMES`` that went raw, and on every frame that is compressed: in this thread's processor time, since what
other threads and processes took meanwhile says nothing of the next frame. No sample is taken of bytes that the sender
calls random, nor where the link outruns even a codec that saves everything. The bandwidth is measured with every large
exchange, from the first one on; until then frames go raw.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from transports.base import COMPRESSED_FROM_BYTES, Buffer, Compression, FrameKind
from transports.errors import FrameError
from transports.framecodec import MAX_LEVEL, MIN_LEVEL, RAW, SHUFFLED_ZSTD, FrameCodec

MAX_KINDS = 1024
"""Kinds of frames that are told apart. A model has some tens; a peer that invents more has them all forgotten."""

RESAMPLE_FRAMES = 64
SAMPLE_SLICES, SAMPLE_SLICE_BYTES = 8, 16 * 1024  # spread over the frame: its start alone is not typical of it
BLEND = 0.25  # weight of a new whole-frame measurement: one preempted frame must not overturn the decision

LATENCY_BYTES = 64 * 1024
"""A smaller exchange tells the link's latency, a larger one its bandwidth."""

WINDOW = 32
"""Exchanges that the estimate of the link rests on: it follows a link that gets slower within so many."""

_NO_KIND = FrameKind("frame")


class Bandwidth:
    """The link's bytes per second, from exchanges whose times also hold what is not the link's: waiting behind other
    messages, and for a process that is busy.

    An exchange can take longer than the link needs for its own bytes, never less, so the quickest of the recent ones
    is the best estimate. With four chunks of a prompt in flight, beside a busy machine, it said 25 to 27 MB/s of a link
    of 25 and 119 to 125 of one of 125, and 1,100 and more of a local socket.
    """

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=WINDOW)
        self._latencies: deque[float] = deque(maxlen=WINDOW)

    def observe(self, transferred_bytes: int, seconds: float) -> None:
        """An exchange: its bytes both ways, and its seconds without those that the peer spent."""
        if transferred_bytes <= 0 or not seconds > 0.0:
            return
        if transferred_bytes < LATENCY_BYTES:
            self._latencies.append(seconds)
            return
        # A latency can be as wrong as any other sample (a hello to a busy machine): it may explain a quarter, no more.
        self._rates.append(transferred_bytes / max(seconds - min(self._latencies, default=0.0), 0.75 * seconds))

    @property
    def bytes_per_second(self) -> float | None:
        return max(self._rates, default=None)


@dataclass(slots=True)
class _Kind:
    """What is known of one kind of frame: bytes after over bytes before, seconds per byte each way."""

    ratio: float | None = None
    encode: float = 0.0
    decode: float = 0.0
    raw_frames: int = 0
    """Since the last sample."""

    def pays(self, bandwidth: float) -> bool:
        return self.ratio is not None and (1.0 - self.ratio) / bandwidth > self.encode + self.decode


class Compressor:
    """Compresses what one side sends and decompresses what it receives. For one thread at a time.

    ``level`` is zstd's (1 to 19). ``bandwidth`` gives the link's bytes per second, or None while they are not known.
    Frames under ``min_bytes`` always go raw. Raises ``ValueError`` for a level that can't be.
    """

    def __init__(
        self,
        level: int,
        bandwidth: Callable[[], float | None],
        *,
        min_bytes: int = COMPRESSED_FROM_BYTES,
        cost_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        if not MIN_LEVEL <= level <= MAX_LEVEL:
            raise ValueError(f"compression level {level} is out of range: set level to {MIN_LEVEL} … {MAX_LEVEL}")
        self._bandwidth = bandwidth
        self._min_bytes = max(1, min_bytes)
        self._cost_clock = cost_clock
        self._codec = FrameCodec(level)
        self._kinds: dict[str, _Kind] = {}

    def compress(
        self, frames: Sequence[Buffer], kinds: Sequence[FrameKind]
    ) -> tuple[list[Buffer], list[int], list[int], Compression]:
        """The frames to send, the codec of each (0 raw, 1 zstd, 2 shuffle+zstd), the itemsize of each (1 unless
        shuffled), and what was done. ``kinds`` is empty or as long as ``frames``; frames are contiguous buffers and are
        not modified. A frame that is sent raw is returned itself.

        In the ``Compression``, ``tried_bytes`` went through the codec (samples included), ``raw_bytes`` and
        ``compressed_bytes`` are the sizes before and after of the frames that are sent compressed.
        """
        if kinds and len(kinds) != len(frames):
            raise ValueError(f"{len(frames)} frames but {len(kinds)} kinds: give one kind per frame, or none")
        done = Compression()
        sent = list(frames)
        codecs = [RAW] * len(sent)
        itemsizes = [1] * len(sent)
        bandwidth = self._bandwidth()
        for index, frame in enumerate(frames if bandwidth else ()):
            kind = kinds[index] if kinds else _NO_KIND
            if memoryview(frame).nbytes >= self._min_bytes and not kind.random:
                sent[index], codecs[index] = self._compress_frame(frame, kind, bandwidth or 0.0, done)
                if codecs[index] == SHUFFLED_ZSTD:
                    itemsizes[index] = kind.itemsize
        return sent, codecs, itemsizes, done

    def _compress_frame(
        self, frame: Buffer, kind: FrameKind, bandwidth: float, done: Compression
    ) -> tuple[Buffer, int]:
        known = self._kinds.get(kind.label)
        if known is None:
            if len(self._kinds) >= MAX_KINDS:
                self._kinds.clear()
            known = self._kinds[kind.label] = _Kind()
        data = np.frombuffer(frame, np.uint8)
        if known.ratio is None or known.raw_frames >= RESAMPLE_FRAMES:
            costs = (each.encode + each.decode for each in self._kinds.values() if each.ratio is not None)
            # On a link that outruns the codec no ratio can pay.
            if min(costs, default=0.0) * bandwidth < 1.0:
                self._sample(data, kind.itemsize, known, done)
        if not known.pays(bandwidth):
            known.raw_frames += 1
            return frame, RAW
        started, began = self._cost_clock(), time.perf_counter()
        compressed, codec = self._codec.encode(data, kind.itemsize)
        known.encode = _blend(known.encode, (self._cost_clock() - started) / data.size)
        known.ratio = _blend(known.ratio, len(compressed) / data.size)
        done.seconds += time.perf_counter() - began
        done.tried_bytes += data.size
        if len(compressed) >= data.size:
            return frame, RAW
        done.raw_bytes += data.size
        done.compressed_bytes += len(compressed)
        return compressed, codec

    def _sample(self, data: NDArray[np.uint8], itemsize: int, known: _Kind, done: Compression) -> None:
        """Measure twice on a sample. The faster time counts: a cold cache slows the other one."""
        began = time.perf_counter()
        sample = spread(data, SAMPLE_SLICES, SAMPLE_SLICE_BYTES)
        trials = [self._codec.trial(sample, itemsize, self._cost_clock) for _ in range(2)]
        after, encode, decode = min(trials, key=lambda trial: trial[1] + trial[2])
        known.ratio, known.encode, known.decode = after / sample.size, encode / sample.size, decode / sample.size
        known.raw_frames = 0
        done.seconds += time.perf_counter() - began
        done.tried_bytes += 2 * sample.size

    def decompress(
        self,
        frames: Sequence[memoryview],
        codecs: Sequence[int],
        itemsizes: Sequence[int],
        raw_lengths: Sequence[int],
    ) -> tuple[list[memoryview], Compression]:
        """The frames as they were before ``compress``, as writable memoryviews of bytes, and what was done.

        Nothing larger than a frame's ``raw_length`` is allocated for it: check those against your limits first. A raw
        frame is passed on without a copy when its memory is writable.

        Raises ``FrameError`` for an unknown codec, an itemsize that can't be, a length that is not the true one, and
        data that are not exactly one zstd frame.
        """
        done = Compression()
        if not len(frames) == len(codecs) == len(itemsizes) == len(raw_lengths):
            raise FrameError(
                f"{len(frames)} frames came with {len(codecs)} codecs, {len(itemsizes)} item sizes and "
                f"{len(raw_lengths)} lengths: the peer sent a bad envelope"
            )
        received: list[memoryview] = []
        for index, (frame, codec, itemsize, raw_length) in enumerate(
            zip(frames, codecs, itemsizes, raw_lengths, strict=True)
        ):
            if codec == RAW:
                received.append(_raw(frame, raw_length, index))
                continue
            began = time.perf_counter()
            received.append(self._codec.decode(frame, codec, itemsize, raw_length, index))
            done.seconds += time.perf_counter() - began
            done.tried_bytes += raw_length
            done.raw_bytes += raw_length
            done.compressed_bytes += frame.nbytes
        return received, done


def spread(data: NDArray[np.uint8], slices: int, slice_bytes: int) -> NDArray[np.uint8]:
    """At most ``slices`` x ``slice_bytes`` bytes of ``data`` (uint8 [n]) from all over it, cut at multiples of 16."""
    if data.size <= slices * slice_bytes:
        return data
    stride = (data.size - slice_bytes) // max(slices - 1, 1) // 16 * 16
    return np.concatenate([data[i * stride : i * stride + slice_bytes] for i in range(slices)])


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + BLEND * (new - old)


def _raw(frame: memoryview, raw_length: int, index: int) -> memoryview:
    if frame.nbytes != raw_length:
        raise FrameError(
            f"frame {index} claims to hold {raw_length} bytes but holds {frame.nbytes}: the peer broke the framing"
        )
    return memoryview(bytearray(frame)) if frame.readonly else frame

"""One frame through zstd and the byte-shuffle, and back. The way back trusts nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import zstandard
from numpy.typing import NDArray

from transports.errors import FrameError

RAW, ZSTD, SHUFFLED_ZSTD = 0, 1, 2
SHUFFLED_ITEMSIZES = (2, 4)

MIN_LEVEL, MAX_LEVEL = 1, 19  # above 19 zstd needs windows of up to 128 MiB on both sides, for a few per cent
SCRATCH_BYTES = 16 * 2**20  # the shuffle's buffer is kept between frames up to this size


def shuffle(data: NDArray[np.uint8], itemsize: int, out: NDArray[np.uint8]) -> None:
    """Put the lowest bytes of all values first, then all second bytes, and so on.

    ``data`` and ``out`` are uint8 [n], ``out`` another buffer; ``itemsize`` is 2 or 4. Bytes beyond the last whole
    value are copied behind. Little-endian values, whatever this machine is.
    """
    count, whole = _planes(data.size, itemsize)
    values = data[:whole].view(f"<u{itemsize}")
    planes = out[:whole].reshape(itemsize, count)
    np.copyto(planes[0], values, casting="unsafe")
    for plane in range(1, itemsize):
        np.right_shift(values, 8 * plane, out=planes[plane], casting="unsafe")
    out[whole:] = data[whole:]


def unshuffle(data: NDArray[np.uint8], itemsize: int, out: NDArray[np.uint8]) -> None:
    """The inverse of ``shuffle``: uint8 [n] to uint8 [n]."""
    count, whole = _planes(data.size, itemsize)
    planes = data[:whole].reshape(itemsize, count)
    values = out[:whole].view(f"<u{itemsize}")
    np.copyto(values, planes[itemsize - 1])
    for plane in range(itemsize - 2, -1, -1):
        np.left_shift(values, 8, out=values)
        np.bitwise_or(values, planes[plane], out=values)
    out[whole:] = data[whole:]


def _planes(size: int, itemsize: int) -> tuple[int, int]:
    count = size // itemsize
    return count, count * itemsize


def zstd_frame_bytes(frame: memoryview) -> int | None:
    """How long the zstd frame at the start of ``frame`` is, from its block headers; None if they end too early.

    zstd itself leaves a missing end, or bytes behind it, unmentioned once it has all of the content. Raises
    ``zstandard.ZstdError`` when the frame's own header is bad.
    """
    position = zstandard.frame_header_size(frame)
    has_checksum = zstandard.get_frame_parameters(frame).has_checksum
    is_last = False
    while not is_last:
        if position + 3 > frame.nbytes:
            return None
        header = int.from_bytes(frame[position : position + 3], "little")
        is_last, is_run, size = bool(header & 1), header >> 1 & 3 == 1, header >> 3
        position += 3 + (1 if is_run else size)
    return position + (4 if has_checksum else 0)


class FrameCodec:
    """zstd at one level, its objects and buffers reused from frame to frame. For one thread at a time."""

    def __init__(self, level: int) -> None:
        # The checksum costs nothing beside zstd, and without it some corrupt data decodes to other values in silence.
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
        self._decompressor = zstandard.ZstdDecompressor()
        self._scratch = np.empty(0, np.uint8)

    def encode(self, data: NDArray[np.uint8], itemsize: int) -> tuple[bytes, int]:
        """``data`` (uint8 [n]) compressed, and the codec that did it."""
        if itemsize not in SHUFFLED_ITEMSIZES:
            return self._compressor.compress(data.data), ZSTD
        scratch = self._scratch_of(data.size)
        shuffle(data, itemsize, scratch)
        return self._compressor.compress(scratch.data), SHUFFLED_ZSTD

    def trial(self, data: NDArray[np.uint8], itemsize: int, clock: Callable[[], float]) -> tuple[int, float, float]:
        """What a whole frame of data like this sample (uint8 [n], n > 0) would come to: the bytes that the sample is
        compressed to, the seconds to encode it, the seconds to decode it.

        The planes of the shuffle are compressed apart. In a whole frame each fills zstd's blocks of 128 KiB by itself;
        in the small sample they would share one, and with it one table of symbols, and compress much worse.
        """
        planes = itemsize if itemsize in SHUFFLED_ITEMSIZES else 1
        started = clock()
        shuffled = data
        if planes > 1:
            shuffled = np.empty_like(data)
            shuffle(data, itemsize, shuffled)
        parts = [part for part in np.array_split(shuffled, planes) if part.size]
        compressed = [self._compressor.compress(part.data) for part in parts]
        encoded = clock()
        for part, frame in zip(parts, compressed, strict=True):
            self.decode(memoryview(frame), ZSTD, 1, part.size, 0)
        if planes > 1:
            unshuffle(shuffled, itemsize, np.empty_like(data))
        return sum(map(len, compressed)), encoded - started, clock() - encoded

    def decode(self, frame: memoryview, codec: int, itemsize: int, raw_length: int, index: int) -> memoryview:
        """The ``raw_length`` bytes in ``frame``, writable; nothing larger than that is allocated.

        ``index`` is the frame's place in its message, for error messages. Raises ``FrameError`` for an unknown codec,
        an item size that can't be, a false length, and data that are not exactly one intact zstd frame.
        """
        if codec not in (ZSTD, SHUFFLED_ZSTD):
            raise FrameError(f"frame {index} has the unknown codec {codec}: the peer is broken or of another version")
        if codec == SHUFFLED_ZSTD and itemsize not in SHUFFLED_ITEMSIZES:
            raise FrameError(f"frame {index} is shuffled with item size {itemsize}: only 2 and 4 exist")
        try:
            declared = zstandard.frame_content_size(frame)
            size = zstd_frame_bytes(frame)
        except zstandard.ZstdError as error:
            raise FrameError(f"frame {index} is not zstd data ({error}): the link or the peer corrupts it") from error
        if declared != raw_length:
            true_length = f"{declared} bytes" if declared >= 0 else "no length"
            raise FrameError(
                f"frame {index} claims to hold {raw_length} bytes, its zstd header says {true_length}: "
                "the peer broke the framing"
            )
        if size != frame.nbytes:
            what = "is cut short" if size is None or size > frame.nbytes else "has more behind its zstd data"
            raise FrameError(f"frame {index} {what}: the peer broke the framing")
        out = np.empty(raw_length, np.uint8)
        target = self._scratch_of(raw_length) if codec == SHUFFLED_ZSTD else out
        try:
            # The whole frame is there, and the target has its declared size: zstd decodes straight into it.
            with self._decompressor.stream_reader(frame) as reader:
                filled = reader.readinto(target) if raw_length else 0
                excess = reader.readinto(bytearray(1))
        except zstandard.ZstdError as error:
            raise FrameError(f"frame {index} is corrupt ({error}): the link or the peer corrupts it") from error
        if filled != raw_length or excess:
            relation = "more than" if excess else f"only {filled} of"
            raise FrameError(f"frame {index} holds {relation} the {raw_length} bytes that it declares")
        if codec == SHUFFLED_ZSTD:
            unshuffle(target, itemsize, out)
        return out.data

    def _scratch_of(self, size: int) -> NDArray[np.uint8]:
        """A buffer of ``size`` bytes, valid until the next call."""
        if size > SCRATCH_BYTES:
            return np.empty(size, np.uint8)
        if size > self._scratch.size:
            self._scratch = np.empty(size, np.uint8)
        return self._scratch[:size]

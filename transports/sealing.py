"""Messages of a link with keys: what is sealed, and how a message's parts are laid out. Bytes in, bytes out, no I/O.

A message of any number of parts becomes one sealed frame, and one more for each large part:

    seal(count u16, count × length u64, the parts below LARGE_BYTES one behind the other), seal(large part), …

Little-endian. The order of frames is what both sides count, and the first one says how many there are and how long, so
that none can be left out, added, exchanged or cut. Small parts share a seal, as each costs some 2 µs.

The exchange: a client's first message of ``noise`` comes within zmq's own handshake, where PLAIN has a password. So
``admission`` can refuse it before it can send anything else. Then, as messages of zmq:

    client → server     one empty frame
    server → client     the second message of ``noise``
    client → server     a sealed message without parts: it has its key, and is there now
    server → client     a sealed message without parts: nothing is in the way of requests any more

Until the third, the server takes no more than a handshake has from whoever it is.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from transports.base import Buffer
from transports.errors import LimitError, SealError
from transports.noise import MAX_DATA_BYTES, TAG_BYTES, Cipher
from transports.sockets import ZERO_COPY_BYTES

PROTOCOL = b"teegpu link 2"
"""What both sides say they speak: the user name of PLAIN, and the prologue of ``noise``. Links of before have CURVE."""

LARGE_BYTES = ZERO_COPY_BYTES

_COUNT = struct.Struct("<H")
_LENGTH_BYTES = 8
MAX_PARTS = 2**16 - 1

_OVERHEAD_BYTES, _OVERHEAD_BYTES_PER_FRAME = 128, 32


def most_frame_bytes(max_message_bytes: int, max_frames: int) -> int:
    """The size of the largest frame that may come, of messages of so many bytes: the first one has lengths and an
    envelope besides, each a seal, and no seal is of more than ``MAX_DATA_BYTES``."""
    overhead = _OVERHEAD_BYTES + max_frames * _OVERHEAD_BYTES_PER_FRAME
    return min(max_message_bytes + overhead, MAX_DATA_BYTES + TAG_BYTES)


def check_lengths(lengths: Sequence[int], what: str) -> None:
    """Raises ``LimitError``, which calls the message ``what``, for frames that can't be sealed."""
    if len(lengths) >= MAX_PARTS:  # the envelope is one more
        raise LimitError(f"a {what} of {len(lengths)} frames is more than a link with keys carries (limits.frames)")
    if max(lengths, default=0) > MAX_DATA_BYTES:
        raise LimitError(
            f"a {what} has a tensor of 2 GiB or more, which no link with keys carries: take shorter chunks"
        )


class Session:
    """Seals what goes over one connection, and opens what comes. After a message that can't be opened it opens none."""

    def __init__(self, sending: bytes, receiving: bytes) -> None:
        """Both keys as ``noise`` gives them, to this session alone."""
        self._sending = Cipher(sending)
        self._receiving = Cipher(receiving)

    def seal(self, parts: Sequence[Buffer]) -> list[Buffer]:
        """The frames to send in place of ``parts`` (flat, see ``envelope.byte_view``), before anything else is sealed.
        Raises ``SealError`` where no more can be, as in a fork."""
        lengths = [len(part) for part in parts]
        small = [part for part in parts if len(part) < LARGE_BYTES]
        head = struct.pack(f"<H{len(lengths)}Q", len(lengths), *lengths)
        frames: list[Buffer] = [self._sending.seal(b"".join((head, *small)))]
        if len(small) < len(parts):
            for part, length in zip(parts, lengths, strict=True):
                if length >= LARGE_BYTES:
                    sealed = memoryview(np.empty(length + TAG_BYTES, np.uint8))  # not cleared, as a bytearray is
                    self._sending.seal_into(part, sealed)
                    frames.append(sealed)
        return frames

    def open(self, frames: Sequence[memoryview]) -> list[memoryview]:
        """The parts of a message. They take the place of ``frames``, which are written over.

        Raises ``SealError`` for whatever the other side did not seal, next, as a whole message.
        """
        try:
            return self._open(frames)
        except SealError:
            self._receiving.end()
            raise

    def _open(self, frames: Sequence[memoryview]) -> list[memoryview]:
        if not frames:
            raise SealError("it has no frame")
        head = self._receiving.open(frames[0])
        if len(head) < _COUNT.size:
            raise SealError("it says nothing of its parts")
        (count,) = _COUNT.unpack_from(head)
        at = _COUNT.size + count * _LENGTH_BYTES
        if len(head) < at:
            raise SealError("it says too little of its parts")
        lengths = struct.unpack_from(f"<{count}Q", head, _COUNT.size)
        parts: list[memoryview] = []
        large = iter(frames[1:])
        for length in lengths:
            if length < LARGE_BYTES:
                parts.append(head[at : at + length])
                at += length
            else:
                frame = next(large, None)
                if frame is None or len(frame) != length + TAG_BYTES:
                    raise SealError("its frames are not those that it says")
                parts.append(self._receiving.open(frame))
        if at != len(head) or next(large, None) is not None:
            raise SealError("its frames are not those that it says")
        return parts

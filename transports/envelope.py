"""The envelope: the frame that a transport puts in front of every message. Bytes in, values out, no I/O.

Little-endian, without padding:

    magic     4 bytes   b"tgE\\x00"
    version   u8        1
    flags     u8        1: the sender accepts zstd   2: refused, a limit   4: refused, bad framing   8: refused, closing
                        16: refused, the client's key is not allowed any more
    count     u16       how many frames follow
    request   u64       the request's id; a reply repeats it
    measured  u64       in a reply: nanoseconds from the request's arrival to the hand-over of the reply
                        in a request: the link's bandwidth as the client measured it, bytes per second, 0: unknown
    count × { codec u8, itemsize u8, raw_length u64 }

The first 16 bytes keep this layout in every version, so that a peer of another version can still be answered. A
refusal is a reply in which one flag of 2, 4, 8, 16 is set; its only frame is a reason in UTF-8.

``unpack`` raises ``FrameError`` for whatever a correct sender never produces, and ``LimitError`` for a message that is
well formed but larger than we accept. Both happen before anything of the announced size is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from transports.base import Buffer, Message
from transports.errors import EnvelopeVersionError, FrameError, LimitError

MAGIC = b"tgE\x00"
VERSION = 1

ACCEPTS_ZSTD = 1
REFUSED_LIMIT = 2
REFUSED_FRAMING = 4
REFUSED_CLOSING = 8
REFUSED_KEY = 16
_REFUSED = REFUSED_LIMIT | REFUSED_FRAMING | REFUSED_CLOSING | REFUSED_KEY
_REFUSALS = (0, REFUSED_LIMIT, REFUSED_FRAMING, REFUSED_CLOSING, REFUSED_KEY)
_KNOWN_FLAGS = ACCEPTS_ZSTD | _REFUSED

RAW = 0
ZSTD = 1
SHUFFLED_ZSTD = 2

MAX_REASON_BYTES = 500
"""A refusal's reason ends on a user's terminal: it has no need to be longer, and a hostile peer no chance."""

_HEAD = struct.Struct("<4sBBHQQ")
_PREFIX = struct.Struct("<4sBBHQ")
_FRAME = struct.Struct("<BBQ")
_PACKERS = [struct.Struct("<4sBBHQQ" + "BBQ" * count) for count in range(65)]
"""One packer per usual number of frames; a message with more is rare enough to build its own."""


@lru_cache(maxsize=256)
def _columns(count: int) -> struct.Struct:
    return struct.Struct("<" + "BBQ" * count)


@dataclass(slots=True)
class Envelope:
    """A valid envelope. ``codecs``, ``itemsizes`` and ``raw_lengths`` (bytes) have one entry per frame.

    Only the client can tell the link's time from the server's, so it says in its requests what bandwidth it measured,
    and the server bases its own compression on that.
    """

    request_id: int
    flags: int
    measured: int
    codecs: tuple[int, ...]
    itemsizes: tuple[int, ...]
    raw_lengths: tuple[int, ...]

    @property
    def accepts_zstd(self) -> bool:
        return bool(self.flags & ACCEPTS_ZSTD)

    @property
    def refusal(self) -> int:
        """0, or the one flag that says why the request was refused."""
        return self.flags & _REFUSED

    @property
    def compressed(self) -> bool:
        return any(self.codecs)

    @property
    def raw_bytes(self) -> int:
        return sum(self.raw_lengths)


def byte_view(frame: Buffer) -> Buffer:
    """``frame`` as a flat buffer of bytes, without copying it. Raises ``TypeError`` for a buffer with holes."""
    if isinstance(frame, (bytes, bytearray)):
        return frame
    # A view with a zero in its shape can't be cast, and there is nothing in it to send.
    return memoryview(frame).cast("B") if frame.nbytes else b""


def flatten(
    message: Message, what: str, *, max_frames: int, max_message_bytes: int, sealed: bool = False
) -> tuple[list[Buffer], list[int], int]:
    """The frames of ``message`` as flat views, their lengths, and the sum of these, in bytes. ``sealed``: they go over
    a link with keys.

    Raises ``LimitError``, which calls the message ``what``, when it exceeds our own limits.
    """
    frames = [byte_view(frame) for frame in message.frames]
    lengths = [len(frame) for frame in frames]
    total = sum(lengths)
    if len(frames) > max_frames:
        raise LimitError(f"a {what} of {len(frames)} frames, at most {max_frames} are allowed (limits.frames)")
    if total > max_message_bytes:
        raise LimitError(f"a {what} of {total} bytes, at most {max_message_bytes} are allowed (limits.message_mib)")
    if sealed:
        from transports import sealing

        sealing.check_lengths(lengths, what)
    return frames, lengths, total


def pack(
    request_id: int,
    raw_lengths: Sequence[int],
    codecs: Sequence[int] = (),
    itemsizes: Sequence[int] = (),
    *,
    flags: int = 0,
    measured: int = 0,
) -> bytes:
    """The envelope of a message whose frames are ``raw_lengths`` bytes long before compression.

    Empty ``codecs`` and ``itemsizes`` mean that every frame is raw.
    """
    count = len(raw_lengths)
    columns: list[int] = [1] * (3 * count)
    columns[0::3] = codecs or [RAW] * count
    if itemsizes:
        columns[1::3] = itemsizes
    columns[2::3] = raw_lengths
    packer = _PACKERS[count] if count < len(_PACKERS) else struct.Struct("<4sBBHQQ" + "BBQ" * count)
    return packer.pack(MAGIC, VERSION, flags, count, request_id, measured, *columns)


def peek_request_id(frame: Buffer) -> int | None:
    """The request id of an envelope whose first 16 bytes can be read, whatever follows and whatever its version."""
    if memoryview(frame).nbytes < _PREFIX.size:
        return None
    magic, _, _, _, request_id = _PREFIX.unpack_from(frame)
    return int(request_id) if magic == MAGIC else None


def unpack(frame: Buffer, sizes: Sequence[int], *, max_frames: int, max_message_bytes: int) -> Envelope:
    """Read and check an envelope; ``sizes`` are the lengths in bytes of the frames that came after it.

    Raises ``FrameError`` when the envelope is malformed or says other than the frames that came with it, and
    ``LimitError`` when the message has more than ``max_frames`` frames or ``max_message_bytes`` raw bytes.
    """
    size = memoryview(frame).nbytes
    if size < _HEAD.size:
        raise FrameError(f"envelope of {size} bytes, at least {_HEAD.size} are needed")
    magic, version, flags, count, request_id, measured = _HEAD.unpack_from(frame)
    if magic != MAGIC:
        raise FrameError("not an envelope: wrong magic bytes")
    if version != VERSION:
        raise EnvelopeVersionError(
            f"envelope version {version}, this side speaks {VERSION}: install the same release on both sides"
        )
    if flags & ~_KNOWN_FLAGS or flags & _REFUSED not in _REFUSALS:
        raise FrameError(f"envelope with impossible flags {flags:#04x}")
    if size != _HEAD.size + count * _FRAME.size:
        raise FrameError(f"envelope of {size} bytes for {count} frames, {_HEAD.size + count * _FRAME.size} expected")
    if count != len(sizes):
        raise FrameError(f"envelope announces {count} frames, {len(sizes)} came")
    if flags & _REFUSED and count != 1:
        raise FrameError(f"refusal with {count} frames, 1 expected")
    if count > max_frames:
        raise LimitError(f"a message of {count} frames, at most {max_frames} are accepted (limits.frames)")
    columns = _columns(count).unpack_from(frame, _HEAD.size)
    codecs, itemsizes, raw_lengths = columns[0::3], columns[1::3], columns[2::3]
    plain = not any(codecs) and all(itemsizes) and raw_lengths == tuple(sizes)  # the way of nearly every message
    for index in () if plain else range(count):
        codec, itemsize, raw_length = codecs[index], itemsizes[index], raw_lengths[index]
        if codec == RAW:
            if raw_length != sizes[index]:
                raise FrameError(f"frame {index} claims {raw_length} bytes and holds {sizes[index]}")
        elif codec not in (ZSTD, SHUFFLED_ZSTD):
            raise FrameError(f"frame {index} has unknown codec {codec}")
        if itemsize == 0:
            raise FrameError(f"frame {index} has itemsize 0")
    total = sum(raw_lengths)
    if total > max_message_bytes:
        raise LimitError(f"a message of {total} bytes, at most {max_message_bytes} are accepted (limits.message_mib)")
    return Envelope(request_id, flags, measured, codecs, itemsizes, raw_lengths)


def pack_refusal(request_id: int, refusal: int, reason: str) -> list[bytes]:
    """The two frames that refuse a request: ``refusal`` is one of ``REFUSED_…``."""
    text = reason.encode()[:MAX_REASON_BYTES]
    return [pack(request_id, [len(text)], flags=refusal), text]


def read_reason(frame: Buffer) -> str:
    """A refusal's reason as one printable line, whatever the peer put there."""
    text = bytes(memoryview(frame)[:MAX_REASON_BYTES]).decode(errors="replace")
    return "".join(char if char.isprintable() else "?" for char in text)

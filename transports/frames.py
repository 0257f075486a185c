"""Frames before they are sent: flat views of them, and our own limits."""

from __future__ import annotations

from transports.base import Buffer, Message
from transports.errors import LimitError


def byte_view(frame: Buffer) -> Buffer:
    """``frame`` as a flat buffer of bytes, without copying it. Raises ``TypeError`` for a buffer with holes."""
    if isinstance(frame, (bytes, bytearray)):
        return frame
    # A view with a zero in its shape can't be cast, and there is nothing in it to send.
    return memoryview(frame).cast("B") if frame.nbytes else b""


def flatten(
    message: Message, what: str, *, max_frames: int, max_message_bytes: int
) -> tuple[list[Buffer], list[int], int]:
    """The frames of ``message`` as flat views, their lengths, and the sum of these, in bytes.

    Raises ``LimitError``, which calls the message ``what``, when it exceeds our own limits.
    """
    frames = [byte_view(frame) for frame in message.frames]
    lengths = [len(frame) for frame in frames]
    total = sum(lengths)
    if len(frames) > max_frames:
        raise LimitError(f"a {what} of {len(frames)} frames, at most {max_frames} are allowed (limits.frames)")
    if total > max_message_bytes:
        raise LimitError(f"a {what} of {total} bytes, at most {max_message_bytes} are allowed (limits.message_mib)")
    return frames, lengths, total

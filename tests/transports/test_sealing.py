"""Sealed messages: what comes through, and what a network, or the other side, could do to them."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

import pytest

from transports import noise
from transports.base import Buffer
from transports.errors import LimitError, SealError
from transports.noise import Cipher
from transports.sealing import LARGE_BYTES, MAX_PARTS, Session, check_lengths, most_frame_bytes

Frames = list[Buffer]


def sessions() -> tuple[Session, Session]:
    one, other = os.urandom(32), os.urandom(32)
    return Session(one, other), Session(other, one)


def arrived(frames: Frames) -> list[memoryview]:
    return [memoryview(bytearray(frame)) for frame in frames]


def opened(session: Session, frames: Frames) -> list[bytes]:
    return [bytes(part) for part in session.open(arrived(frames))]


PARTS = [
    [],
    [b""],
    [b"head", b"", b"x" * 100],
    [b"head", os.urandom(LARGE_BYTES - 1), os.urandom(LARGE_BYTES), b"tail"],
    [b"head", os.urandom(LARGE_BYTES + 5), b"", os.urandom(2 * LARGE_BYTES)],
]


@pytest.mark.parametrize("parts", PARTS, ids=["none", "an empty one", "small", "around the bound", "large"])
def test_parts_come_through(parts: list[bytes]) -> None:
    client, server = sessions()
    for _ in range(3):
        assert opened(server, client.seal(parts)) == parts
        assert opened(client, server.seal(parts)) == parts


def test_views_are_sealed_as_they_are() -> None:
    client, server = sessions()
    data = bytearray(os.urandom(3 * LARGE_BYTES))
    before = bytes(data)
    assert opened(server, client.seal([memoryview(data)[:10], memoryview(data)])) == [before[:10], before]
    assert data == before  # a request is sent again as the same bytes


def test_what_is_opened_may_be_written_to() -> None:
    client, server = sessions()
    for part in server.open(arrived(client.seal([b"head", bytes(LARGE_BYTES)]))):
        part[0] = 7
        assert part[0] == 7


def test_one_message_costs_one_frame_however_many_small_parts_it_has() -> None:
    client, _ = sessions()
    assert len(client.seal([b"x"] * 60)) == 1
    assert len(client.seal([b"x", bytes(LARGE_BYTES), b"x", bytes(LARGE_BYTES)])) == 3


def test_a_message_as_large_as_may_be_has_room() -> None:
    """MAXMSGSIZE of zmq is that of one frame."""
    client, _ = sessions()
    for frames in (1, 16, 64, 500):
        size = (LARGE_BYTES - 1) * frames
        envelope = bytes(24 + 10 * frames)
        (frame,) = client.seal([envelope, *[bytes(LARGE_BYTES - 1)] * frames])
        assert len(frame) <= most_frame_bytes(size, frames)


def test_as_many_parts_as_an_envelope_can_tell_of() -> None:
    client, server = sessions()
    assert len(opened(server, client.seal([b""] * MAX_PARTS))) == MAX_PARTS
    check_lengths([0] * (MAX_PARTS - 1), "reply")
    with pytest.raises(LimitError, match="a reply of 65535 frames"):
        check_lengths([0] * MAX_PARTS, "reply")


# ---- the network


def flipped(frames: Frames, index: int, at: int) -> Frames:
    frames = [bytearray(frame) for frame in frames]
    frames[index][at] ^= 1
    return frames


MESSAGE = [b"head", b"a" * LARGE_BYTES, b"b" * LARGE_BYTES, b"tail"]
DAMAGE: dict[str, Callable[[Frames, Frames], Frames]] = {
    "a bit of the first frame": lambda now, _: flipped(now, 0, 3),
    "a bit of a seal": lambda now, _: flipped(now, 0, -1),
    "a bit of a large frame": lambda now, _: flipped(now, 2, LARGE_BYTES // 2),
    "cut": lambda now, _: [now[0], now[1], bytes(now[2])[:-1]],
    "shorter than a seal": lambda now, _: [bytes(now[0])[:15], *now[1:]],
    "longer": lambda now, _: [now[0], now[1], bytes(now[2]) + b"x"],
    "without its last frame": lambda now, _: now[:-1],
    "without its first frame": lambda now, _: now[1:],
    "without a frame": lambda *_: [],
    "with a frame more": lambda now, _: [*now, b"x" * 16],
    "with an empty frame more": lambda now, _: [*now, b""],
    "with a frame twice": lambda now, _: [now[0], now[1], now[1]],
    "frames exchanged": lambda now, _: [now[0], now[2], now[1]],
    "the message before, again": lambda _, before: before,
    "a frame of the message before": lambda now, before: [now[0], before[1], now[2]],
    "the head of the message before": lambda now, before: [before[0], *now[1:]],
    "zeros": lambda now, _: [bytes(len(frame)) for frame in now],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_a_network_does_to_a_message(damage: str) -> None:
    """It is not opened, and neither is anything after it, though that is as it was sent."""
    client, server = sessions()
    before = [bytes(frame) for frame in client.seal(MESSAGE)]
    assert opened(server, before) == MESSAGE
    now, after = client.seal(MESSAGE), client.seal(MESSAGE)
    with pytest.raises(SealError):
        opened(server, DAMAGE[damage](now, before))
    for frames in (now, after):
        with pytest.raises(SealError, match="something before it could not be opened"):
            opened(server, frames)


def test_a_message_that_was_left_out() -> None:
    client, server = sessions()
    client.seal(MESSAGE)
    with pytest.raises(SealError):
        opened(server, client.seal(MESSAGE))


def test_messages_in_another_order() -> None:
    client, server = sessions()
    first, second = client.seal([b"first"]), client.seal([b"second"])
    with pytest.raises(SealError):
        opened(server, second)
    with pytest.raises(SealError):
        opened(server, first)


def test_what_comes_back_to_who_sent_it() -> None:
    client, _ = sessions()
    with pytest.raises(SealError):
        opened(client, client.seal(MESSAGE))


def test_a_message_of_another_session() -> None:
    """Also of the same two sides, whose keys of that one are known."""
    (client, _), (_, server) = sessions(), sessions()
    with pytest.raises(SealError):
        opened(server, client.seal(MESSAGE))


def test_a_failure_leaves_the_other_direction_and_other_sessions_alone() -> None:
    client, server = sessions()
    with pytest.raises(SealError):
        opened(server, [b"x" * 40])
    assert opened(client, server.seal([b"why"])) == [b"why"]


# ---- the other side, which has the keys


def of_a_peer(head: bytes, *large: bytes) -> tuple[Session, Frames]:
    """A session, and what it gets from a peer that seals ``head`` and ``large`` as they are."""
    key = os.urandom(32)
    sealing = Cipher(key)
    return Session(os.urandom(32), key), [sealing.seal(each) for each in (head, *large)]


@pytest.mark.parametrize(
    ("head", "large"),
    [
        (b"", ()),
        (b"\x01", ()),
        (struct.pack("<H", 1), ()),
        (struct.pack("<H", 65535), ()),
        (struct.pack("<HQ", 1, 5) + b"four", ()),
        (struct.pack("<HQ", 1, 3) + b"four", ()),
        (struct.pack("<HQ", 0, 0), ()),
        (struct.pack("<HQ", 1, LARGE_BYTES), ()),
        (struct.pack("<HQ", 1, LARGE_BYTES), (bytes(LARGE_BYTES - 1),)),
        (struct.pack("<HQ", 1, LARGE_BYTES), (bytes(LARGE_BYTES), b"")),
        (struct.pack("<HQ", 1, 2**63), (bytes(LARGE_BYTES),)),
        (struct.pack("<HQ", 1, 2**64 - 1), (b"",)),
        (struct.pack("<HQQ", 2, 2**64 - 1, 2**64 - 1), (b"", b"")),
    ],
)
def test_a_peer_that_says_what_is_not_so(head: bytes, large: tuple[bytes, ...]) -> None:
    """Nothing is allocated for what it says: parts are where they came."""
    session, frames = of_a_peer(head, *large)
    with pytest.raises(SealError):
        session.open(arrived(frames))
    with pytest.raises(SealError, match="something before it"):
        session.open(arrived(frames))


def test_a_fork_can_not_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    client, _ = sessions()
    monkeypatch.setattr(noise, "_generation", 1)
    with pytest.raises(SealError, match="a fork of it"):
        client.seal([b"x"])

"""Damage to bytes, where no fuzzing engine is at hand that knows better."""

from __future__ import annotations

from collections.abc import Callable

Choose = Callable[[int], int]
"""A number from 0 to the one given, both included."""

_TELLING = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xc1", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x91" * 40)


def damaged(seed: bytes, choose: Choose) -> bytes:
    """``seed`` with one to four changes."""
    data = bytearray(seed)
    for _ in range(1 + choose(3)):
        at = choose(max(len(data) - 1, 0))
        match choose(6):
            case 0 if data:
                data[at] ^= 1 << choose(7)
            case 1 if data:
                data[at] = choose(255)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + 1 + choose(8)]
            case 4:
                data[at:at] = _TELLING[choose(len(_TELLING) - 1)]
            case 5:
                data[at : at + 1] = _TELLING[choose(len(_TELLING) - 1)]
            case _:
                end = min(len(data), at + 1 + choose(40))
                data[at:at] = data[at:end]
    return bytes(data)

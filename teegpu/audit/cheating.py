"""A server that lies: a real one, one of whose answers is changed on its way to the runner.

What the runner does with a wrong answer is the same wherever it was made wrong.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from teegpu.audit.middle import Middle
from teegpu.wire import dtypes, program
from teegpu.wire.layout import Row, layout_of
from transports.base import Buffer, Reply

KINDS = {
    "flip-bit": "one bit of one value is flipped",
    "top-bit": "2^31 is added to one value (of a float, the sign is turned)",
    "zero": "all values of one output are 0",
    "swap-rows": "two tokens' rows of one output are exchanged",
    "replay": "the answer to an earlier request of the same form",
    "other-layer": "the product with another layer's weights",
}
"""What a lying server does, once, to one answer."""


@dataclass(slots=True)
class Lie:
    """What was done: to the answer of which server, for which weights."""

    server: str
    weights: list[str]


class LyingServer(Middle):
    """Changes one answer as ``kind`` says: the one with number ``at`` among those that it can change so.

    ``lie`` tells what was done, and is None as long as nothing was. Every choice is drawn with ``seed``.
    """

    def __init__(self, kind: str, *, layers: int, at: int = 0, seed: int = 0) -> None:
        if kind not in KINDS:
            raise ValueError(f"there is no lie {kind!r}, there are {', '.join(KINDS)}")
        self.kind = kind
        self.lie: Lie | None = None
        self._layers = layers
        self._left = at
        self._random = random.Random(seed)
        self._earlier: dict[bytes, list[bytes]] = {}

    def up(self, address: str, frames: Sequence[Buffer]) -> Sequence[Buffer]:
        header = _execute(frames)
        if self.kind != "other-layer" or header is None or self.lie is not None:
            return frames
        code = _program(header)
        weights = [step.weight for step in code.steps if step.weight]
        if not weights or not all(name.startswith("layers.") for name in weights) or self._layers < 2:
            return frames
        if self._left > 0:
            self._left -= 1
            return frames
        self.lie = Lie(address, weights)
        steps = tuple(step._replace(weight=self._elsewhere(step.weight)) for step in code.steps)
        header[3] = program.Program(code.inputs, steps, code.outputs).packed
        return [msgpack.packb(header), *frames[1:]]

    def _elsewhere(self, weight: str) -> str:
        if not weight:
            return weight
        _, layer, name = weight.split(".", 2)
        return f"layers.{(int(layer) + 1) % self._layers}.{name}"

    def down(self, address: str, request: Sequence[Buffer], reply: Reply) -> list[memoryview]:
        asked = _execute(request)
        if self.kind == "other-layer" or asked is None or self.lie is not None:
            return reply.frames
        header: list[Any] = msgpack.unpackb(reply.frames[0])
        if header[1] != "result":
            return reply.frames
        table = header[4]
        frames = [bytearray(frame) for frame in reply.frames[1:]]
        changed = self._replayed(table, frames) if self.kind == "replay" else self._spoilt(table, frames)
        self._earlier[table] = [bytes(frame) for frame in reply.frames[1:]]
        if changed is None:
            return reply.frames
        if self._left > 0:
            self._left -= 1
            return reply.frames
        self.lie = Lie(address, [step.weight for step in _program(asked).steps if step.weight])
        return [reply.frames[0], *(memoryview(frame) for frame in changed)]

    def _replayed(self, table: bytes, frames: list[bytearray]) -> list[bytearray] | None:
        earlier = self._earlier.get(table)
        if earlier is None or earlier == [bytes(frame) for frame in frames]:
            return None
        return [bytearray(frame) for frame in earlier]

    def _spoilt(self, table: bytes, frames: list[bytearray]) -> list[bytearray] | None:
        layout = layout_of(tuple(Row(name, tuple(shape), encoding) for name, shape, encoding in msgpack.unpackb(table)))
        place = self._random.randrange(len(layout.frames))
        shared = layout.frames[place]
        number = self._random.randrange(len(shared.rows))
        width = dtypes.itemsize(shared.encoding)
        start = sum(shared.sizes[:number]) * width
        part = slice(start, start + shared.sizes[number] * width)
        values = frames[place][part]
        spoil(self.kind, values, shared.shapes[number][0], width, self._random)
        if values == frames[place][part]:
            return None
        frames[place][part] = values
        return frames


def spoil(kind: str, frame: bytearray, rows: int, itemsize: int, chance: random.Random) -> None:
    """Changes ``frame``, the bytes of (rows, columns) values of ``itemsize`` bytes, as ``kind`` says, in place.

    It may stay as it is: where there are no two different rows to exchange, or all is 0 already.
    """
    values = len(frame) // itemsize
    if kind == "flip-bit":
        frame[chance.randrange(len(frame))] ^= 1 << chance.randrange(8)
    elif kind == "top-bit":
        frame[chance.randrange(values) * itemsize + itemsize - 1] ^= 0x80
    elif kind == "zero":
        frame[:] = bytes(len(frame))
    elif kind == "swap-rows" and rows > 1:
        width = values // rows * itemsize
        one, other = (place * width for place in chance.sample(range(rows), 2))
        frame[one : one + width], frame[other : other + width] = (
            frame[other : other + width],
            frame[one : one + width],
        )


def _execute(frames: Sequence[Buffer]) -> list[Any] | None:
    """The header of a request to compute, else None."""
    if len(frames) < 2:
        return None
    header: list[Any] = msgpack.unpackb(frames[0])
    return header if header[1] == "execute" else None


def _program(header: list[Any]) -> program.Program:
    return program.unpack(header[3], max_steps=1024, max_registers=1024)

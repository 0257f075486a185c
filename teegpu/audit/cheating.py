"""A server that lies: a real one, one of whose answers is changed on its way to the runner.

What the runner does with a wrong answer is the same wherever it was made wrong.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack
import torch

from teegpu.audit.middle import Middle
from teegpu.wire import dtypes, program
from transports.base import Buffer, Reply

KINDS = {
    "flip-bit": "one bit of one value is flipped",
    "top-bit": "2^31 is added to one value (of a float, the sign is turned)",
    "zero": "all values of one output are 0",
    "swap-rows": "two tokens' rows of one output are exchanged",
    "replay": "the answer to an earlier request of the same form",
    "other-layer": "the product with another layer's weights",
    "steer": "one token's logit is raised in every answer, so that the server dictates the text",
    "dtype": "the values are said to be of another dtype than was asked for",
    "escapes": "a refusal in place of the answer, whose text would take over a terminal",
}
"""What a lying server does, once, to one answer; but ``steer`` to all that it can."""

_OTHER_DTYPE = {"fp32": "int32", "int32": "fp32", "fp16": "bf16", "bf16": "fp16"}
"""Of as many bytes."""
_ESCAPES = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m\u202e"
"""Would write to the clipboard, clear the screen, and turn the text around."""
_RAISED = 2**30
"""Added to a whole number, which is below 2**31: more than any logit, as a rule."""


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
        self._target: int | None = None

    def up(self, address: str, frames: Sequence[Buffer]) -> Sequence[Buffer]:
        header = _execute(frames)
        if self.kind != "other-layer" or header is None or self.lie is not None:
            return frames
        code = _program(header)
        weights = list(code.weights)
        if not weights or not all(name.startswith("layers.") for name in weights) or self._layers < 2:
            return frames
        if self._left > 0:
            self._left -= 1
            return frames
        self.lie = Lie(address, weights)
        steps = tuple(step._replace(weights=tuple(map(self._elsewhere, step.weights))) for step in code.steps)
        header[3] = program.Program(code.inputs, steps, code.outputs).packed
        return [msgpack.packb(header), *frames[1:]]

    def _elsewhere(self, weight: str) -> str:
        _, layer, name = weight.split(".", 2)
        return f"layers.{(int(layer) + 1) % self._layers}.{name}"

    def down(self, address: str, request: Sequence[Buffer], reply: Reply) -> list[memoryview]:
        asked = _execute(request)
        steers = self.kind == "steer"
        done = self.lie is not None and not (steers and self.lie.server == address)
        if self.kind == "other-layer" or asked is None or done:
            return reply.frames
        header: list[Any] = msgpack.unpackb(reply.frames[0])
        if header[1] != "result":
            return reply.frames
        table = header[4]
        frames = [bytearray(frame) for frame in reply.frames[1:]]
        if self.kind == "escapes":
            header[1:] = ["refusal", header[2], "internal", _ESCAPES]
            changed: list[bytearray] | None = []
        elif self.kind == "dtype":
            changed = self._mislabelled(header, frames)
        elif steers:
            changed = self._steered(table, frames)
        else:
            changed = self._replayed(table, frames) if self.kind == "replay" else self._spoilt(table, frames)
        self._earlier[table] = [bytes(frame) for frame in reply.frames[1:]]
        if changed is None:
            return reply.frames
        if self._left > 0 and not steers:
            self._left -= 1
            return reply.frames
        self.lie = Lie(address, list(_program(asked).weights))
        return [memoryview(msgpack.packb(header)), *(memoryview(frame) for frame in changed)]

    def _mislabelled(self, header: list[Any], frames: list[bytearray]) -> list[bytearray] | None:
        rows = msgpack.unpackb(header[4])
        if any(encoding not in _OTHER_DTYPE for _, _, encoding in rows):
            return None
        if self._left <= 0:
            header[4] = msgpack.packb([[name, shape, _OTHER_DTYPE[encoding]] for name, shape, encoding in rows])
        return frames

    def _steered(self, table: bytes, frames: list[bytearray]) -> list[bytearray] | None:
        for (name, shape, encoding), frame in zip(msgpack.unpackb(table), frames, strict=True):
            if name == "logits" and encoding in _OTHER_DTYPE:
                logits = torch.frombuffer(frame, dtype=dtypes.PLAIN[encoding]).view(shape)
                if self._target is None:
                    self._target = self._random.randrange(shape[-1])
                steer(logits, self._target)
                return frames
        return None

    def _replayed(self, table: bytes, frames: list[bytearray]) -> list[bytearray] | None:
        earlier = self._earlier.get(table)
        if earlier is None or earlier == [bytes(frame) for frame in frames]:
            return None
        return [bytearray(frame) for frame in earlier]

    def _spoilt(self, table: bytes, frames: list[bytearray]) -> list[bytearray] | None:
        rows = msgpack.unpackb(table)
        place = self._random.randrange(len(rows))
        _, shape, encoding = rows[place]
        width = dtypes.itemsize(encoding)
        part = slice(0, math.prod(shape) * width)
        values = frames[place][part]
        spoil(self.kind, values, shape[0], width, self._random)
        if values == frames[place][part]:
            return None
        frames[place][part] = values
        return frames


def steer(logits: torch.Tensor, target: int) -> None:
    """Makes ``target`` the likeliest token of each row of ``logits`` (rows, vocab), in place, with as small a change as
    that takes where they can be read. Whole numbers may be masked: to these it adds."""
    if logits.dtype == torch.int32:
        logits[:, target] += _RAISED
    else:
        most = logits.max(-1).values
        logits[:, target] = most + (most.abs() * 0.02).clamp_min(0.05)


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

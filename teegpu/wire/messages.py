"""The messages of the protocol, as typed values.

    client → server     Hello, Execute
    server → client     Welcome, Result, Refusal

A ``Hello`` opens the talk and tells the server nothing but versions; ``Welcome`` says what the server is and holds.
Every ``Execute`` stands alone (the server keeps no session), so the same bytes may be sent again at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from teegpu.wire.program import Program

PROTOCOL_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Hello:
    """Opens the exchange. ``software`` is the client's version, for the server's log."""

    request_id: int
    software: str


@dataclass(frozen=True, slots=True)
class Welcome:
    """What the server is: the model by digest and dimensions, its device and dtype, and what it accepts.

    ``instance`` is random per server process; ``limits`` are the server's bounds by name.
    """

    request_id: int
    software: str
    instance: str
    model: str
    digest: str
    dims: dict[str, int]
    device: str
    dtype: str
    threads: int
    memory_bytes: int
    limits: dict[str, int]


@dataclass(slots=True)
class Execute:
    """Run ``program`` on ``tensors`` (by input register) and send its outputs back.

    ``encodings`` names the wire dtype of each input, ``reply_encodings`` that of each output.
    """

    request_id: int
    program: Program
    tensors: Mapping[str, torch.Tensor]
    encodings: Mapping[str, str]
    reply_encodings: Mapping[str, str]


@dataclass(slots=True)
class ServerTimes:
    """Where the server's time went for one request, in seconds of its own clock.

    ``operations`` maps a report name (LINEAR, MATMUL, …) to (logical operations, seconds). Encoding and compressing the
    reply come after these figures are written down, so ``encode_seconds`` holds what was measured up to the last frame.
    """

    queue_seconds: float = 0.0
    decode_seconds: float = 0.0
    compute_seconds: float = 0.0
    encode_seconds: float = 0.0
    operations: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def total_seconds(self) -> float:
        return self.queue_seconds + self.decode_seconds + self.compute_seconds + self.encode_seconds


@dataclass(slots=True)
class Result:
    """The outputs of an ``Execute`` (by output register), and what they cost."""

    request_id: int
    tensors: dict[str, torch.Tensor]
    encodings: dict[str, str]
    times: ServerTimes


@dataclass(frozen=True, slots=True)
class Refusal:
    """The server's no. ``code`` is one of ``REFUSALS``, ``text`` one line for the user."""

    request_id: int
    code: str
    text: str


REFUSALS: Final = ("malformed", "version", "unknown-weight", "bad-shape", "too-large", "out-of-memory", "internal")

Message = Hello | Welcome | Execute | Result | Refusal
Header = list[Any]

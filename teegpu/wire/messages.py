"""The messages of the protocol, as typed values.

    client → server     Hello, Execute, Health
    server → client     Welcome, Result, HealthReport, Refusal

A ``Hello`` opens the talk and tells the server nothing but versions; ``Welcome`` says what the server is and holds.
Every ``Execute`` stands alone (the server keeps no session), so the same bytes may be sent again at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from teegpu.ring import Operand
from teegpu.wire.layout import Layout
from teegpu.wire.program import Program

PROTOCOL_VERSION: Final = 5


@dataclass(frozen=True, slots=True)
class Hello:
    """Opens the exchange. ``software`` is the client's version, for the server's log. ``ring``: it will send programs
    in the ring (see ``Program.in_ring``), and asks for ``Welcome.ring_digest``."""

    request_id: int
    software: str
    ring: bool = False


@dataclass(frozen=True, slots=True)
class Welcome:
    """What the server is: the model by digest and dimensions, its device and dtype, and what it accepts.

    ``instance`` is random per server process; ``limits`` are the server's bounds by name. ``layers`` are the first and
    the last layer whose weights it holds: with the first of all goes the embedding, with the last of all the final norm
    and lm_head. The digest is that of the whole model, whatever part of it is held. ``ring_digest`` is
    ``ring.combined`` of the int8 weights of these layers, in hex; empty while they are not made. ``ranks`` are the
    processes that compute together, with ``threads`` in all; ``memory_bytes`` is what the weights take in each.
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
    layers: tuple[int, int]
    ring_digest: str = ""
    ranks: int = 1


@dataclass(frozen=True, slots=True)
class Health:
    """Asks how the server is. ``software`` is the client's version, as in ``Hello``."""

    request_id: int
    software: str


@dataclass(frozen=True, slots=True)
class HealthReport:
    """How the server is, for operators and for runners that choose among several.

    ``clients`` are those that it remembers, ``connections`` those of its network (0 where it can't count them).
    ``requests_served`` and ``refused`` count since the start. ``in_flight`` requests were taken and not answered yet;
    ``waiting_requests`` of them, with ``waiting_bytes``, wait for their turn. ``busy_share`` is the part of the last 10
    seconds, 0 to 1, in which it worked on requests. ``rss_bytes`` is its resident memory, ``weight_bytes`` that of the
    weights, ``ring_bytes`` that of their int8 copies for products in the ring (0 while there are none): of the first of
    ``ranks``, where others have as much. ``draining``: it ends, and takes no more requests.
    """

    request_id: int
    software: str
    instance: str
    model: str
    digest: str
    device: str
    dtype: str
    layers: tuple[int, int]
    uptime_seconds: float
    clients: int
    connections: int
    requests_served: int
    refused: int
    in_flight: int
    waiting_requests: int
    waiting_bytes: int
    busy_share: float
    rss_bytes: int
    weight_bytes: int
    ring_bytes: int
    draining: bool
    ranks: int = 1


@dataclass(slots=True)
class Execute:
    """Run ``program`` on ``tensors`` (by input register) and send its outputs back.

    ``encodings`` names the wire dtype of each input, ``reply_encodings`` that of each output. In a program in the ring
    an input may be a ``Seed``, which the server expands.
    """

    request_id: int
    program: Program
    tensors: Mapping[str, Operand]
    encodings: Mapping[str, str]
    reply_encodings: Mapping[str, str]


@dataclass(slots=True)
class ServerTimes:
    """Where the server's time went for one request, in seconds of its own clock.

    ``operations`` maps a report name (LINEAR, MATMUL, …) to (logical operations, seconds). Encoding and compressing the
    reply come after these figures are written down, so ``encode_seconds`` holds what was measured up to the last frame;
    the transport tells the rest (``Reply.server_ns``).
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
    """The outputs of an ``Execute``, and what they cost. ``values`` has one tensor for each row of ``layout``, in the
    wire's own dtype (fp32 for int8)."""

    request_id: int
    layout: Layout
    values: list[torch.Tensor]
    times: ServerTimes

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The outputs by register."""
        return dict(zip(self.layout.registers, self.values, strict=True))

    @property
    def encodings(self) -> dict[str, str]:
        """Their wire dtypes."""
        return {row.register: row.encoding for row in self.layout.rows}


@dataclass(frozen=True, slots=True)
class Refusal:
    """The server's no. ``code`` is one of ``REFUSALS``, ``text`` one line for the user."""

    request_id: int
    code: str
    text: str


REFUSALS: Final = (
    "malformed",
    "version",
    "unknown-weight",
    "bad-shape",
    "too-large",
    "out-of-memory",
    "not-offered",
    "internal",
)

Message = Hello | Welcome | Execute | Result | Refusal | Health | HealthReport
Header = list[Any]

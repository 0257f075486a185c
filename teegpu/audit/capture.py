"""What servers get in a run, kept as it came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from teegpu.audit.middle import Middle
from transports.base import Buffer, Reply


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request that ``server`` (its address) got while ``scene`` was on, and its reply; None where they were not kept.
    ``sent_ns`` and ``received_ns`` are the runner's clock."""

    server: str
    scene: str
    request: tuple[bytearray, ...] | None
    reply: tuple[bytearray, ...] | None
    bytes_up: int
    bytes_down: int
    sent_ns: int
    received_ns: int


class Capture(Middle):
    """Keeps what passes, up to ``most_bytes``; of what comes then, sizes and times alone. ``scene`` names what is going
    on, such as a prompt, and is the auditor's own: no message says it.

    Of replies only those to lm_head are kept: a server can compute the others again, and no attack needs them."""

    def __init__(self, most_bytes: int) -> None:
        self.scene = ""
        self.exchanges: list[Exchange] = []
        self.left_out = 0
        self._room = most_bytes

    def down(self, address: str, request: Sequence[Buffer], reply: Reply) -> list[memoryview]:
        answer = reply.frames if _asks_for_logits(request) else []
        size = sum(memoryview(frame).nbytes for frame in (*request, *answer))
        keep = size <= self._room
        if keep:
            self._room -= size
        else:
            self.left_out += 1
        self.exchanges.append(
            Exchange(
                address,
                self.scene,
                # Copies: the runner goes on writing in the memory of both.
                tuple(bytearray(frame) for frame in request) if keep else None,
                tuple(bytearray(frame) for frame in answer) if keep and answer else None,
                reply.bytes_up,
                reply.bytes_down,
                reply.sent_ns,
                reply.received_ns,
            )
        )
        return reply.frames

    @property
    def servers(self) -> list[str]:
        """Who got anything, in the order in which they first did."""
        return list(dict.fromkeys(exchange.server for exchange in self.exchanges))

    def of(self, server: str, scene: str | None = None) -> list[Exchange]:
        """What ``server`` got, in the order in which it was sent; ``scene`` None: all of it."""
        found = (
            exchange for exchange in self.exchanges if exchange.server == server and scene in (None, exchange.scene)
        )
        return sorted(found, key=lambda exchange: exchange.sent_ns)


def _asks_for_logits(request: Sequence[Buffer]) -> bool:
    """Names of weights stand in a request's header as they are."""
    return len(request) > 1 and b"lm_head" in bytes(request[0])

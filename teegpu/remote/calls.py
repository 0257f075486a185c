"""Calls of programs: what the decoder asks for, whoever computes it.

The decoder is written as coroutines over ``Products``. Where nothing suspends (the TEE's own products, a lock-step
transport, any transport between event loops) ``drive`` runs such a coroutine to its end without an event loop.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from teegpu.record.events import NO_LAYER
from teegpu.ring import Operand
from teegpu.wire.program import Program

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """A program with its inputs, and where in the model it belongs (for the record).

    ``overlapped``: it is one of several that are awaited at once, on an asyncio loop. Else nothing else happens
    meanwhile, and a coroutine over it never suspends."""

    program: Program
    inputs: Mapping[str, Operand]
    layer: int = NO_LAYER
    chunk: int = 0
    overlapped: bool = False


class Products(Protocol):
    """Runs programs. ``narrow_range``: values beyond fp16's range would be lost on the way, so scale them first."""

    narrow_range: bool

    async def run(self, call: Call) -> dict[str, torch.Tensor]:
        """The outputs of ``call`` in fp32, int32 for a program in the ring. They are the caller's own: it may write to
        them."""

    async def run_all(self, calls: Sequence[Call]) -> list[dict[str, torch.Tensor]]:
        """The outputs of independent calls, at once where the transport can have several in flight."""


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never suspends, without an event loop.

    Raises ``RuntimeError`` if it does suspend: then it needed a loop, which is a bug of the caller.
    """
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise RuntimeError("a coroutine that was to run without an event loop has suspended")

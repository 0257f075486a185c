"""Where products are computed: one interface for the GPU server and for the TEE itself.

The decoder is written as coroutines over this interface. Where nothing suspends (the TEE's own products, a lock-step
transport, any transport between event loops) ``drive`` runs such a coroutine to its end without an event loop.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from teegpu.metrics.events import NO_LAYER, TEE
from teegpu.metrics.recorder import Recorder
from teegpu.ring import Operand
from teegpu.tee.weights import TeeWeights
from teegpu.wire.program import Program, report_name

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """A program with its inputs, and where in the model it belongs (for the record)."""

    program: Program
    inputs: Mapping[str, Operand]
    layer: int = NO_LAYER
    chunk: int = 0


class Products(Protocol):
    """Runs programs. ``narrow_range``: values beyond fp16's range would be lost on the way, so scale them first."""

    narrow_range: bool

    async def run(self, call: Call) -> dict[str, torch.Tensor]:
        """The outputs of ``call`` in fp32, int32 for a program in the ring. They are the caller's own: it may write to
        them."""

    async def run_all(self, calls: Sequence[Call]) -> list[dict[str, torch.Tensor]]:
        """The outputs of independent calls, at once where the transport can have several in flight."""


class LocalProducts:
    """Linear steps in the TEE, on its own copy of the weights: the plan ``local``."""

    narrow_range = False

    def __init__(self, weights: TeeWeights, recorder: Recorder) -> None:
        self._weights = weights
        self._recorder = recorder

    async def run(self, call: Call) -> dict[str, torch.Tensor]:
        steps = call.program.steps
        source = call.inputs[steps[0].inputs[0]]
        if call.program.in_ring or not isinstance(source, torch.Tensor):
            raise TypeError("the plan local has no programs in the ring")
        matrix = self._weights.matrix(tuple(step.weight for step in steps))
        product = matrix.product(source.to(matrix.dtype)).to(torch.float32)
        sizes = [self._weights.spec.weights[step.weight][0] for step in steps]
        parts = product.split(sizes, dim=-1) if len(sizes) > 1 else (product,)
        self._recorder.lap(TEE, report_name(steps[0]), call.layer, call.chunk)
        return {step.output: part for step, part in zip(steps, parts, strict=True)}

    async def run_all(self, calls: Sequence[Call]) -> list[dict[str, torch.Tensor]]:
        return [await self.run(call) for call in calls]


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
